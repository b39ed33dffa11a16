"""How the weights of linear ops are written anew: scaled by channel, cut by row, read elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, dtype_of, is_op, is_weight, shape_of
from lensfx.graph.ops import CASTS, VIEWS, readers
from lensfx.graph.program import Program
from lensfx.graph.views import carried_axis, same_size
from lensfx.rewrite import At, EveryReader, Match, Maybe, Miss, Op, Param, Ref, match
from lensfx.rewrite.pattern import Pattern

__all__ = [
    "CONVS",
    "LINEARS",
    "TURNED",
    "again",
    "channel_axis",
    "like",
    "maker",
    "rows_of",
    "steps_of",
    "taken_by",
    "times_channels",
    "weight_of",
]

aten = torch.ops.aten

LINEARS = (aten.linear.default,)
CONVS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
TURNED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
_SIZED = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)


def like(at: At, value: fx.Node, other: fx.Node) -> fx.Node:
    """The value in the dtype of another one."""
    same = dtype_of(value) == dtype_of(other)
    return value if same else at.call(aten.to.dtype, value, dtype_of(other))


def again(at: At, views: Iterable[fx.Node], x: fx.Node, *, resized: bool = False) -> fx.Node:
    """The same views of another value, of the same shape.

    `resized`: its last axis, which all the views keep whole and in place, has another size.
    """
    for view in views:
        last = (shape_of(x) or ())[-1]
        target, args = view.target, list(view.args[1:])
        if resized and is_op(view, *_SIZED):
            args[0] = [*args[0][:-1], last]  # type: ignore[index, misc]
        elif resized and is_op(view, aten.unflatten.int):
            ends = int(args[0]) in (-1, _rank(view.args[0]) - 1)  # type: ignore[arg-type]
            args[1] = [*args[1][:-1], last] if ends else args[1]  # type: ignore[index, misc]
        elif resized and is_op(view, aten.squeeze.default):
            ones = [i for i, size in enumerate((shape_of(x) or ())[:-1]) if same_size(size, 1)]
            target, args = aten.squeeze.dims, [ones]
        x = at.call(target, x, *args, **view.kwargs)
    return x


def _rank(node: Any) -> int:
    return len(shape_of(node) or ())


def weight_of(node: fx.Node) -> fx.Node | None:
    """The matrix, or filters, that a linear op or convolution applies to a computed value."""
    if not is_op(node, *LINEARS, *CONVS, *TURNED) or is_weight(node):
        return None
    W = argument(node, "weight")
    return W if is_weight(W) and _rank(W) > 1 else None


def taken_by(
    value: fx.Node,
    ops: tuple[Any, ...],
    program: Program | None,
    *,
    keeps: int = -1,
    others: bool = False,
) -> Match | Miss:
    """The linear ops that read a value through views which keep axis `keeps` whole and in place.

    `readers` of the match has for each its `op`, weight `W`, bias `b` and the views as `path`.
    Every reader must be one, or with `others` they are listed under that name.
    """
    wanted: dict[str, Pattern] = {
        "input": Ref("value"),
        "weight": Param("W"),
        "bias": Maybe(Param("b")),
    }
    rest = "others" if others else None
    pattern = EveryReader(Op("value", (value.target,)), Op("op", ops, wanted), keeps, rest)
    found = match(pattern, value, program)
    flat = [r for r in getattr(found, "readers", ()) if _rank(r.W) < 2]
    return Miss(f"{flat[0].W.name} is a vector", flat[0].op) if flat else found


def maker(value: fx.Node, reader: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], fx.Node | None]:
    """What a value is made by, before views and casts that are on the way to `reader` alone.

    With it those views, in order, and who else reads one of these values, if somebody does.
    """
    path: tuple[fx.Node, ...] = ()
    while True:
        others = [r for r in readers(value) if r is not reader]
        if others or not is_op(value, *VIEWS, *CASTS):
            return value, path, others[0] if others else None
        path, reader, value = (value, *path), value, value.args[0]  # type: ignore[assignment]


def channel_axis(op: fx.Node, path: Iterable[fx.Node]) -> int | None:
    """The axis on which the output channels of a linear op or batch norm lie behind views."""
    axis: int | None = 1
    if not is_op(op, aten.batch_norm.default):
        axis = _rank(op) - 1 - max(0, _rank(argument(op, "weight")) - 2)
    for view in path:
        axis = None if axis is None else carried_axis(view, axis)
    return axis


def times_channels(at: At, op: fx.Node, c: fx.Node, *, inputs: bool) -> fx.Node:
    """The weight of a linear op or convolution times a number for each output, or input, channel.

    The product is in the weight's own dtype.
    """
    W = argument(op, "weight")
    first, second, *taps = (int(n) for n in shape_of(W) or ())
    ones = [1] * len(taps)
    if inputs is is_op(op, *TURNED):
        scaled = at.call(aten.mul.Tensor, W, at.call(aten.reshape.default, c, [-1, 1, *ones]))
        return like(at, scaled, W)
    groups = 1 if is_op(op, *LINEARS) else int(argument(op, "groups"))
    if groups == 1:
        c = at.call(aten.reshape.default, c, [-1, *ones]) if taps else c
        return like(at, at.call(aten.mul.Tensor, W, c), W)
    # The channels of a group stand side by side, and the weight has those of one group only.
    split = at.call(aten.reshape.default, W, [groups, first // groups, second, *taps])
    c = at.call(aten.reshape.default, c, [groups, 1, second, *ones])
    scaled = at.call(aten.mul.Tensor, split, c)
    return like(at, at.call(aten.reshape.default, scaled, [first, second, *taps]), W)


def steps_of(rows: Sequence[int], count: int) -> tuple[int, int, int] | None:
    """Rows of `count` as runs of one length at one distance: (start, length, distance)."""
    if not rows:
        return None
    start = rows[0]
    length = next((i for i, r in enumerate(rows) if r != start + i), len(rows))
    distance = count if length == len(rows) else rows[length] - start
    runs = range(start, count, distance) if distance > 0 else ()
    every = [r for run in runs for r in range(run, run + length)]
    fits = every == list(rows) and count % distance == 0 and start + length <= distance
    return (start, length, distance) if fits else None


def rows_of(at: At, weight: fx.Node, steps: tuple[int, int, int]) -> fx.Node:
    """The rows of a weight, or the entries of a bias, that `steps_of` describes."""
    start, length, distance = steps
    count, *rest = (int(n) for n in shape_of(weight) or ())
    if distance == count:
        return at.call(aten.slice.Tensor, weight, 0, start, start + length)
    runs = at.call(aten.reshape.default, weight, [count // distance, distance, *rest])
    runs = at.call(aten.slice.Tensor, runs, 1, start, start + length)
    return at.call(aten.reshape.default, runs, [count // distance * length, *rest])
