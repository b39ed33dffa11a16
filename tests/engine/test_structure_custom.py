"""The structure of models known by hand: every fact, and every write checked by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from models import structures, structures_inputs, structures_more  # noqa: F401 - enter models
from models.structures import MODELS
from torch import Tensor, fx, nn

import lensfx
from lensfx import Program
from lensfx.analysis.structure import Stream, Structure, Write, structure
from lensfx.graph.program import copy_graph


@cache
def captured(name: str) -> tuple[nn.Module, Program, Structure]:
    model = MODELS[name].model()
    program = lensfx.capture(model, *MODELS[name].inputs())
    return model, program, structure(program)


def kinds(stream: Stream) -> tuple[str, ...]:
    """What the blocks of a stream are, what is injected left out."""
    words = ([w.kind for w in b.writes if w.kind != "inject"] for b in stream.blocks)
    return tuple(" ".join(w) for w in words)


def where_norms(write: Write) -> str:
    if write.norm_after is not None and write.norm is None:
        return "after"
    if write.norm is None:
        return "none"
    return "both" if write.norm_out is not None else "before"


FOUND = [name for name, facts in MODELS.items() if facts.blocks]


@pytest.mark.parametrize("name", FOUND)
def test_the_facts(name: str) -> None:
    facts, (_, _, found) = MODELS[name], captured(name)
    assert found.stream is not None
    assert found.complete, found.unclaimed
    assert kinds(found.stream) == facts.blocks
    writes = [w for b in found.blocks for w in b.writes if w.kind != "inject"]
    heads = {(a.heads, a.kv_heads) for w in writes for a in w.attention}
    assert heads == ({(facts.heads, facts.kv_heads)} if facts.heads else set())
    assert {where_norms(w) for w in writes} == {facts.norms}
    assert {b.parallel for b in found.blocks} == {facts.parallel}
    assert tuple(e.kind for e in found.embeddings) == facts.embeddings
    assert (found.stream.final_norm is not None) == facts.final_norm
    assert (found.unembed is not None) == facts.unembed
    assert [kinds(s) for s in found.streams[:-1]] == ([facts.beside] if facts.beside else [])


def test_no_residual_is_no_stream() -> None:
    _, _, found = captured("no residual")
    assert found.stream is None
    assert not found.complete
    assert "no residual stream" in str(found)


class Kept(fx.Interpreter):
    """Runs a graph and keeps every value, before anything later can change it."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.kept[n.name] = out.clone() if isinstance(out, Tensor) else out
        return out


def values(program: Program, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    interpreter = Kept(program.flat)
    interpreter.kept = {}
    with torch.no_grad():
        interpreter.run(*inputs)
    return interpreter.kept


def assert_sum(write: Write, at: dict[str, Any]) -> None:
    """The value and what stands beside it are, bitwise, what their reader makes of them."""
    if write.value is write.add:
        # A product fused with its add has no value of its own.
        assert "addmm" in str(write.add.target)
        return
    reader, value = write.reader, at[write.value.name]
    beside = [n for n in reader.all_input_nodes if n is not write.value]
    assert write.value in reader.all_input_nodes
    if reader is write.add:
        assert beside == [write.carry]
    assert torch.equal(at[beside[0].name] + write.sign * value, at[reader.name])


@pytest.mark.parametrize("name", FOUND)
def test_every_write_is_its_sum(name: str) -> None:
    model, program, found = captured(name)
    inputs = MODELS[name].inputs()
    at = values(program, inputs)
    for stream in found.streams:
        for write in stream.writes:
            assert_sum(write, at)
    with torch.no_grad():
        start = model.embed(inputs[-1] if name == "encoder and decoder" else inputs[0])
    assert torch.equal(at[found.stream.start.name], start)


@pytest.mark.parametrize(
    "name", [n for n in FOUND if n not in ("post-norm", "copies of the stream")]
)
def test_the_end_is_what_the_last_norm_reads(name: str) -> None:
    model, program, found = captured(name)
    if not hasattr(model, "ln_f"):
        pytest.skip("it has no module that says so")
    inputs, read = MODELS[name].inputs(), []
    handle = model.ln_f.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    end = values(program, inputs)[found.stream.end.name]
    assert torch.equal(end.view(read[-1].shape), read[-1])


@pytest.mark.parametrize("name", FOUND)
def test_a_block_starts_where_the_last_one_ended(name: str) -> None:
    _, _, found = captured(name)
    for stream in found.streams:
        if name != "x0 and value mixing, additive skips":
            assert stream.blocks[0].pre is stream.start
        for block, after in zip(stream.blocks, stream.blocks[1:], strict=False):
            assert after.pre in stream.values
            assert block.post <= after.pre < after.post
            if not stream.stages:
                assert comes_from(after.pre, block.post)
        assert stream.blocks[-1].post is stream.end


def comes_from(node: fx.Node, to: fx.Node) -> bool:
    """Whether a value is another one, scaled and viewed, and nothing else of the stream."""
    if node is to:
        return True
    live = [n for n in node.all_input_nodes if n >= to and getattr(n.meta["val"], "ndim", 0) > 1]
    return bool(live) and all(comes_from(n, to) for n in live)


def test_what_a_fused_product_writes_is_said_to_have_no_value() -> None:
    _, _, found = captured("products fused with the residual add")
    fused = [w for w in found.stream.writes if w.value is w.add]
    assert len(fused) == 2 * structures.BLOCKS
    assert sum("no value of its own" in str(n) for n in found.notes) == len(fused)


def test_values_of_an_earlier_block_are_crossing() -> None:
    _, _, found = captured("x0 and value mixing, additive skips")
    assert [len(b.attn_write.branch.crossing) for b in found.blocks] == [0, 1, 1, 1]


def test_a_norm_two_branches_read_is_of_both() -> None:
    for block in captured("parallel")[2].blocks:
        assert block.attn_write.norm is block.mlp_write.norm
        assert not block.mlp_write.branch.crossing


def test_a_block_run_again_is_known_to_be_the_same() -> None:
    assert [b.shared_with for b in captured("one block several times")[2].blocks] == [
        None,
        *[0] * 3,
    ]


def test_gates_of_a_carry_are_part_of_the_write() -> None:
    for block in captured("highway gates")[2].blocks:
        for write in block.writes:
            assert any("sigmoid" in n.name for n in write.branch.nodes)


# names say nothing


def renamed(
    program: Program, name: Callable[[int, str], str], path: Callable[[str], str]
) -> Program:
    """The same program under other names for parameters and modules; an empty path is none."""
    graph, _ = copy_graph(program.graph)
    tensors = {}
    for i, n in enumerate(graph.nodes):
        stack = n.meta.pop("nn_module_stack", None)
        n.meta.pop("stack_trace", None)
        if stack and path("h"):
            n.meta["nn_module_stack"] = {k: (path(p), path(str(c))) for k, (p, c) in stack.items()}
        if n.op == "get_attr":
            old = str(n.target)
            n.target = name(i, old)
            tensors[n.target] = program.tensors[old]
    return replace(program.with_graph(graph), tensors=MappingProxyType(tensors))


def described(found: Structure) -> list[Any]:
    """A structure without names."""
    rows: list[Any] = [found.complete, found.unembed is not None, len(found.notes)]
    for stream in found.streams:
        rows += [stream.role, [e.kind for e in stream.embeddings], len(stream.stages)]
        rows += [stream.final_norm and stream.final_norm.kind, stream.post_norm]
        for block in stream.blocks:
            rows += [block.parallel, block.shared_with]
            rows += [(w.kind, w.sign, where_norms(w)) for w in block.writes]
            rows += [len(w.branch.nodes) for w in block.writes]
            attns = [a for w in block.writes for a in w.attention]
            rows += [(a.heads, a.kv_heads, a.head_width, a.scale, a.rot_q is None) for a in attns]
            mlps = [w.mlp for w in block.writes if w.mlp is not None]
            rows += [(m.gated, m.activation, m.experts) for m in mlps]
    return rows


TOLD = [
    "pre-norm",
    "post-norm",
    "sandwich with scales",
    "parallel in brackets",
    "x0 and value mixing, additive skips",
    "skips by concatenation",
    "query and key norms, rotary, grouped",
    "best experts in a loop",
    "one block several times",
    "highway gates",
    "copies of the stream",
    "encoder and decoder",
]


def swapped(text: str) -> str:
    return text.replace("attn", "#").replace("mlp", "attn").replace("#", "mlp")


@pytest.mark.parametrize("name", TOLD)
def test_names_say_nothing(name: str) -> None:
    _, program, found = captured(name)
    bare = renamed(program, lambda i, _: f"w{i}", lambda _: "")
    lying = renamed(program, lambda _, old: swapped(old), swapped)
    assert described(structure(bare)) == described(found)
    assert described(structure(lying)) == described(found)
