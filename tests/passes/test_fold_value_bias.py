"""FoldValueBias: the bias of a value projection moves through attention."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.graph import dtype_of, graph_text, native_name
from lensfx.rewrite import Match
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.fold_value_bias")
FoldValueBias = module.FoldValueBias
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Attend = Callable[[Sketch, fx.Node, fx.Node, fx.Node], fx.Node]
HEADS, D = 2, 8


def linear(s: Sketch, x: fx.Node, name: str, out: int, bias: bool = True) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), dtype_of(x)
    W = s.weight(f"{name}.weight", out, size, dtype=dtype)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    return s.call(aten.linear.default, x, W, b, path=name)


def heads(s: Sketch, x: fx.Node, count: int = HEADS) -> fx.Node:
    width = int(x.meta["val"].shape[-1])
    split = s.call(aten.unflatten.int, x, -1, [count, width // count])
    return s.call(aten.transpose.int, split, 1, 2)


def fused(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node, **options: Any) -> fx.Node:
    return s.call(aten.scaled_dot_product_attention.default, q, k, v, **options)


def scores(s: Sketch, q: fx.Node, k: fx.Node) -> fx.Node:
    return s.call(aten.matmul.default, q, s.call(aten.transpose.int, k, -2, -1))


def written(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    p = s.call(aten.dropout.default, s.call(aten.softmax.int, scores(s, q, k), -1), 0.1, False)
    return s.call(aten.matmul.default, p, v)


def merged(s: Sketch, z: fx.Node) -> fx.Node:
    return s.call(aten.flatten.using_ints, s.call(aten.transpose.int, z, 1, 2), 2, 3)


def layer(
    s: Sketch,
    x: fx.Node,
    name: str = "h.0",
    attend: Attend = fused,
    form: str = "apart",
    biased: bool = True,
) -> fx.Node:
    """One attention: q, k and v apart, in one weight, or that interleaved head by head."""
    if form == "apart":
        q, k, v = (heads(s, linear(s, x, f"{name}.{k}", D)) for k in "qkv")
    elif form == "fused":
        pieces = s.call(aten.split.Tensor, linear(s, x, f"{name}.qkv", 3 * D), D, -1)
        q, k, v = (heads(s, s.call(operator.getitem, pieces, i)) for i in range(3))
    elif form == "interleaved":
        all_heads = heads(s, linear(s, x, f"{name}.qkv", 3 * D))
        q, k, v = (s.call(aten.slice.Tensor, all_heads, 3, 4 * i, 4 * i + 4) for i in range(3))
    else:
        q = heads(s, linear(s, x, f"{name}.q", D))
        k, v = (heads(s, linear(s, x, f"{name}.{n}", D // 2), 1) for n in "kv")
        k, v = (repeated(s, n, form) for n in (k, v))
    return linear(s, merged(s, attend(s, q, k, v)), f"{name}.o", D, biased)


def repeated(s: Sketch, x: fx.Node, form: str) -> fx.Node:
    if form == "repeat_interleave":
        return s.call(aten.repeat_interleave.self_int, x, HEADS, 1)
    if form == "expand":
        wide = s.call(aten.unsqueeze.default, x, 2)
        wide = s.call(aten.expand.default, wide, [-1, -1, HEADS, -1, -1])
        return s.call(aten.flatten.using_ints, wide, 1, 2)
    return x


def model(attend: Attend = fused, form: str = "apart", dtype: torch.dtype | None = None) -> Program:
    s = Sketch()
    return s.done(layer(s, s.input("x", "B", "T", D, dtype=dtype), "h.0", attend, form))


def stack(sites: int = 3) -> Program:
    s = Sketch()
    x = s.input("x", "B", "T", D)
    for i in range(sites):
        n = s.call(aten.layer_norm.default, x, [D], None, None, 1e-5, path=f"h.{i}.ln")
        form = ("apart", "fused", "interleaved")[i % 3]
        x = s.call(aten.add.Tensor, x, layer(s, n, f"h.{i}", form=form))
    return s.done(x)


def folded(program: Program, **options: Any) -> Program:
    return Pipeline([FoldValueBias(**options)]).run(program)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    s = Sketch()
    x = s.input("x", "B", "T", D)
    q, k = s.input("q", "B", "T", D), s.input("k", "B", "T", D)
    before = s.done(linear(s, fused(s, q, k, linear(s, x, "v", D)), "o", D))
    rewritten = Pipeline([FoldValueBias()]).rewrite(before)
    golden("fold_value_bias.before", graph_text(before.graph))
    golden("fold_value_bias.rewritten", graph_text(rewritten.graph))
    golden("fold_value_bias.after", graph_text(folded(before).graph))
    assert [e.root for e in rewritten.journal] == ["linear"]
    assert [c.value for c in rewritten.journal[0].changes] == [
        "linear",
        "scaled_dot_product_attention",
    ]
    assert {k: f.text for k, f in folded(before).formulas.items()} == {
        "o.bias": "add(o.bias, mv(o.weight, v.bias))"
    }


FORMS = ("apart", "fused", "interleaved", "expand", "repeat_interleave", "gqa")


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_heads(form: str) -> None:
    def grouped(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        return fused(s, q, k, v, enable_gqa=form == "gqa")

    before = model(grouped, form)
    after = folded(before, expect=1)
    assert_equal(before, after)
    held = after.tensors.get("h.0.qkv.bias")
    assert (held is not None) == (form in ("fused", "interleaved"))
    if held is not None:
        assert int((held == 0).sum()) == D
    assert "h.0.v.bias" not in after.tensors


def causal(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    return fused(s, q, k, v, is_causal=True)


def sized(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    n = s.call(aten.sym_size.int, q, 2)
    full = s.call(aten.ones.default, [n, n], dtype=torch.bool)
    return fused(s, q, k, v, attn_mask=s.call(aten.tril.default, full))


def capped(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    capped = s.call(aten.tanh.default, scores(s, q, k))
    masked = s.call(aten.add.Tensor, capped, s.input("bias", "T", "T"))
    return s.call(aten.matmul.default, s.call(aten.softmax.int, masked, -1), v)


FINE = {"causal": causal, "a mask of sizes": sized, "written": written, "capped": capped}


@pytest.mark.parametrize("case", FINE)
def test_attentions_whose_rows_sum_to_one(case: str) -> None:
    before = model(FINE[case])
    assert_equal(before, folded(before, expect=1))


def test_every_site_of_a_stack() -> None:
    before = stack()
    assert_equal(before, folded(before, expect=3))
    with pytest.raises(PipelineError, match="fold-value-bias fired 3 times, 4 expected"):
        folded(before, expect=4)


def test_a_bias_moves_on_from_one_attention_to_the_next() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", D)
    first = layer(s, x, "a", biased=False)
    q, k = (heads(s, linear(s, x, f"b.{n}", D)) for n in "qk")
    last = linear(s, merged(s, fused(s, q, k, heads(s, first))), "b.o", D)
    before = s.done(last)
    after = folded(before, expect=2)
    assert_equal(before, after)
    assert not {"a.v.bias", "a.o.bias"} & set(after.tensors)
    assert folded(after).reports[-1].fired == ()


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=8, max_size=8))
def test_folding_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    s = Sketch()
    x = s.input("x", of("B", 1, 2), of("T", 1, 3), D, dtype=of(*DTYPES))
    form, attend = of("apart", "fused", "interleaved", "expand"), of(fused, written, causal)
    before = s.done(layer(s, x, "h.0", attend, form, of(True, False)))
    assert_equal(before, folded(before, expect=1))


# refuses


def sink(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    more = s.call(aten.cat.default, [scores(s, q, k), s.input("sink", "B", HEADS, "T", 1)], -1)
    p = s.call(aten.softmax.int, more, -1)
    return s.call(aten.matmul.default, s.call(aten.slice.Tensor, p, 3, 0, -1), v)


def off_by_one(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    e = s.call(aten.exp.default, scores(s, q, k))
    total = s.call(aten.add.Scalar, s.call(aten.sum.dim_IntList, e, [-1], True), 1.0)
    return s.call(aten.matmul.default, s.call(aten.div.Tensor, e, total), v)


def gated(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    gate = s.input("gate", "B", HEADS, "T", D // HEADS)
    return s.call(aten.mul.Tensor, fused(s, q, k, v), gate)


def reweighted(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    p = s.call(aten.softmax.int, scores(s, q, k), -1)
    return s.call(aten.matmul.default, s.call(aten.mul.Tensor, p, s.weight("m", 1)), v)


def padded(s: Sketch, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    mask = s.call(aten.gt.Scalar, s.input("pad", "B", 1, 1, "T"), 0.0)
    return fused(s, q, k, v, attn_mask=mask)


REFUSED: dict[str, tuple[Attend, str, str]] = {
    "sink": (sink, "slice_1", "rows of %softmax are cut at %slice_1: they no longer sum to one"),
    "off by one": (
        off_by_one,
        "div",
        "%div (div) is no softmax: its rows need not add up to one",
    ),
    "gate": (
        gated,
        "mul",
        "%mul multiplies it by %gate, computed from the input: the shift would follow the gate",
    ),
    "reweighted": (
        reweighted,
        "mul",
        "rows of %softmax are changed by %mul (mul): they no longer sum to one",
    ),
    "padding": (
        padded,
        "scaled_dot_product_attention",
        "a row of %gt may allow no key (%pad decides): attention gives 0 there",
    ),
}


@pytest.mark.parametrize("form", ["apart", "fused"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, form: str) -> None:
    attend, blame, words = REFUSED[case]
    before = model(attend, form)
    after = folded(before)
    (refused,) = after.reports[-1].refused
    assert refused.reason == words
    assert refused.root.startswith("linear")
    assert refused.blame.startswith(f"%{blame}")
    assert graph_text(after.graph) == graph_text(before.graph)


def test_linear_ops_without_attention_are_none_of_its_business() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", D)
    y = linear(s, s.call(aten.gelu.default, linear(s, x, "up", 16)), "down", D)
    after = folded(s.done(linear(s, y, "head", 5)))
    assert (after.reports[-1].fired, after.reports[-1].refused) == ((), ())


def test_only_channels_that_nothing_else_reads_move() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", D)
    v = linear(s, x, "v", D)
    q, k = (linear(s, x, n, D) for n in "qk")
    seen = s.call(aten.tanh.default, s.call(aten.slice.Tensor, v, 2, 1, 4))
    before = s.done(linear(s, fused(s, q, k, v), "o", D), seen)
    after = folded(before, expect=1)
    assert_equal(before, after)
    assert (after.tensors["v.bias"] != 0).tolist() == [False, *[True] * 3, *[False] * 4]


# faults


def doubled(*given: Any) -> fx.Node:
    return right_add(*given[:-1], given[0].call(aten.mul.Tensor, given[-1], 2.0))


def negative(at: Any, r: Any, s: fx.Node) -> fx.Node:
    return at.call(aten.neg.default, right_add(at, r, s))


def rolled(at: Any, r: Any, s: fx.Node) -> fx.Node:
    return right_add(at, r, at.call(aten.roll.default, s, [1]))


def first_only(at: Any, r: Any, s: fx.Node) -> fx.Node:
    mask = at.call(aten.constant_pad_nd.default, at.call(aten.slice.Tensor, s, 0, 0, 1), [0, 7])
    return right_add(at, r, mask) if s.meta["val"].numel() == D else negative(at, r, s)


def nothing_left(m: Match, edit: Any, at: Any, b: fx.Node) -> tuple[fx.Node, None]:
    return right_taken(m, edit, at, b)[0], None


def still_there(m: Match, edit: Any, at: Any, b: fx.Node) -> tuple[fx.Node, fx.Node]:
    return right_taken(m, edit, at, b)[0], b


right_add, right_taken = module.add_to, module.taken
FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "twice": ("add_to", doubled),
    "wrong sign": ("add_to", negative),
    "another channel": ("add_to", rolled),
    "one channel": ("add_to", first_only),
    "the bias stays": ("taken", still_there),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_site_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = FAULTS[fault]
    right = getattr(module, name)

    def planted(*given: Any) -> Any:
        node = given[1].node if name == "add_to" else given[0].linear
        here = f"h.{place}." in str(node.meta["nn_module_stack"])
        return (wrong if here else right)(*given)

    monkeypatch.setattr(module, name, planted)
    with pytest.raises(ContractError) as caught:
        prove(folded(stack()))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("fold-value-bias broke its contract exact: ")
    assert f"  h.{place}." in second


def test_the_rest_of_a_fused_bias_must_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "taken", nothing_left)
    with pytest.raises(ContractError, match="fold-value-bias broke its contract exact"):
        prove(folded(model(form="fused")))


@pytest.mark.parametrize("case", ["sink", "reweighted", "padding"])
def test_rows_taken_for_whole_are_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = importlib.import_module("lensfx.analysis.reach_products")
    monkeypatch.setattr(products, "_weighted", lambda *_: None)
    monkeypatch.setattr(products, "attends_fully", lambda *_: "")
    with pytest.raises(ContractError, match="fold-value-bias broke its contract exact"):
        prove(folded(model(REFUSED[case][0])))


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (stack(), model(form="fused")):
        for run in (Pipeline([FoldValueBias()]).rewrite, Pipeline([FoldValueBias()]).run):
            after = run(before)
            again = run(after)
            assert (again.reports[-1].fired, again.reports[-1].refused) == ((), ())
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
    sources = {name for f in after.formulas.values() for name in f.sources}
    assert set(before.tensors) - set(after.tensors) <= sources
