"""SplitFused: a linear op that is read in pieces becomes a linear op for each piece."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.split_fused import SplitFused
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
split_fused = importlib.import_module("lensfx.passes.split_fused")
SLICE = aten.slice.Tensor
KINDS = ("side by side", "by head", "stacked", "stacked first", "grouped")
H, K = 2, 4


def qkv(s: Sketch, x: fx.Node, kind: str, name: str = "qkv", bias: bool = True) -> list[fx.Node]:
    """Queries, keys and values [b, h, t, k] of a fused projection, laid out in one of five ways."""
    y = linear(s, x, name, (4 if kind == "grouped" else 3) * H * K, bias)
    if kind == "side by side":
        whole = s.call(aten.split.Tensor, y, H * K, -1)
        parts = [s.call(operator.getitem, whole, i) for i in range(3)]
        return [
            s.call(aten.transpose.int, s.call(aten.unflatten.int, p, -1, [H, K]), 1, 2)
            for p in parts
        ]
    if kind == "by head":
        y = s.call(aten.transpose.int, s.call(aten.unflatten.int, y, -1, [H, 3 * K]), 1, 2)
        return [s.call(SLICE, y, 3, i * K, (i + 1) * K) for i in range(3)]
    if kind == "stacked":
        y = s.call(aten.unflatten.int, y, -1, [H, 3, K])
        parts = [s.call(aten.select.int, y, 3, i) for i in range(3)]
        return [s.call(aten.transpose.int, p, 1, 2) for p in parts]
    if kind == "stacked first":
        y = s.call(aten.reshape.default, y, [s.call(aten.sym_size.int, x, 0), -1, 3, H, K])
        whole = s.call(aten.unbind.int, s.call(aten.permute.default, y, [2, 0, 3, 1, 4]))
        return [s.call(operator.getitem, whole, i) for i in range(3)]
    y = s.call(aten.unflatten.int, y, -1, [H, 4, K])
    q = s.call(aten.flatten.using_ints, s.call(SLICE, y, 3, 0, 2), 2, 3)
    kv = [s.call(aten.select.int, y, 3, i) for i in (2, 3)]
    kv = [s.call(aten.repeat_interleave.self_int, p, 2, 2) for p in kv]
    return [s.call(aten.transpose.int, p, 1, 2) for p in (q, *kv)]


def attend(s: Sketch, parts: list[fx.Node]) -> fx.Node:
    return s.call(aten.scaled_dot_product_attention.default, *parts)


def one(kind: str, dtype: torch.dtype | None = None) -> Program:
    s = Sketch()
    return s.done(attend(s, qkv(s, s.input("x", "B", "T", H * K, dtype=dtype), kind)))


def three(kind: str = "stacked") -> Program:
    s = Sketch()
    x = s.input("x", "B", "T", H * K)
    return s.done(*(attend(s, qkv(s, x, kind, f"{i}.qkv")) for i in range(3)))


def gated(s: Sketch, y: fx.Node) -> fx.Node:
    gate, up = s.call(SLICE, y, -1, 0, 6), s.call(SLICE, y, -1, 6, 12)
    return s.call(aten.mul.Tensor, s.call(aten.silu.default, gate), up)


# fires


@pytest.mark.parametrize("kind", ["side by side", "by head"])
def test_the_smallest_graph(kind: str, golden: Callable[[str, str], None]) -> None:
    rewritten = assert_goldens(
        golden, f"split_fused.{kind.replace(' ', '_')}", one(kind), SplitFused()
    )
    assert len(rewritten.journal[0].sites) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(kind: str) -> None:
    before = one(kind)
    after = Pipeline([SplitFused(expect=1)]).run(before)
    assert_equal(before, after)
    assert len(after.tensors) == 6
    assert sum(t.numel() for t in after.tensors.values()) == sum(
        t.numel() for t in before.tensors.values()
    )


def test_gate_and_up_and_a_part_of_a_part() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 6)
    before = s.done(gated(s, linear(s, x, "gate_up", 12)))
    assert_equal(before, Pipeline([SplitFused(expect=1)]).run(before))
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 6), "qkv", 12)
    q, kv = s.call(SLICE, y, -1, 0, 4), s.call(SLICE, y, -1, 4, 12)
    k, v = s.call(SLICE, kv, -1, 0, 4), s.call(SLICE, kv, -1, 4, 8)
    before = s.done(q, k, v)
    after = Pipeline([SplitFused(expect=1)]).run(before)
    assert_equal(before, after)
    assert len(after.tensors) == 6


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_splitting_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    dtype = of(torch.float32, torch.float64, torch.bfloat16)
    x = s.input("x", of("B", 2, 1), of("T", 3, 1), H * K, dtype=dtype)
    before = s.done(attend(s, qkv(s, x, of(*KINDS), bias=of(True, False))))
    assert_equal(before, Pipeline([SplitFused(expect=1)]).run(before))


def test_a_projection_used_twice() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 6)
    y = linear(s, x, "a", 12)
    z = s.call(aten.linear.default, gated(s, y), *y.args[1:])
    before = s.done(gated(s, z))
    assert_equal(before, Pipeline([SplitFused(expect=2)]).run(before))


# refuses


def test_refusals_name_who_reads_the_whole() -> None:
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 6), "a", 12)
    before = s.done(gated(s, y), s.call(aten.tanh.default, y))
    words = "slice_1 is a part of linear, but tanh reads it whole (tanh)"
    assert_refused(before, SplitFused(), "tanh", words)
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 6), "a", 12)
    words = "slice_1 is a part of linear, but output is an output"
    assert_refused(s.done(gated(s, y), y), SplitFused(), "output", words)


def test_what_is_none_of_its_business() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 6)
    assert_silent(s.done(s.call(aten.tanh.default, linear(s, x, "a", 12))), SplitFused())
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 6), "a", 12)
    assert_silent(s.done(s.call(SLICE, y, 2, 0, 4)), SplitFused())
    # The parts of a partial rotary embedding stand side by side again: they are one value.
    s = Sketch()
    y = linear(s, s.input("x", "B", "T", 6), "a", 8)
    turned = s.call(aten.tanh.default, s.call(SLICE, y, 2, 0, 4))
    both = s.call(aten.cat.default, [turned, s.call(SLICE, y, 2, 4, 8)], -1)
    assert_silent(s.done(both), SplitFused())


# faults


Rows = list[fx.Node | None]
right = split_fused.part


def first_rows(at: At, linear: fx.Node, steps: tuple[int, int, int]) -> Rows:
    start, length, distance = steps
    size = linear.args[1].meta["val"].shape[0] // distance * length  # type: ignore[union-attr]
    return right(at, linear, (start, size, linear.args[1].meta["val"].shape[0]))  # type: ignore[union-attr]


def flipped(at: At, linear: fx.Node, steps: tuple[int, int, int]) -> Rows:
    W, b = right(at, linear, steps)
    return [at.call(aten.flip.default, W, [0]), b]


FAULTS: dict[str, Callable[[At, fx.Node, tuple[int, int, int]], Rows]] = {
    "as if side by side": first_rows,
    "the first piece for all": lambda at, n, t: right(at, n, (0, *t[1:])),
    "heads permuted": flipped,
    "bias of the first": lambda at, n, t: [right(at, n, t)[0], right(at, n, (0, *t[1:]))[1]],
    "no bias": lambda at, n, t: [right(at, n, t)[0], None],
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_projection_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, linear: fx.Node, steps: tuple[int, int, int]) -> Rows:
        here = f"{place}.qkv" in linear.meta["nn_module_stack"]
        return (FAULTS[fault] if here and steps[0] != 0 else right)(at, linear, steps)

    monkeypatch.setattr(split_fused, "part", planted)
    kind = "stacked"
    assert_blamed(Pipeline([SplitFused(expect=3)]).run(three(kind)), f"{place}.qkv")


# again


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_changes_nothing(kind: str) -> None:
    assert_again(one(kind), SplitFused())
