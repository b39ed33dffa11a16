"""FoldLinear: two linear ops in a row become one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.fold_linear import FoldLinear
from surgery import (
    assert_again,
    assert_blamed,
    assert_equal,
    assert_goldens,
    assert_refused,
    assert_silent,
    chooser,
    linear,
)
from torch import fx

from lensfx import Pipeline, PipelineError, Program
from lensfx.rewrite import At

aten = torch.ops.aten
fold_linear = importlib.import_module("lensfx.passes.fold_linear")


def chain(*sizes: int, bias: bool = True, dtype: torch.dtype | None = None) -> Program:
    s = Sketch()
    x = s.input("x", "B", "T", sizes[0], dtype=dtype)
    for i, size in enumerate(sizes[1:]):
        x = linear(s, x, f"l{i}", size, bias)
    return s.done(x)


def pairs(d: int = 8) -> Program:
    """Three pairs on one stream, apart from each other."""
    s = Sketch()
    x = s.input("x", "B", "T", d)
    for i in range(3):
        y = linear(s, linear(s, x, f"{i}.a", d), f"{i}.b", d)
        x = s.call(aten.add.Tensor, x, s.call(aten.tanh.default, y))
    return s.done(x)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = chain(8, 6, 4)
    rewritten = assert_goldens(golden, "fold_linear", before, FoldLinear())
    assert [e.sites for e in rewritten.journal] == [(("linear_1", "linear_1"),)]
    assert_equal(before, Pipeline([FoldLinear(expect=1)]).run(before))


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8, 8), (8, 2, 4, 1), (1, 4, 2, 8), (5, 7, 6)])
def test_a_chain_becomes_as_few_as_its_sizes_allow(sizes: tuple[int, ...]) -> None:
    before = chain(*sizes)
    after = Pipeline([FoldLinear(grow=True, expect=len(sizes) - 2)]).run(before)
    assert_equal(before, after)
    assert len(after.tensors) == 2
    with pytest.raises(PipelineError, match="fold-linear fired"):
        Pipeline([FoldLinear(expect=9)]).run(before)


def test_every_reader_takes_it_up() -> None:
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 8), "a", 8)
    before = s.done(linear(s, y, "b", 3), linear(s, y, "c", 8, bias=False))
    after = Pipeline([FoldLinear(expect=1)]).run(before)
    assert_equal(before, after)
    assert not [k for k in after.tensors if k.startswith("a.")]


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_folding_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    dtype, d = of(torch.float32, torch.float64, torch.bfloat16), of(4, 6)
    x = s.input("x", of("B", 2, 1), of("T", 3, 1), d, dtype=dtype)
    # Sizes that coincide: only the order of the product tells one axis from the other.
    inner = linear(s, x, "a", of(d, 5), of(True, False))
    size = int(inner.meta["val"].shape[-1])
    views: tuple[tuple[Any, ...], ...] = of(
        (),
        ((aten.reshape.default, [-1, size]),),
        ((aten.transpose.int, 0, 1), (aten.unsqueeze.default, 1)),
        ((aten.unsqueeze.default, 0), (aten.squeeze.dim, 0), (aten.select.int, 1, -1)),
        ((aten.to.dtype, torch.float32), (aten.expand.default, [-1, -1, size])),
    )
    for view, *args in views:
        inner = s.call(view, inner, *args)
    outer = linear(s, inner, "b", of(d, 3), of(True, False))
    before = s.done(outer)
    assert_equal(before, Pipeline([FoldLinear(grow=True, expect=1)]).run(before))


def test_one_weight_used_twice_in_a_row() -> None:
    s = Sketch()
    x, W, b = s.input("x", "B", 8), s.weight("W", 8, 8), s.weight("b", 8)
    y = s.call(aten.linear.default, x, W, b)
    before = s.done(s.call(aten.linear.default, y, W, b))
    after = Pipeline([FoldLinear(expect=1)]).run(before)
    assert_equal(before, after)
    assert {f.text for f in after.formulas.values()} == {"mm(W, W)", "add(b, mv(W, b))"}


# refuses


def read_by(other: Callable[[Sketch, fx.Node], fx.Node]) -> Program:
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 8), "a", 8)
    return s.done(linear(s, y, "b", 8), other(s, y))


def test_refusals_name_who_forbids_it() -> None:
    words = "the product would hold 64 numbers where the factors hold 32; grow=True folds"
    assert_refused(chain(8, 2, 8), FoldLinear(), "linear", words)
    tanh = read_by(lambda s, y: s.call(aten.tanh.default, y))
    words = "the value that linear_1 reads is also read by tanh"
    assert_refused(tanh, FoldLinear(), "tanh", words)
    words = "the value that linear_1 reads is an output of the model"
    assert_refused(read_by(lambda s, y: y), FoldLinear(), "output", words)


def test_what_is_none_of_its_business() -> None:
    s = Sketch()
    y = s.call(aten.relu.default, linear(s, s.input("x", "B", 8), "a", 8))
    assert_silent(s.done(linear(s, y, "b", 8)), FoldLinear())
    s = Sketch()
    y = s.call(aten.slice.Tensor, linear(s, s.input("x", "B", 8), "a", 8), 1, 0, 4)
    assert_silent(s.done(linear(s, y, "b", 8)), FoldLinear())


# faults


Changed = dict[str, Any]
right = fold_linear.product


def wrong_order(at: At, inner: fx.Node, outer: fx.Node) -> Changed:
    W = at.call(aten.mm.default, inner.args[1], outer.args[1])
    return {**right(at, inner, outer), "weight": W}


def transposed(at: At, inner: fx.Node, outer: fx.Node) -> Changed:
    A = at.call(aten.t.default, inner.args[1])
    return {**right(at, inner, outer), "weight": at.call(aten.mm.default, outer.args[1], A)}


def bias_through_the_product(at: At, inner: fx.Node, outer: fx.Node) -> Changed:
    changed = right(at, inner, outer)
    Ba = at.call(aten.mv.default, changed["weight"], inner.args[2])
    return {**changed, "bias": at.call(aten.add.Tensor, outer.args[2], Ba)}


def twice(at: At, inner: fx.Node, outer: fx.Node) -> Changed:
    changed = right(at, inner, outer)
    return {**changed, "weight": at.call(aten.mm.default, outer.args[1], changed["weight"])}


FAULTS: dict[str, Callable[[At, fx.Node, fx.Node], Changed]] = {
    "wrong order": wrong_order,
    "transposed": transposed,
    "no inner bias": lambda at, i, o: {**right(at, i, o), "bias": o.args[2]},
    "no outer bias": lambda at, i, o: {
        **right(at, i, o),
        "bias": at.call(aten.mv.default, o.args[1], i.args[2]),
    },
    "bias as it is": lambda at, i, o: {
        **right(at, i, o),
        "bias": at.call(aten.add.Tensor, o.args[2], i.args[2]),
    },
    "bias through the product": bias_through_the_product,
    "folded twice": twice,
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_pair_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, inner: fx.Node, outer: fx.Node) -> Changed:
        here = f"'{place}.a'" in str(inner.meta["nn_module_stack"])
        return (FAULTS[fault] if here else right)(at, inner, outer)

    monkeypatch.setattr(fold_linear, "product", planted)
    assert_blamed(Pipeline([FoldLinear(expect=3)]).run(pairs()), f"{place}.a")


# again


@pytest.mark.parametrize("grow", [True, False])
def test_a_second_run_changes_nothing(grow: bool) -> None:
    for sizes in ((8, 8, 8), (8, 2, 4, 1), (1, 4, 2, 8), (8, 2, 8, 2, 8)):
        assert_again(chain(*sizes), FoldLinear(grow=grow))
    assert_again(pairs(), FoldLinear(grow=grow))
