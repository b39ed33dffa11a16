"""Rows that sum to one: what keeps them, what cuts them, and masks that leave a row no key."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value
from torch import fx

from lensfx.analysis.masks import bounds, may_forbid_all
from lensfx.analysis.rows import Cut, Rows, attends_fully, rows
from lensfx.graph import hook_point

aten = torch.ops.aten
module = importlib.import_module("lensfx.analysis.rows")
Make = Callable[[Sketch, fx.Node], fx.Node]
MIN = torch.finfo(torch.float32).min


def part(s: Sketch, p: fx.Node, axis: int) -> fx.Node:
    return s.call(operator.getitem, s.call(aten.split.Tensor, p, 2, axis), 0)


def spread(s: Sketch, p: fx.Node) -> fx.Node:
    return s.call(aten.expand.default, s.call(aten.unsqueeze.default, p, 1), [-1, 3, -1, -1, -1])


# What is made of weights [B, 4, T, 6] after the softmax, the axis asked about, and the verdict.
KEPT: dict[str, tuple[Make, int]] = {
    "softmax": (lambda s, p: p, -1),
    "cast": (lambda s, p: s.call(aten.to.dtype, p, torch.float64), 3),
    "dropout": (lambda s, p: s.call(aten.dropout.default, p, 0.1, False), -1),
    "hook": (lambda s, p: s.call(hook_point, p, "pattern"), -1),
    "transpose": (lambda s, p: s.call(aten.transpose.int, p, 1, 3), 1),
    "permute": (lambda s, p: s.call(aten.permute.default, p, [3, 0, 1, 2]), 0),
    "expand": (spread, -1),
    "merged heads": (lambda s, p: s.call(aten.reshape.default, p, [-1, 5, 6]), -1),
    "split heads": (lambda s, p: s.call(aten.unflatten.int, p, 1, [2, 2]), -1),
    "some heads": (lambda s, p: part(s, p, 1), -1),
    "some queries": (lambda s, p: s.call(aten.slice.Tensor, p, 2, 1, 3), -1),
    "one query": (lambda s, p: s.call(aten.select.int, p, 2, -1), -1),
}
CUT: dict[str, tuple[Make, int, str]] = {
    "another axis": (lambda s, p: p, 2, "%softmax adds up to one along axis 3, not along axis 2"),
    "sink": (
        lambda s, p: s.call(aten.slice.Tensor, p, 3, 0, 5),
        -1,
        "rows of %softmax are cut at %slice_1: they no longer sum to one",
    ),
    "one key": (
        lambda s, p: s.call(aten.select.int, p, 3, 0),
        -1,
        "%softmax adds up to one along axis 3, not along axis 2",
    ),
    "some keys": (
        lambda s, p: part(s, p, 3),
        -1,
        "rows of %softmax are cut at %getitem: they no longer sum to one",
    ),
    "reweighted": (
        lambda s, p: s.call(aten.mul.Tensor, p, 2.0),
        -1,
        "rows of %softmax are changed by %mul (mul): they no longer sum to one",
    ),
    "masked": (
        lambda s, p: s.call(
            aten.masked_fill.Scalar, p, s.call(aten.gt.Scalar, s.input("m", 6), 0.0), 0.0
        ),
        -1,
        "rows of %softmax are changed by %masked_fill (masked_fill): they no longer sum to one",
    ),
    "not a number": (
        lambda s, p: s.call(aten.nan_to_num.default, p),
        -1,
        "rows of %softmax are changed by %nan_to_num (nan_to_num): they no longer sum to one",
    ),
    "dropped": (
        lambda s, p: s.call(aten.dropout.default, p, 0.1, True),
        -1,
        "rows of %softmax are changed by %dropout (dropout): they no longer sum to one",
    ),
    "split keys": (
        lambda s, p: s.call(aten.unflatten.int, p, 3, [2, 3]),
        -1,
        "rows of %softmax are changed by %unflatten (unflatten): they no longer sum to one",
    ),
    "whole numbers": (
        lambda s, p: s.call(aten.to.dtype, p, torch.int64),
        -1,
        "rows of %softmax are changed by %to (to): they no longer sum to one",
    ),
}


def weights(make: Make) -> tuple[Any, fx.Node]:
    s = Sketch()
    p = s.call(aten.softmax.int, s.input("x", "B", 4, 5, 6, dtype=torch.float64), -1)
    value = make(s, p)
    return s.done(value), value


@pytest.mark.parametrize("case", KEPT)
def test_rows_that_are_kept(case: str) -> None:
    make, axis = KEPT[case]
    program, value = weights(make)
    proof = rows(value, axis)
    assert isinstance(proof, Rows)
    assert proof.path[0] is value
    assert proof.path[-1] is proof.softmax
    total = every_value(program)[value.name].sum(axis)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CUT)
def test_rows_that_are_not(case: str) -> None:
    make, axis, words = CUT[case]
    _, value = weights(make)
    proof = rows(value, axis)
    assert isinstance(proof, Cut)
    assert proof.reason == words


def test_no_softmax_at_all() -> None:
    s = Sketch()
    y = s.call(aten.sigmoid.default, s.input("x", "B", 4))
    s.done(y)
    proof = rows(y, -1)
    assert isinstance(proof, Cut)
    assert proof.reason == "%sigmoid (sigmoid) is no softmax: its rows need not add up to one"


def causal(s: Sketch, x: fx.Node, diagonal: int = 0) -> fx.Node:
    n = s.call(aten.sym_size.int, x, 1)
    full = s.call(aten.ones.default, [n, n], dtype=torch.bool)
    return s.call(aten.tril.default, full, diagonal)


def additive(s: Sketch, mask: fx.Node, low: float) -> fx.Node:
    zeros = s.call(aten.zeros_like.default, mask, dtype=torch.float32)
    hidden = s.call(aten.logical_not.default, mask)
    return s.call(aten.masked_fill.Scalar, zeros, hidden, low)


def padding(s: Sketch) -> fx.Node:
    return s.call(aten.gt.Scalar, s.input("pad", "B", 1, "T"), 0.0)


DECIDES = "a row of %{} may allow no key (%pad decides): attention gives 0 there"
NONE = "a row of %{} allows no key at some sizes: attention gives 0 there"
MASKS: dict[str, tuple[Make, str]] = {
    "causal": (causal, ""),
    "the key before": (lambda s, x: causal(s, x, -1), NONE.format("tril")),
    "causal, added": (lambda s, x: additive(s, causal(s, x), float("-inf")), ""),
    "the key before, added": (
        lambda s, x: additive(s, causal(s, x, -1), float("-inf")),
        NONE.format("masked_fill"),
    ),
    "the key before, lowest number": (lambda s, x: additive(s, causal(s, x, -1), MIN), ""),
    "padding": (lambda s, x: padding(s), DECIDES.format("gt")),
    "padding and causal": (
        lambda s, x: s.call(aten.logical_and.default, causal(s, x), padding(s)),
        DECIDES.format("logical_and"),
    ),
    "padding, added": (
        lambda s, x: additive(s, padding(s), float("-inf")),
        DECIDES.format("masked_fill"),
    ),
    "padding, lowest number": (lambda s, x: additive(s, padding(s), MIN), ""),
    "padding, -1e4": (
        lambda s, x: s.call(
            aten.mul.Tensor, s.call(aten.to.dtype, padding(s), torch.float32), -1e4
        ),
        "",
    ),
    "the lowest number twice": (
        lambda s, x: s.call(
            aten.add.Tensor, additive(s, padding(s), MIN), additive(s, causal(s, x), MIN)
        ),
        DECIDES.format("add"),
    ),
    "a bias that is given": (
        lambda s, x: s.input("pad", "T", "T"),
        DECIDES.format("pad"),
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case: str) -> None:
    make, words = MASKS[case]
    s = Sketch()
    x = s.input("x", "B", "T", 4)
    mask = make(s, x)
    s.done(mask)
    assert may_forbid_all(mask) == words


def attention(dropout: float = 0.0, **options: Any) -> fx.Node:
    s = Sketch()
    x = s.input("x", "B", "T", 4)
    z = s.call(aten.scaled_dot_product_attention.default, x, x, x, None, dropout, **options)
    s.done(z)
    return z


def test_attention_without_a_mask() -> None:
    assert attends_fully(attention()) == ""
    assert attends_fully(attention(is_causal=True)) == ""
    words = "%scaled_dot_product_attention drops attention weights at random"
    assert attends_fully(attention(0.5)) == words


def test_bounds_hold_for_every_input() -> None:
    s = Sketch()
    x = s.input("x", "B", 4)
    seen = s.call(aten.gt.Scalar, x, 0.0)
    low = s.call(aten.where.ScalarSelf, seen, -3.0, s.call(aten.zeros_like.default, x))
    shifted = s.call(aten.rsub.Scalar, low, 1.0)
    s.done(shifted)
    assert bounds(low) == (-3.0, 0.0)
    assert bounds(shifted) == (1.0, 4.0)
    assert bounds(x) is None


# faults

FAULTS: dict[str, tuple[str, Any]] = {
    "a slice keeps row sums": ("sink", aten.slice.Tensor),
    "a product keeps row sums": ("reweighted", aten.mul.Tensor),
    "a fill keeps row sums": ("masked", aten.masked_fill.Scalar),
    "a split keeps row sums": ("some keys", operator.getitem),
    "dropout keeps row sums": ("dropped", aten.dropout.default),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_table_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, op = FAULTS[fault]
    right = module._before
    monkeypatch.setattr(
        module, "_before", lambda node, axis: axis if node.target is op else right(node, axis)
    )
    with pytest.raises((AssertionError, AttributeError)):
        test_rows_that_are_not(case)
