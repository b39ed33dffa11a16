"""RefactorAttention: the weights of each circuit in the form that their SVD gives."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm
from lensfx.passes.refactor_attention import RefactorAttention
from models import CASES
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program, capture
from lensfx.graph import graph_text, native_name
from lensfx.rewrite import At
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.refactor_attention")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FUSED = aten.scaled_dot_product_attention.default
Step = Callable[[Sketch, fx.Node], fx.Node]


def linear(s: Sketch, x: fx.Node, name: str, out: int, bias: bool = True) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    W = s.weight(f"{name}.weight", out, size, dtype=dtype)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    return s.call(aten.linear.default, x, W, b, path=name)


def split(s: Sketch, x: fx.Node, heads: int) -> fx.Node:
    width = int(x.meta["val"].shape[-1]) // heads
    return s.call(aten.transpose.int, s.call(aten.unflatten.int, x, -1, [heads, width]), 1, 2)


def layer(s: Sketch, x: fx.Node, name: str, **given: Any) -> fx.Node:
    """One attention that reads x; `on` is put behind a projection, `fused` joins q, k and v."""
    heads, kv, d = given.get("heads", 2), given.get("kv", 2), int(x.meta["val"].shape[-1])
    width, bias = given.get("width", 3), given.get("bias", True)
    on: dict[str, Step] = given.get("on", {})
    sizes = [n * width for n in (heads, kv, kv)]
    if given.get("fused"):
        joined = linear(s, x, f"{name}.qkv", sum(sizes), bias)
        cut = s.call(aten.split_with_sizes.default, joined, sizes, -1)
        q, k, v = (s.call(operator.getitem, cut, i) for i in range(3))
    else:
        q, k, v = (
            linear(s, x, f"{name}.{n}", size, bias) for n, size in zip("qkv", sizes, strict=True)
        )
    q, k, v = (on.get(n, lambda s, y: y)(s, y) for n, y in zip("qkv", (q, k, v), strict=True))
    q, k, v = split(s, q, heads), split(s, k, kv), split(s, v, kv)
    if given.get("written"):
        scores = s.call(aten.matmul.default, q, s.call(aten.transpose.int, k, 2, 3), path=name)
        pattern = s.call(aten.softmax.int, s.call(aten.mul.Tensor, scores, 0.5), -1)
        z = s.call(aten.matmul.default, pattern, v)
    else:
        z = s.call(FUSED, q, k, v, is_causal=True, enable_gqa=heads != kv, path=name)
    z = s.call(aten.flatten.using_ints, s.call(aten.transpose.int, z, 1, 2), 2, 3)
    return linear(s, on.get("z", lambda s, y: y)(s, z), f"{name}.o", d, bias)


def model(layers: int = 1, d: int = 8, sizes: Any = ("B", "T"), **given: Any) -> Program:
    s = Sketch()
    x = s.input("x", *sizes, d, dtype=given.get("dtype"))
    for i in range(layers):
        x = s.call(aten.add.Tensor, x, layer(s, x, f"h.{i}", **given))
    return s.done(x)


def refactored(program: Program, **options: Any) -> Program:
    return Pipeline([RefactorAttention(**options)]).run(program)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model(d=4, heads=1, kv=1, written=True)
    golden("refactor_attention.before", graph_text(before.graph))
    rewritten = Pipeline([RefactorAttention()]).rewrite(before)
    golden("refactor_attention.rewritten", graph_text(rewritten.graph))
    golden("refactor_attention.after", graph_text(refactored(before).graph))
    assert [(e.root, e.note) for e in rewritten.journal] == [("matmul", "QK"), ("matmul", "OV")]
    assert [[new for _, new in e.sites] for e in rewritten.journal] == [["matmul"], ["linear_3"]]
    assert_equal(before, refactored(before))


def test_columns_are_orthogonal_and_in_order() -> None:
    after = refactored(model(bias=False, dtype=torch.float64), expect=2)
    one, other = (after.tensors[f"h.0.{n}.weight"].detach().unflatten(0, (2, 3)) for n in "qk")
    for W in (one, other):
        gram = W @ W.mT
        sizes = gram.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(gram, torch.diag_embed(sizes), rtol=0, atol=1e-12)
        assert bool((sizes.diff(dim=-1) <= 0).all())
    torch.testing.assert_close((one @ one.mT), (other @ other.mT))


CAPTURED = ["hf_gpt2", "hf_bert", "nanogpt", "nanogpt_vocab_is_width", "nanogpt_mlp_is_width",
            "nanogpt_shared_block", "encdec", "flat", "in_place"]  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_models(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(2, 5, 0)
    before = capture(case.build(), *args, **kwargs)
    after = Pipeline([CanonicalLinear(), CanonicalNorm(), RefactorAttention()]).run(before)
    assert len(after.reports[-1].fired) >= 4
    assert not after.reports[-1].refused
    assert_equal(before, after)


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_factoring_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    heads, kv = of((2, 2), (1, 1), (3, 3), (4, 2), (2, 1))
    before = model(
        layers=of(1, 2),
        d=of(8, 3),
        heads=heads,
        kv=kv,
        # Heads wider than the stream have no more rank than that.
        width=of(3, 4, 5),
        bias=of(True, False),
        fused=of(True, False),
        written=of(True, False) and heads == kv,
        dtype=of(*DTYPES),
        sizes=of(("B", "T"), (1, "T"), ("B", 1), (2, 3)),
    )
    after = refactored(before)
    assert not after.reports[-1].refused
    assert_equal(before, after)


def test_a_head_without_rank_stays_exact() -> None:
    before = model(dtype=torch.float64)
    for name in ("h.0.q.weight", "h.0.v.weight"):
        before.tensors[name].data[1:3] = 0
    before.tensors["h.0.k.weight"].data[:] = before.tensors["h.0.k.weight"].data[:1].clone()
    after = refactored(before, expect=2)
    # The proof also compares gradients of the old weights, which the SVD has none of here.
    assert check(before, Lens(after)).error <= 1e-12
    assert check(before, after, inputs=[torch.randn(1, 1, 8, dtype=torch.float64)]).error <= 1e-12


def test_what_was_there_follows_from_what_is_there() -> None:
    before = model(dtype=torch.float64, fused=True)
    after = refactored(before)
    held, now = every_value(before), every_value(after)
    lens = Lens(after)
    for name in ("linear", "transpose", "transpose_1", "transpose_2"):
        if isinstance(now.get(name), torch.Tensor):
            torch.testing.assert_close(now[name].shape, held[name].shape)
    q, v = lens.to_raw("h.0.qkv.linear", now["linear"]), held["linear"]
    torch.testing.assert_close(q, v)


# refuses


def turned(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.mul.Tensor, x, s.weight("cos", int(x.meta["val"].shape[-1])))


def normed(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.rms_norm.default, x, [int(x.meta["val"].shape[-1])], None, 1e-5)


OWN = "each channel is multiplied by a number of its own: rotary, a gate"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "rotary": ({"on": {"q": turned}}, "mul", OWN),
    "key norm": ({"on": {"k": normed}}, "rms_norm",
                 "no rule for rms_norm at %rms_norm; nothing is assumed"),
    "value gate": ({"on": {"v": turned}}, "mul", OWN),
    "output gate": ({"on": {"z": turned}}, "mul", OWN),
    "output norm": ({"on": {"z": normed}}, "rms_norm",
                    "no rule for rms_norm at %rms_norm; nothing is assumed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_who_stands_between(case: str) -> None:
    given_, blame, reason = REFUSED[case]
    before = model(**given_)
    after = refactored(before, expect=1)
    refused = after.reports[-1].refused
    assert [(r.blame.split()[0], r.reason) for r in refused] == [(f"%{blame}", reason)]
    assert_equal(before, after)


def test_another_reader_of_a_head_forbids_it() -> None:
    for reader in ("q", "v"):
        s = Sketch()
        x = s.input("x", "B", "T", 8)
        kept: list[fx.Node] = []
        also: dict[str, Step] = {reader: lambda s, y, kept=kept: (kept.append(y), y)[1]}  # type: ignore[dict-item, misc]
        out = layer(s, x, "h.0", on=also)
        before = s.done(out, s.call(aten.tanh.default, kept[0]))
        after = refactored(before, expect=1)
        (refused,) = after.reports[-1].refused
        assert (refused.blame, refused.reason) == ("%tanh", "tanh reads channels of it as well")
        assert_equal(before, after)


def test_a_wrong_count_is_an_error() -> None:
    with pytest.raises(PipelineError, match="refactor-attention fired 2 times, 5 expected"):
        refactored(model(), expect=5)


# faults

right = module.factors
Pair = tuple[fx.Node, fx.Node]


def another_order(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    one, other = right(at, X, Y)
    return at.call(aten.flip.default, one, [-1]), other


def unscaled(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    return right(at, X, Y)[0], Y


def one_head(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    one, other = right(at, X, Y)
    return at.call(aten.flip.default, one, [0]), other


def signs(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    one, other = right(at, X, Y)
    return at.call(aten.abs.default, one), other


def last_direction(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    one, other = right(at, X, Y)
    cut = at.call(aten.slice.Tensor, other, -1, 0, 2)
    return one, at.call(aten.constant_pad_nd.default, cut, [0, 1])


def slightly_off(at: At, X: fx.Node, Y: fx.Node) -> Pair:
    one, other = right(at, X, Y)
    return one, at.call(aten.mul.Tensor, other, 1 + 1e-9)


FAULTS = {
    f.__name__: ("factors", f)
    for f in (another_order, unscaled, one_head, signs, last_direction, slightly_off)
}


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_circuit_is_found_and_blamed_on_it(
    fault: str, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, instead = FAULTS[fault]
    calls: list[int] = []

    def planted(at: At, X: fx.Node, Y: fx.Node) -> Pair:
        calls.append(1)
        return (instead if (len(calls) - 1) % 4 == 2 + kind else right)(at, X, Y)

    monkeypatch.setattr(module, name, planted)
    # With biases the two sides of a circuit have the same shape.
    after = refactored(model(layers=2, written=True), expect=4)
    monkeypatch.setattr(module, name, planted)
    calls.clear()
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("refactor-attention broke its contract exact: ")
    assert "h.1" in second


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(), model(fused=True, written=True, dtype=torch.bfloat16)):
        after = refactored(before)
        again = refactored(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        assert read == set(after.tensors) == set(before.tensors)
