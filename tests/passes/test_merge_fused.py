"""MergeFused: linear ops with one input become one, and its pieces."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.merge_fused import MergeFused
from lensfx.passes.split_fused import SplitFused
from surgery import (
    assert_again,
    assert_blamed,
    assert_equal,
    assert_goldens,
    assert_silent,
    chooser,
    linear,
)
from torch import fx

from lensfx import Pipeline, Program
from lensfx.rewrite import At

aten = torch.ops.aten
merge_fused = importlib.import_module("lensfx.passes.merge_fused")


def stack(sites: int = 3, d: int = 8) -> Program:
    """Two linear ops on each value of a stream, one of them without a bias."""
    s = Sketch()
    x = s.input("x", "B", "T", d)
    for i in range(sites):
        q, k = linear(s, x, f"{i}.q", d), linear(s, x, f"{i}.k", d, bias=False)
        x = s.call(aten.mul.Tensor, s.call(aten.tanh.default, q), k)
    return s.done(x)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    rewritten = assert_goldens(golden, "merge_fused", stack(1), MergeFused())
    sites = [("linear", "slice_tensor"), ("linear_1", "slice_tensor_1")]
    assert [list(e.sites) for e in rewritten.journal] == [sites]


def test_every_site_and_only_the_named_modules() -> None:
    before = stack()
    assert_equal(before, Pipeline([MergeFused(expect=3)]).run(before))
    assert_equal(before, Pipeline([MergeFused(at=("1",), expect=1)]).run(before))
    assert_silent(before, MergeFused(at=("1.q", "1.k")))


def test_it_is_the_inverse_of_splitting() -> None:
    before = stack()
    # In one pipeline splitting comes first; here the merged program is where another one starts.
    merged = replace(Pipeline([MergeFused(expect=3)]).rewrite(before), reports=())
    split = Pipeline([SplitFused(expect=3)]).run(merged)
    assert_equal(before, split)
    again = Pipeline([MergeFused(expect=3)]).run(split)
    assert_equal(before, again)


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_merging_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    dtype = of(torch.float32, torch.float64, torch.bfloat16)
    x = s.input("x", of("B", 2, 1), of("T", 3, 1), 6, dtype=dtype)
    ys = [linear(s, x, name, of(6, 5), of(True, False)) for name in "qkv"]
    # The last weight is computed only after the first result has been read.
    y = s.call(aten.tanh.default, ys[0])
    W = s.call(aten.mul.Tensor, s.weight("late", 6, 6, dtype=dtype), 2.0)
    before = s.done(y, *ys[1:], s.call(aten.linear.default, x, W))
    assert_equal(before, Pipeline([MergeFused(expect=1)]).run(before))


def test_a_weight_read_twice_and_a_tied_one() -> None:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    x = s.call(aten.embedding.default, s.weight("e", 8, 8), ids)
    W = s.weight("head", 8, 8, like="e")
    y, z = (s.call(aten.linear.default, x, W) for _ in range(2))
    before = s.done(y, s.call(aten.tanh.default, z))
    after = Pipeline([MergeFused(expect=1)]).run(before)
    assert_equal(before, after)
    assert after.tensors["e"] is before.tensors["e"]


# refuses


def test_what_is_none_of_its_business() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    assert_silent(s.done(linear(s, linear(s, x, "a", 8), "b", 8)), MergeFused())
    s = Sketch()
    x, y = s.input("x", "B", 8), s.input("y", "B", 8)
    assert_silent(s.done(linear(s, x, "a", 8), linear(s, y, "b", 8)), MergeFused())
    s = Sketch()
    x = s.input("x", "B", 8)
    computed = s.call(aten.linear.default, x, s.call(aten.tanh.default, s.input("V", 8, 8)))
    assert_silent(s.done(linear(s, x, "a", 8), computed), MergeFused())


# faults


Pair = tuple[fx.Node, fx.Node | None]
Merge = Callable[[At, list[Any], list[Any]], Pair]
right: Merge = merge_fused.merged


def wrong_axis(at: At, weights: list[Any], biases: list[Any]) -> Pair:
    turned = [at.call(aten.t.default, W) for W in weights]
    return at.call(aten.cat.default, turned), right(at, weights, biases)[1]


FAULTS: dict[str, Merge] = {
    "other order": lambda at, W, b: right(at, W[::-1], b[::-1]),
    "weights in another order": lambda at, W, b: (right(at, W[::-1], b)[0], right(at, W, b)[1]),
    "biases in another order": lambda at, W, b: (right(at, W, b)[0], right(at, W, b[::-1])[1]),
    "no bias": lambda at, W, b: (right(at, W, b)[0], None),
    "one bias for all": lambda at, W, b: right(at, W, [b[0]] * len(W)),
    "wrong axis": wrong_axis,
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_site_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, weights: list[Any], biases: list[Any]) -> Pair:
        here = str(weights[0].target) == f"{place}.q.weight"
        return (FAULTS[fault] if here else right)(at, weights, biases)

    monkeypatch.setattr(merge_fused, "merged", planted)
    assert_blamed(Pipeline([MergeFused(expect=3)]).run(stack()), f"{place}.q")


# again


def test_a_second_run_changes_nothing() -> None:
    assert_again(stack(), MergeFused())
    merged = replace(Pipeline([MergeFused()]).run(stack()), reports=())
    assert_again(merged, SplitFused())
