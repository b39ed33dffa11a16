"""FoldBatchNorm: stored statistics go into the linear op before the norm, or those behind it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.fold_batch_norm import FoldBatchNorm
from surgery import (
    assert_again,
    assert_blamed,
    assert_equal,
    assert_goldens,
    assert_refused,
    chooser,
    linear,
)
from torch import fx

from lensfx import Pipeline, Program
from lensfx.rewrite import At

aten = torch.ops.aten
fold_batch_norm = importlib.import_module("lensfx.passes.fold_batch_norm")
CONV = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TURNED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def norm(s: Sketch, x: fx.Node, name: str, affine: bool = True, training: bool = False) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[1]), x.meta["val"].dtype
    g, b = (s.weight(f"{name}.{k}", size, dtype=dtype) for k in ("weight", "bias"))
    mean = s.stored(f"{name}.running_mean", torch.randn(size, dtype=dtype))
    var = s.stored(f"{name}.running_var", torch.rand(size, dtype=dtype) + 0.1)
    given = (g, b) if affine else (None, None)
    last = (mean, var, training, 0.1, 1e-5, False)
    return s.call(aten.batch_norm.default, x, *given, *last, path=name)


def conv(s: Sketch, x: fx.Node, name: str, out: int, axes: int = 2, **given: Any) -> fx.Node:
    groups, turned, bias = (given.get(k, d) for k, d in (("g", 1), ("turned", 0), ("bias", 1)))
    size, dtype = int(x.meta["val"].shape[1]), x.meta["val"].dtype
    sides = (size, out // groups) if turned else (out, size // groups)
    W = s.weight(f"{name}.weight", *sides, *[2] * axes, dtype=dtype)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    ones, pad = [1] * axes, [given.get("pad", 0)] * axes
    rest = (ones, pad, [0] * axes, groups) if turned else (ones, pad, ones, groups)
    return s.call((TURNED if turned else CONV)[axes - 1], x, W, b, *rest, path=name)


def image(s: Sketch, channels: int = 4, axes: int = 2, dtype: Any = None) -> fx.Node:
    return s.input("x", 2, channels, *[4] * axes, dtype=dtype)


def three() -> Program:
    """A norm after a grouped convolution, one before a convolution, one after a linear op."""
    s = Sketch()
    x = s.call(aten.relu.default, norm(s, conv(s, image(s), "a", 4, g=2, pad=1), "0"))
    x = s.call(aten.relu.default, conv(s, norm(s, x, "1"), "b", 4, g=2))
    x = norm(s, linear(s, s.call(aten.mean.dim, x, [2, 3]), "c", 4), "2")
    return s.done(x)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    s = Sketch()
    before = s.done(norm(s, linear(s, s.input("x", "B", 4), "a", 4), "bn"))
    rewritten = assert_goldens(golden, "fold_batch_norm", before, FoldBatchNorm())
    assert [e.sites for e in rewritten.journal] == [(("batch_norm", "linear_default"),)]
    assert_equal(before, Pipeline([FoldBatchNorm(expect=1)]).run(before))


def test_before_and_behind() -> None:
    before = three()
    after = Pipeline([FoldBatchNorm(expect=3)]).run(before)
    assert_equal(before, after)
    assert not [k for k in after.tensors if "running" in k]


def test_two_norms_in_a_row() -> None:
    s = Sketch()
    before = s.done(norm(s, norm(s, conv(s, image(s), "a", 4), "0"), "1"))
    assert_equal(before, Pipeline([FoldBatchNorm(expect=2)]).run(before))


def test_a_norm_before_a_linear_op_and_a_norm_of_positions() -> None:
    s = Sketch()
    before = s.done(linear(s, norm(s, s.input("x", "B", 4), "0"), "a", 4, bias=False))
    assert_equal(before, Pipeline([FoldBatchNorm(expect=1)]).run(before))
    s = Sketch()
    y = s.call(aten.transpose.int, linear(s, s.input("x", 4, 4, 4), "a", 4), 1, 2)
    before = s.done(norm(s, y, "0"))
    assert_equal(before, Pipeline([FoldBatchNorm(expect=1)]).run(before))


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_folding_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    axes, groups, dtype = of(1, 2, 3), of(1, 2, 4), of(torch.float32, torch.float64)
    x = image(s, 4, axes, dtype)
    kind = {"g": groups, "bias": of(True, False), "turned": of(True, False), "pad": of(0, 1)}
    if of(True, False):
        y = norm(s, conv(s, x, "a", of(4, 8), axes, **kind), "bn", of(True, False))
    else:
        y = conv(s, norm(s, x, "bn", of(True, False)), "a", 4, axes, g=groups, bias=kind["bias"])
    before = s.done(y)
    assert_equal(before, Pipeline([FoldBatchNorm(expect=1)]).run(before))


def test_a_convolution_used_twice_keeps_its_weight() -> None:
    s = Sketch()
    y = conv(s, image(s), "a", 4)
    z = s.call(aten.conv2d.default, s.call(aten.relu.default, y), *y.args[1:3])
    before = s.done(y, norm(s, z, "bn"))
    after = Pipeline([FoldBatchNorm(expect=1)]).run(before)
    assert_equal(before, after)
    assert after.tensors["a.weight"] is before.tensors["a.weight"]


# refuses


def test_refusals_name_who_forbids_it() -> None:
    entry = FoldBatchNorm()
    s = Sketch()
    training = s.done(norm(s, conv(s, image(s), "a", 4), "0", training=True))
    assert_refused(training, entry, "batch_norm", "it norms by the statistics of the batch")
    s = Sketch()
    y = s.call(aten.relu.default, image(s))
    padded = s.done(conv(s, norm(s, y, "0"), "a", 4, pad=1))
    words = "relu before batch_norm is relu, no linear op, "
    assert_refused(
        padded, entry, "relu", words + "and conv2d pads it with zeros, which carry no shift"
    )
    s = Sketch()
    y = conv(s, image(s), "a", 4)
    shared = s.done(norm(s, y, "0"), s.call(aten.tanh.default, y))
    words = "tanh also reads the value before it is normed, "
    assert_refused(
        shared, entry, "tanh", words + "and it is an output of the model, which would change"
    )
    # As many positions as channels: the linear op runs over the axis that is not normed.
    s = Sketch()
    other = s.done(linear(s, norm(s, s.input("x", 4, 4, 4), "0"), "a", 4))
    words = "x before batch_norm is placeholder, no linear op, "
    assert_refused(
        other, entry, "x", words + "and linear reads it along another axis than the channels"
    )
    s = Sketch()
    positions = s.done(norm(s, linear(s, s.input("x", 4, 4, 4), "a", 4), "0"))
    words = "the channels of linear are not the axis that is normed, "
    assert_refused(
        positions, entry, "linear", words + "and it is an output of the model, which would change"
    )


# faults


Changed = dict[str, Any]
rights = {k: getattr(fold_batch_norm, k) for k in ("into_output", "into_input")}


def twice(at: At, op: fx.Node, c: fx.Node, s: fx.Node, right: Any) -> Changed:
    return dict(right(at, op, at.call(aten.mul.Tensor, c, c), s))


def other_side(at: At, op: fx.Node, c: fx.Node, s: fx.Node, right: Any) -> Changed:
    W = op.args[1]
    spread = at.call(aten.reshape.default, c, [-1, *[1] * (W.meta["val"].ndim - 1)])
    if right is rights["into_output"]:
        spread = at.call(aten.flip.default, spread, [0])
    return {**right(at, op, c, s), "weight": at.call(aten.mul.Tensor, W, spread)}


FAULTS: dict[str, Callable[[At, fx.Node, fx.Node, fx.Node, Any], Changed]] = {
    "no shift": lambda at, op, c, s, right: {**right(at, op, c, s), "bias": op.args[2]},
    "old bias forgotten": lambda at, op, c, s, right: {
        **right(at, op, c, s),
        "bias": at.call(aten.sub.Tensor, right(at, op, c, s)["bias"], op.args[2]),
    },
    "weight as it was": lambda at, op, c, s, right: {**right(at, op, c, s), "weight": op.args[1]},
    "folded twice": twice,
    "channels of the other side": other_side,
    "groups turned": lambda at, op, c, s, right: right(
        at, op, at.call(aten.flip.default, c, [0]), s
    ),
    "eps": lambda at, op, c, s, right: right(at, op, at.call(aten.mul.Tensor, c, 1 + 1e-9), s),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_norm_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a", "b", "c")
    for key, right in rights.items():

        def planted(at: At, op: fx.Node, c: fx.Node, s: fx.Node, right: Any = right) -> Changed:
            if names[place] not in op.meta["nn_module_stack"]:
                return dict(right(at, op, c, s))
            return FAULTS[fault](at, op, c, s, right)

        monkeypatch.setattr(fold_batch_norm, key, planted)
    assert_blamed(Pipeline([FoldBatchNorm(expect=3)]).run(three()), str(place))


# again


def test_a_second_run_changes_nothing() -> None:
    assert_again(three(), FoldBatchNorm())
