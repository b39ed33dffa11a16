"""CanonicalLinear: every product with a weight over the last axis becomes `linear`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear
from torch import fx

from lensfx import ContractError, Lens, Pipeline, Program
from lensfx.graph import graph_text, is_op, native_name
from lensfx.rewrite import Edit, Match, Rule
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.canonical_linear")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Feed = Callable[[Sketch, fx.Node], fx.Node]


def program(feed: Feed, *sizes: int | str, dtype: torch.dtype | None = None) -> Program:
    s = Sketch()
    return s.done(feed(s, s.input("x", *(sizes or ("B", "T", 8)), dtype=dtype)))


def sizes(s: Sketch, x: fx.Node) -> list[Any]:
    """The sizes of all axes but the last, as the graph of a captured model has them."""
    fixed = enumerate(x.meta["val"].shape[:-1])
    return [n if isinstance(n, int) else s.call(aten.sym_size.int, x, i) for i, n in fixed]


def addmm(s: Sketch, x: fx.Node, name: str = "c", out: int = 6, **scales: float) -> fx.Node:
    d, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    b, V = (
        s.weight(f"{name}.bias", out, dtype=dtype),
        s.weight(f"{name}.weight", d, out, dtype=dtype),
    )
    rows = s.call(aten.reshape.default, x, [-1, d], path=name)
    y = s.call(aten.addmm.default, b, rows, V, path=name, **scales)
    return s.call(aten.reshape.default, y, [*sizes(s, x), out], path=name)


def matmul(s: Sketch, x: fx.Node, out: int = 6, bias: bool = True) -> fx.Node:
    d, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    y = s.call(aten.matmul.default, x, s.weight("V", d, out, dtype=dtype), path="m")
    return s.call(aten.add.Tensor, y, s.weight("b", out, dtype=dtype), path="m") if bias else y


def einsum(equation: str, *sizes: int, first: bool = False) -> Feed:
    def feed(s: Sketch, x: fx.Node) -> fx.Node:
        V = s.weight("E", *sizes, dtype=x.meta["val"].dtype)
        return s.call(aten.einsum.default, equation, [V, x] if first else [x, V], path="e")

    return feed


def stack(sites: int = 3) -> Program:
    """Square products on a stream, so that a transposed weight still fits."""
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    for i in range(sites):
        rows = s.call(aten.reshape.default, x, [-1, 8])
        V, b = s.weight(f"h.{i}.weight", 8, 8), s.weight(f"h.{i}.bias", 8)
        y = s.call(aten.addmm.default, b, rows, V, path=f"h.{i}")
        y = s.call(aten.reshape.default, s.call(aten.tanh.default, y), [*sizes(s, x), 8])
        x = s.call(aten.add.Tensor, x, y)
    return s.done(x)


def canonical(before: Program) -> Program:
    return Pipeline([CanonicalLinear()]).run(before)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


def products(after: Program) -> list[str]:
    return [str(n.target) for n in after.graph.nodes if is_op(n, *OTHERS)]


OTHERS = (aten.addmm.default, aten.matmul.default, aten.mm.default, aten.einsum.default)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = program(addmm)
    rewritten = Pipeline([CanonicalLinear()]).rewrite(before)
    golden("canonical_linear.before", graph_text(before.graph))
    golden("canonical_linear.rewritten", graph_text(rewritten.graph))
    golden("canonical_linear.after", graph_text(canonical(before).graph))
    # The product, then the reshapes around it.
    assert [e.root for e in rewritten.journal] == ["addmm", "reshape_1"]


SPELLINGS: dict[str, tuple[Feed, int]] = {
    "addmm": (addmm, 2),
    "matmul": (lambda s, x: matmul(s, x, bias=False), 1),
    "matmul and bias": (matmul, 2),
    "bias in front": (
        lambda s, x: s.call(aten.add.Tensor, s.weight("b", 6), matmul(s, x, bias=False)),
        2,
    ),
    "matrix product": (
        lambda s, x: s.call(
            aten.mm.default, s.call(aten.reshape.default, x, [-1, 8]), s.weight("V", 8, 6)
        ),
        1,
    ),
    "transposed weight": (
        lambda s, x: s.call(aten.matmul.default, x, s.call(aten.t.default, s.weight("W", 6, 8))),
        1,
    ),
    "computed weight": (
        lambda s, x: s.call(
            aten.matmul.default, x, s.call(aten.mul.Tensor, s.weight("V", 8, 6), s.weight("g", 6))
        ),
        1,
    ),
    "one vector": (lambda s, x: matmul(s, s.call(aten.select.int, x, 0, 0)), 2),
    "heads": (einsum("btd,dhk->bthk", 8, 2, 3), 1),
    "heads from the back": (einsum("btd,hkd->bthk", 2, 3, 8), 1),
    "weight first": (einsum("dk,btd->btk", 8, 6, first=True), 1),
    "two summed": (
        lambda s, x: einsum("bthk,hkd->btd", 2, 4, 6)(s, s.call(aten.unflatten.int, x, -1, [2, 4])),
        1,
    ),
    "summed the other way": (
        lambda s, x: einsum("bthk,khd->btd", 4, 2, 6)(s, s.call(aten.unflatten.int, x, -1, [2, 4])),
        1,
    ),
    "dots": (einsum("...d,kd->...k", 6, 8), 1),
    "no arrow": (einsum("abd,de", 8, 6), 1),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_each_spelling_becomes_linear(case: str) -> None:
    feed, fires = SPELLINGS[case]
    before = program(feed)
    after = canonical(before)
    assert products(after) == []
    assert len(after.journal) == fires
    assert_equal(before, after)


def test_reshapes_stay_where_the_result_has_other_axes() -> None:
    def feed(s: Sketch, x: fx.Node) -> fx.Node:
        rows = s.call(aten.reshape.default, x, [-1, 8])
        y = s.call(aten.linear.default, rows, s.weight("W", 6, 8))
        return s.call(aten.reshape.default, y, [2, -1, 6])

    before = program(feed, "B", 4, 8)
    assert canonical(before).journal == ()


def test_a_product_that_somebody_else_reads_keeps_its_reshapes_and_its_bias() -> None:
    def feed(s: Sketch, x: fx.Node) -> fx.Node:
        y = s.call(aten.matmul.default, x, s.weight("V", 8, 6))
        return s.call(aten.mul.Tensor, s.call(aten.add.Tensor, y, s.weight("b", 6)), y)

    before = program(feed)
    after = canonical(before)
    assert [e.root for e in after.journal] == ["matmul"]
    assert_equal(before, after)


# contract


@settings(max_examples=30)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_the_rewritten_products_are_the_same(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    s = Sketch()
    d, dtype = of(4, 6, 8), of(*DTYPES)
    out = of(d, 5)
    x = s.input("x", of("B", 1, 2), of("T", 1, 3), d, dtype=dtype)
    y = addmm(s, x, "a", out) if of(True, False) else matmul(s, x, out, of(True, False))
    z = einsum(*of(("btd,dhk->bthk", d, 2, 2), ("btd,hkd->bthk", d, d, d)))(s, x)
    W = s.weight("tied", d, out, dtype=dtype, like="V" if "V" in s.tensors else "")
    before = s.done(y, z, s.call(aten.matmul.default, x, W))
    after = canonical(before)
    assert products(after) == []
    assert_equal(before, after)


# refuses


REFUSED: dict[str, tuple[Feed, str, str]] = {
    "alpha": (
        lambda s, x: addmm(s, x, alpha=0.5),
        "addmm",
        "addmm scales its product by alpha=0.5",
    ),
    "beta": (lambda s, x: addmm(s, x, beta=2), "addmm", "addmm scales its bias by beta=2"),
    "repeated letters": (
        einsum("bdd,de->be", 8, 6),
        "einsum",
        "its equation repeats or broadcasts letters",
    ),
    "shared axis": (
        einsum("btd,td->bt", 8, 8),
        "einsum",
        "the weight shares the axis t with the result",
    ),
    "weight by position": (
        einsum("btd,tdk->btk", 8, 8, 6),
        "einsum",
        "the weight shares the axis t with the result",
    ),
    "summed by itself": (
        einsum("btd,dks->btk", 8, 6, 5),
        "einsum",
        "it sums over an axis that only one operand has",
    ),
    "summed in front": (
        einsum("btd,tk->bdk", 8, 6),
        "einsum",
        "it sums over axes that are not the last, or moves axes of the result",
    ),
    "moved": (
        einsum("btd,dhk->btkh", 8, 3, 3),
        "einsum",
        "it sums over axes that are not the last, or moves axes of the result",
    ),
    "repeated to fit": (
        einsum("btd,dk->btk", 1, 6),
        "einsum",
        "it sums over an axis that has another size in each operand",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason(case: str) -> None:
    feed, root, reason = REFUSED[case]
    before = program(feed, "B", 8, 8)
    after = canonical(before)
    refused = after.reports[-1].refused
    assert [(r.root, r.reason) for r in refused] == [(root, reason)]
    assert all(r.blame.startswith(f"%{root}  {r.path}") for r in refused)
    assert graph_text(after.graph) == graph_text(before.graph)


def mixed(s: Sketch, x: fx.Node) -> fx.Node:
    W = s.weight("W", 6, 8, dtype=torch.bfloat16)
    y = s.call(aten.linear.default, s.call(aten.to.dtype, x, torch.bfloat16), W)
    return s.call(aten.add.Tensor, y, s.weight("b", 6))


NOT_ITS_BUSINESS: dict[str, Feed] = {
    "computed values": lambda s, x: s.call(
        aten.matmul.default, x, s.call(aten.transpose.int, x, 1, 2)
    ),
    "a matrix of bias": lambda s, x: s.call(
        aten.addmm.default,
        s.weight("b", 8, 6),
        s.call(aten.select.int, x, 0, 0),
        s.weight("V", 8, 6),
    ),
    "stacked weights": lambda s, x: s.call(aten.matmul.default, x, s.weight("V", 2, 8, 6)),
    "weight on the left": lambda s, x: s.call(aten.matmul.default, s.weight("V", 5, 8), x),
    "weights alone": lambda s, x: s.call(
        aten.add.Tensor,
        x,
        s.call(aten.addmm.default, s.weight("b", 8), s.weight("P", 8, 8), s.weight("V", 8, 8)),
    ),
    "bias of another width": lambda s, x: s.call(
        aten.add.Tensor, s.call(aten.linear.default, x, s.weight("W", 6, 8)), s.weight("b", 1)
    ),
    "scaled bias": lambda s, x: s.call(
        aten.add.Tensor,
        s.call(aten.linear.default, x, s.weight("W", 6, 8)),
        s.weight("b", 6),
        alpha=2,
    ),
    "bias of another dtype": mixed,
}


@pytest.mark.parametrize("case", NOT_ITS_BUSINESS)
def test_what_is_no_product_with_a_weight_is_left_alone(case: str) -> None:
    before = program(NOT_ITS_BUSINESS[case], 2, 8, 8)
    after = canonical(before)
    assert (after.journal, after.reports[-1].refused) == ((), ())
    assert graph_text(after.graph) == graph_text(before.graph)


# faults


def not_transposed(m: Match, edit: Edit) -> None:
    at = edit.before(m.old)
    at.replace(m.old, at.call(aten.linear.default, m.x, m.V, m.b))


def no_bias(m: Match, edit: Edit) -> None:
    at = edit.before(m.old)
    at.replace(m.old, at.call(aten.linear.default, m.x, module.transposed(at, m.V)))


def twice_the_bias(m: Match, edit: Edit) -> None:
    at = edit.before(m.old)
    y = at.call(aten.linear.default, m.x, module.transposed(at, m.V), m.b)
    at.replace(m.old, at.call(aten.add.Tensor, y, m.b))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", [not_transposed, no_bias, twice_the_bias])
def test_a_fault_at_one_product_is_found_and_blamed_on_it(
    fault: Callable[[Match, Edit], None], place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "addmm" + (f"_{place}" if place else "")

    def planted(m: Match, edit: Edit) -> None:
        (fault if m.old.name == name else module.replace)(m, edit)

    rules = (Rule(module.ADDMM, module.unless_addmm, planted), *CanonicalLinear.rules[1:])
    monkeypatch.setattr(CanonicalLinear, "rules", rules)
    assert_blamed(canonical(stack()), f"at %{name}  h.{place}  model.py:7", f"{2 - place} of ")


def assert_blamed(after: Program, start: str, number: str = "") -> None:
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("canonical-linear broke its contract exact: %")
    assert second.strip().startswith(start)
    assert f"(rewrite {number}" in second


def test_alpha_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    always = Rule(module.ADDMM, lambda m: None, module.replace)
    monkeypatch.setattr(CanonicalLinear, "rules", (always,))
    assert_blamed(canonical(program(lambda s, x: addmm(s, x, alpha=0.5))), "at %addmm  c")
    assert_blamed(canonical(program(lambda s, x: addmm(s, x, beta=0.5))), "at %addmm  c")


def test_swapped_output_axes_of_one_size_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(m: Match, edit: Edit) -> None:
        plan = module.weight_einsum(m.old)
        at = edit.before(m.old)
        W = at.call(aten.permute.default, plan.weight, [plan.order[i] for i in (1, 0, 2)])
        W = at.call(aten.reshape.default, W, [plan.out, plan.summed])
        y = at.call(aten.linear.default, plan.x, W)
        at.replace(m.old, at.call(aten.unflatten.int, y, -1, list(plan.out_shape)))

    monkeypatch.setattr(
        CanonicalLinear, "rules", (Rule(module.EINSUM, module.unless_einsum, swapped),)
    )
    assert_blamed(canonical(program(einsum("btd,dhk->bthk", 8, 3, 3))), "at %einsum  e")


def test_rows_reordered_by_a_dropped_reshape_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Rule(module.WRAPPED, lambda m: None, module.replace)
    monkeypatch.setattr(CanonicalLinear, "rules", (wrong,))

    def feed(s: Sketch, x: fx.Node) -> fx.Node:
        mixed = s.call(aten.reshape.default, s.call(aten.transpose.int, x, 0, 1), [4, 4, 8])
        y = s.call(aten.linear.default, mixed, s.weight("W", 8, 8), path="q")
        return s.call(aten.reshape.default, y, [4, 4, 8], path="q")

    assert prove(canonical(program(feed, 4, 4, 8))).worst <= 1e-12

    def split(s: Sketch, x: fx.Node) -> fx.Node:
        y = s.call(aten.reshape.default, x, [4, 2, 4, 4])
        y = s.call(aten.linear.default, y, s.weight("W", 8, 4), path="q")
        return s.call(aten.reshape.default, y, [4, 4, 16], path="q")

    with pytest.raises(Exception, match=r"canonical-linear (makes a call|would change)"):
        canonical(program(split, 4, 4, 8))


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (stack(), *(program(feed) for feed, _ in SPELLINGS.values())):
        for run in (Pipeline([CanonicalLinear()]).rewrite, Pipeline([CanonicalLinear()]).run):
            after = run(before)
            again = run(after)
            assert again.reports[-1].fired == ()
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        sources = {name for f in after.formulas.values() for name in f.sources}
        assert read == set(after.tensors)
        assert set(before.tensors) - read <= sources
