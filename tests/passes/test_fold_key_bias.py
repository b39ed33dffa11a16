"""FoldKeyBias: what softmax takes out again need not be added."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from customs import TABLE, custom
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm
from lensfx.passes.fold_key_bias import FoldKeyBias
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.analysis import DeadBias
from lensfx.graph import dtype_of, graph_text, native_name
from lensfx.rewrite import At
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.fold_key_bias")


def linear(s: Sketch, x: fx.Node, name: str, out: int) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), dtype_of(x)
    W = s.weight(f"{name}.weight", out, size, dtype=dtype)
    return s.call(aten.linear.default, x, W, s.weight(f"{name}.bias", out, dtype=dtype), path=name)


def heads(s: Sketch, x: fx.Node, count: int) -> fx.Node:
    x = s.call(aten.unflatten.int, x, -1, [count, -1])
    return s.call(aten.transpose.int, x, 1, 2)


def attended(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node, **given: Any) -> fx.Node:
    z = s.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True, **given)
    return s.call(aten.flatten.using_ints, s.call(aten.transpose.int, z, 1, 2), 2)


def model(layers: int = 1, d: int = 8, **given: Any) -> Program:
    """Layers of attention with a projection for each of query, key and value, or one for all."""
    s, h = Sketch(), given.get("heads", 2)
    x = s.input("x", *given.get("sizes", ("B", "T")), d, dtype=given.get("dtype"))
    for i in range(layers):
        if given.get("fused"):
            qkv = linear(s, x, f"h.{i}.qkv", 3 * d)
            parts = [s.call(aten.slice.Tensor, qkv, 2, j * d, (j + 1) * d) for j in range(3)]
        else:
            parts = [linear(s, x, f"h.{i}.{n}", d) for n in "qkv"]
        x = attended(s, *(heads(s, p, h) for p in parts))
    return s.done(x)


def dropped(before: Program, **options: Any) -> Program:
    return Pipeline([FoldKeyBias(**options)]).run(before)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model()
    rewritten = Pipeline([FoldKeyBias()]).rewrite(before)
    golden("fold_key_bias.before", graph_text(before.graph))
    golden("fold_key_bias.after", graph_text(dropped(before).graph))
    (entry,) = rewritten.journal
    assert (entry.root, entry.note) == ("linear_1", "8 of 8 entries")
    assert entry.sites == ((("scaled_dot_product_attention",) * 2),)
    heads = "reshape(reshape(h.0.k.bias, [1, 1, 8]), [1, 1, 2, 4])"
    assert {c.value: c.shift.text for c in entry.changes if c.shift is not None} == {
        "linear_1": "reshape(h.0.k.bias, [1, 1, 8])",
        "unflatten_1": heads,
        "transpose_1": f"permute({heads}, [0, 2, 1, 3])",
    }


def test_the_keys_of_a_fused_projection(golden: Callable[[str, str], None]) -> None:
    before = model(fused=True)
    after = dropped(before, expect=1)
    golden("fold_key_bias.fused", graph_text(Pipeline([FoldKeyBias()]).rewrite(before).graph))
    assert_equal(before, after)
    bias = after.tensors["h.0.qkv.bias"].detach()
    assert (bias == 0).tolist() == [False] * 8 + [True] * 8 + [False] * 8
    assert torch.equal(bias[:8], before.tensors["h.0.qkv.bias"][:8])


@pytest.mark.parametrize("name", TABLE)
def test_keys_of_models_that_differ_in_one_thing(name: str) -> None:
    sites, entries = TABLE[name].dead
    passes = [CanonicalLinear(), CanonicalNorm(), FoldKeyBias(expect=sites)]
    after = Pipeline(passes).run(custom(name))
    assert prove(after).worst <= 1e-12
    assert {e.note for e in after.reports[-1].fired} <= {f"{entries} of 72 entries"}


def test_a_bias_that_softmax_over_queries_takes_out() -> None:
    s = Sketch()
    x = s.input("x", 2, 5, 8)
    q, k = linear(s, x, "q", 8), linear(s, x, "k", 8)
    scores = s.call(aten.matmul.default, q, s.call(aten.transpose.int, k, 1, 2))
    before = s.done(s.call(aten.softmax.int, scores, 1))
    after = dropped(before, expect=1)
    assert after.journal[0].path == "q"
    assert_equal(before, after)
    changes = {c.value: c.free for c in after.journal[0].changes if c.shift is None}
    assert changes == {"matmul": (1,)}


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_dropping_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    before = model(
        of(1, 2),
        of(4, 8),
        fused=of(True, False),
        heads=of(1, 2, 4),
        dtype=of(torch.float32, torch.float64, torch.bfloat16),
        sizes=of(("B", "T"), (1, "T"), ("B", 1), (2, 8)),
    )
    assert_equal(before, dropped(before))


def test_one_component_that_is_read_elsewhere_stays() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    q, k, v = (heads(s, linear(s, x, n, 8), 2) for n in "qkv")
    gate = s.call(aten.sigmoid.default, s.call(aten.select.int, k, 3, 1))
    before = s.done(attended(s, q, k, v), gate)
    after = dropped(before, expect=1)
    assert_equal(before, after)
    assert (after.tensors["k.bias"] == 0).tolist() == [True, False, True, True] * 2


# refuses


def turned(s: Sketch, k: fx.Node) -> fx.Node:
    positions = s.call(aten.sym_size.int, k, 2)
    angle = s.call(aten.unsqueeze.default, s.call(aten.arange.default, positions), 1)
    return s.call(aten.mul.Tensor, k, s.call(aten.cos.default, angle))


def normed(s: Sketch, k: fx.Node) -> fx.Node:
    return s.call(aten.rms_norm.default, k, [4], s.weight("g", 4), 1e-5)


def with_sink(s: Sketch, k: fx.Node) -> fx.Node:
    b = s.call(aten.sym_size.int, k, 0)
    sink = s.call(aten.expand.default, s.weight("sink", 1, 2, 1, 4), [b, -1, -1, -1])
    return s.call(aten.cat.default, [k, sink], 2)


REFUSED: dict[str, tuple[Callable[[Sketch, fx.Node], fx.Node], str]] = {
    "rotated": (turned, "compares the keys along axis 2, but the shift varies along axis 2"),
    "normed": (normed, "%rms_norm is a root-mean-square norm: it keeps the mean of axis 3"),
    "sink": (with_sink, "compares the keys along axis 2, but the shift varies along axis 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_who_sees_the_bias(case: str) -> None:
    change, reason = REFUSED[case]
    s = Sketch()
    x = s.input("x", 3, "T", 8)
    q, k, v = (heads(s, linear(s, x, n, 8), 2) for n in "qkv")
    v = with_sink(s, v) if case == "sink" else v
    z = s.call(aten.scaled_dot_product_attention.default, q, change(s, k), v)
    before = s.done(z)
    after = dropped(before)
    (refused,) = after.reports[-1].refused
    assert refused.root == "linear_1"
    assert reason in refused.reason
    assert graph_text(after.graph) == graph_text(before.graph)
    with pytest.raises(PipelineError, match="fold-key-bias fired 0 times, 1 expected"):
        dropped(before, expect=1)


# faults


right = module.without


def moved(at: At, b: fx.Node, entries: tuple[int, ...], by: int) -> fx.Node | None:
    count = int(b.meta["val"].shape[0])
    return right(at, b, tuple(sorted((e + by) % count for e in entries)))


FAULTS: dict[str, Callable[[At, fx.Node, tuple[int, ...]], fx.Node | None]] = {
    "all of it": lambda at, b, entries: None,
    "the queries": lambda at, b, entries: moved(at, b, entries, -8),
    "the values": lambda at, b, entries: moved(at, b, entries, 8),
    "one too many": lambda at, b, entries: right(at, b, (*entries, entries[-1] + 1)),
    "one too early": lambda at, b, entries: moved(at, b, entries, -1),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_projection_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, b: fx.Node, entries: tuple[int, ...]) -> fx.Node | None:
        here = str(b.target).startswith(f"h.{place}.")
        return (FAULTS[fault] if here else right)(at, b, entries)

    monkeypatch.setattr(module, "without", planted)
    with pytest.raises(ContractError) as caught:
        prove(dropped(model(layers=3, fused=True)))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("fold-key-bias broke its contract exact: ")
    assert f"  h.{place}.qkv  model.py:7" in second


@pytest.mark.parametrize("name", ["rope", "sinks", "score cap"])
def test_a_reader_that_is_overlooked_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(program: Program) -> Any:
        for linear in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            if linear.meta["val"].shape[-1] == 72:
                yield DeadBias(linear, tuple(range(24, 48)))

    monkeypatch.setattr(module, "dead_biases", blind)
    with pytest.raises(ContractError, match="fold-key-bias broke its contract exact"):
        prove(dropped(custom(name), expect=2))


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(), model(2, fused=True), model(fused=True, dtype=torch.bfloat16)):
        for run in (Pipeline([FoldKeyBias()]).rewrite, Pipeline([FoldKeyBias()]).run):
            after = run(before)
            again = run(after)
            assert (again.reports[-1].fired, again.reports[-1].refused) == ((), ())
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        lost = set(before.tensors) - set(after.tensors)
        assert all(name.endswith("k.bias") for name in lost)
