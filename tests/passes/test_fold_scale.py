"""FoldScale: what the result of a linear op is multiplied by goes into its weight and bias."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.fold_scale import FoldScale
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

from lensfx import Pipeline, Program
from lensfx.rewrite import At

aten = torch.ops.aten
fold_scale = importlib.import_module("lensfx.passes.fold_scale")


def stack(sites: int = 3, d: int = 8, dtype: Any = None) -> Program:
    """Layer scales, one on each branch of a stream."""
    s = Sketch()
    x = s.input("x", "B", "T", d, dtype=dtype)
    for i in range(sites):
        y = linear(s, s.call(aten.tanh.default, x), f"{i}.a", d)
        y = s.call(aten.mul.Tensor, y, s.weight(f"{i}.scale", d, dtype=dtype))
        x = s.call(aten.add.Tensor, x, y)
    return s.done(x)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    rewritten = assert_goldens(golden, "fold_scale", stack(1), FoldScale())
    assert [e.sites for e in rewritten.journal] == [(("mul", "linear_default"),)]


def test_every_site() -> None:
    before = stack()
    after = Pipeline([FoldScale(expect=3)]).run(before)
    assert_equal(before, after)
    assert not [k for k in after.tensors if "scale" in k]


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_folding_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    dtype, d = of(torch.float32, torch.float64, torch.bfloat16), of(4, 8)
    x = s.input("x", of("B", 2, 1), of("T", 3, 1), d, dtype=dtype)
    y = linear(s, x, "a", 8, of(True, False))
    c = s.weight("c", *of((), (1,), (8,), (1, 1, 8)), dtype=dtype)
    y = s.call(of(aten.mul.Tensor, aten.div.Tensor), y, c)
    y = s.call(aten.mul.Tensor, s.weight("e", dtype=torch.float32), y)
    y = s.call(aten.transpose.int, s.call(aten.unflatten.int, y, -1, [2, 4]), 1, 2)
    y = s.call(aten.neg.default, s.call(aten.mul.Tensor, y, 0.5))
    before = s.done(y)
    assert_equal(before, Pipeline([FoldScale(expect=1)]).run(before))


def test_a_wider_scale_and_a_weight_used_twice() -> None:
    s = Sketch()
    x = s.input("x", "B", 8, dtype=torch.bfloat16)
    y = linear(s, x, "a", 8)
    z = s.call(aten.linear.default, s.call(aten.tanh.default, y), *y.args[1:])
    before = s.done(s.call(aten.mul.Tensor, z, s.weight("c", 8)))
    after = Pipeline([FoldScale(expect=1)]).run(before)
    assert_equal(before, after)
    assert after.tensors["a.weight"] is before.tensors["a.weight"]


# refuses


def test_a_bare_result_that_somebody_reads_is_refused() -> None:
    s = Sketch()
    y = linear(s, s.input("x", "B", 8), "a", 8)
    z = s.call(aten.mul.Tensor, y, s.weight("c", 8))
    before = s.done(z, s.call(aten.tanh.default, y))
    words = "mul scales linear, which is also read by tanh"
    assert_refused(before, FoldScale(), "tanh", words)
    s = Sketch()
    y = linear(s, s.input("x", "B", 8), "a", 8)
    z = s.call(aten.mul.Tensor, y, s.weight("c", 8))
    words = "mul scales linear, which is an output"
    assert_refused(s.done(z, y), FoldScale(), "output", words)


@pytest.mark.parametrize("sizes", [(8, 1), (8, 8)])
def test_what_is_none_of_its_business(sizes: tuple[int, ...]) -> None:
    # One number for each position, as many positions as channels.
    s = Sketch()
    y = linear(s, s.input("x", "B", 8, 8), "a", 8)
    assert_silent(s.done(s.call(aten.mul.Tensor, y, s.weight("c", *sizes))), FoldScale())
    s = Sketch()
    y = s.call(aten.transpose.int, linear(s, s.input("x", "B", 8, 8), "a", 8), 1, 2)
    assert_silent(s.done(s.call(aten.mul.Tensor, y, s.weight("c", 8))), FoldScale())
    s = Sketch()
    x = s.input("x", "B", 8)
    gate = s.call(aten.sigmoid.default, x)
    assert_silent(s.done(s.call(aten.mul.Tensor, linear(s, x, "a", 8), gate)), FoldScale())


# faults


Fold = Callable[[At, Any, Any, fx.Node, Any], tuple[Any, Any]]
right: Fold = fold_scale.times


def columns(at: At, target: Any, c: Any, W: fx.Node, b: Any) -> tuple[Any, Any]:
    return at.call(target, W, c), right(at, target, c, W, b)[1]


def other_target(at: At, target: Any, c: Any, W: fx.Node, b: Any) -> tuple[Any, Any]:
    return right(at, aten.div.Tensor, c, W, b)


FAULTS: dict[str, Fold] = {
    "bias forgotten": lambda at, t, c, W, b: (right(at, t, c, W, b)[0], b),
    "weight forgotten": lambda at, t, c, W, b: (W, right(at, t, c, W, b)[1]),
    "columns": columns,
    "divided": other_target,
    "folded twice": lambda at, t, c, W, b: right(at, t, c, *right(at, t, c, W, b)),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_scale_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, target: Any, c: Any, W: fx.Node, b: Any) -> tuple[Any, Any]:
        here = str(W.target) == f"{place}.a.weight"
        return (FAULTS[fault] if here else right)(at, target, c, W, b)

    monkeypatch.setattr(fold_scale, "times", planted)
    assert_blamed(Pipeline([FoldScale(expect=3)]).run(stack()), f"{place}.a")


# again


def test_a_second_run_changes_nothing() -> None:
    assert_again(stack(), FoldScale())
