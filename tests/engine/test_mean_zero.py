"""What has mean zero along an axis: each rule against its operator, then whole values."""

from __future__ import annotations

import importlib
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import Draw, drawn, graph_of, op
from graphs import Once, Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lensfx import Pipeline, Program
from lensfx.analysis import mean_parts, mean_sources
from lensfx.analysis.constants import Constants
from lensfx.analysis.transfer import TABLE
from lensfx.graph import is_op
from lensfx.rewrite import Edit, Match, Op, Param

aten = torch.ops.aten
module = importlib.import_module("lensfx.analysis.mean_zero")
TARGETS = [t for t, family in TABLE.items() if family.name in module._RULES]


def label(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def holds(target: Any, d: Draw) -> bool:
    """Check one random call along one axis; False where the rule says nothing."""
    args, kwargs = drawn(target, d)
    call, place = graph_of(target, args, kwargs)
    val = call.meta["val"]
    node = call
    if isinstance(val, tuple | list):
        part = d.int(0, len(val) - 1)
        node = call.graph.call_function(operator.getitem, (call, part))
        node.meta["val"] = val[part]
    out = node.meta["val"]
    if out.ndim == 0 or not out.is_floating_point() or not out.numel():
        return False
    axis = d.int(0, out.ndim - 1)
    parts = mean_parts(node, axis, Constants())
    if parts is None:
        return False
    wanted: dict[fx.Node, set[int]] = {}
    for value, at in parts:
        wanted.setdefault(value, set()).add(at)

    def centred(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        for at in wanted.get(place(t), ()):
            t = t - t.mean(at, keepdim=True)
        return t

    given_args, given_kwargs = pytree.tree_map(centred, (tuple(args), kwargs))
    after = target(*given_args, **given_kwargs)
    after = after if isinstance(after, Tensor) else after[node.args[1]]
    mean = after.to(torch.float64).mean(axis).nan_to_num(0.0, 0.0, 0.0).abs().max()
    size = after.to(torch.float64).nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0)
    # A row of nothing but rounding is blown up where the norm has the eps of its dtype.
    assert mean <= (1e-7 if target is aten.rms_norm.default else 1e-12) * size
    return True


def tries(target: Any, count: int = 200) -> int:
    return sum(holds(target, Draw(random.Random(seed).randint)) for seed in range(count))


@pytest.mark.parametrize("target", TARGETS, ids=label)
@settings(max_examples=25)
@given(data=st.data())
def test_rule(target: Any, data: st.DataObject) -> None:
    holds(target, Draw(lambda low, high: data.draw(st.integers(low, high))))


# The calls that are drawn of these add or fill in another number than 0, or give a single one.
SILENT = {
    op(n) for n in "dot sum mean add.Scalar sub.Scalar rsub.Scalar masked_fill.Tensor".split()
}


@pytest.mark.parametrize("target", TARGETS, ids=label)
def test_every_rule_says_something(target: Any) -> None:
    assert tries(target) or target in SILENT


FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "a gain keeps the mean away": ("mul", "mul.Tensor", lambda a: a.of(a.arg("self"))),
    "a norm with a gain has no mean": ("layer norm", "layer_norm", lambda a: []),
    "a root-mean-square norm takes it out": ("rms norm", "rms_norm", lambda a: []),
    "a merged axis asks for nothing": ("reshape", "reshape", lambda a: []),
    "a bias is forgotten": ("linear", "linear", lambda a: [(a.arg("weight"), 0)]),
    "a mask keeps it": ("mask", "masked_fill.Scalar", lambda a: a.of(a.arg("self"))),
    "padding keeps it": ("pad", "pad", lambda a: [(a.source, a.axis)]),
    "a number keeps it": ("add", "add.Scalar", lambda a: a.of(a.arg("self"))),
    "a slice keeps it": ("same axes", "slice.Tensor", lambda a: [(a.source, a.axis)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, name, rule = FAULTS[fault]
    monkeypatch.setitem(module._RULES, family, rule)
    with pytest.raises(AssertionError):
        tries(op(name))


# whole values


def values(make: Callable[[Sketch, fx.Node], fx.Node]) -> tuple[Program, fx.Node]:
    s = Sketch()
    y = make(s, s.input("x", "B", "T", 8))
    return s.done(y), y


def centred(s: Sketch, x: fx.Node, axis: int = -1) -> fx.Node:
    return s.call(aten.sub.Tensor, x, s.call(aten.mean.dim, x, [axis], True))


def stream(s: Sketch, x: fx.Node) -> fx.Node:
    W, b = centred(s, s.weight("W", 8, 8), 0), centred(s, s.weight("b", 8))
    y = s.call(aten.linear.default, x, W, b)
    table = centred(s, s.weight("E", 5, 8), 1)
    rows = s.call(aten.embedding.default, table, s.input("ids", "B", "T", dtype=torch.int64))
    return s.call(aten.add.Tensor, rows, s.call(aten.mul.Tensor, y, 0.5))


def test_sources_of_a_stream() -> None:
    _, y = values(stream)
    assert mean_sources(y, -1) == ()
    _, y = values(lambda s, x: s.call(aten.add.Tensor, stream(s, x), x))
    assert [n.name for n in mean_sources(y, -1)] == ["x"]
    _, y = values(lambda s, x: s.call(aten.add.Tensor, centred(s, x), s.weight("p", 8)))
    assert [n.name for n in mean_sources(y, -1)] == ["add"]


def test_what_is_taken_for_centred() -> None:
    def make(s: Sketch, x: fx.Node) -> fx.Node:
        return s.call(aten.linear.default, x, s.weight("W", 8, 8), s.weight("b", 8))

    _, y = values(make)
    W, b = y.args[1:]
    assert mean_sources(y, -1) == (y,)
    assert mean_sources(y, -1, centred=[(W, y)]) == (y,)
    assert mean_sources(y, -1, centred=[(W, y), (b, y)]) == ()


def take_mean(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    W = at.call(aten.sub.Tensor, m.W, at.call(aten.mean.dim, m.W, [0], True))
    at.set(m.root, weight=W)


def test_a_folded_weight_is_known_by_its_formula_only() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    before = s.done(s.call(aten.linear.default, x, s.weight("W", 8, 8)))
    rule = Once(pattern=Op("op", (aten.linear.default,), {"weight": Param("W")}), rewrite=take_mean)
    after = Pipeline([rule]).run(before)
    (linear,) = [n for n in after.graph.nodes if is_op(n, aten.linear.default)]
    assert mean_sources(linear, -1) == (linear,)
    assert mean_sources(linear, -1, formulas=after.formulas) == ()


def test_long_chains_need_no_deep_stack() -> None:
    graph = fx.Graph()
    value = first = graph.placeholder("x")
    first.meta["val"] = torch.ones(2, 3)
    for _ in range(20_000):
        value = graph.call_function(aten.add.Tensor, (value, value))
        value.meta["val"] = first.meta["val"]
    assert mean_sources(value, 1) == (first,)
