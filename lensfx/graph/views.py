"""Where an axis of a value lands in a view of it, decided from the view's own row-major sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lensfx.graph.node import argument, dtype_of, is_op, shape_of
from lensfx.graph.ops import CASTS, VIEWS

__all__ = ["carried_axis", "same_shape", "same_size"]

aten = torch.ops.aten


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; an unknown equality is False, never a guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def carried_axis(view: fx.Node, axis: int) -> int | None:
    """The axis of a view or cast on which `axis` (non-negative) of its input lies whole, or None.

    Casts between floating dtypes carry every axis: they round but do not mix.
    """
    source = view.args[0] if view.args else None
    if not isinstance(source, fx.Node):
        return None
    before, after = shape_of(source), shape_of(view)
    if before is None or after is None:
        return None
    if is_op(view, *CASTS):
        kinds = (dtype_of(source), dtype_of(view))
        return axis if all(k is not None and k.is_floating_point for k in kinds) else None
    if not is_op(view, *VIEWS):
        return None
    rule = _MOVES.get(view.target)
    if rule is not None:
        return rule(view, axis, len(before))
    if is_op(view, aten.expand.default):
        moved = axis + len(after) - len(before)
        return moved if same_size(before[axis], after[moved]) else None
    return _through_reshape(before, after, axis)


def _through_reshape(before: Sequence[Any], after: Sequence[Any], axis: int) -> int | None:
    # An axis survives a reshape exactly if its size and the product behind it stay the same:
    # both shapes describe one row-major buffer.
    behind = _product(before[axis + 1 :])
    for i, size in enumerate(after):
        if same_size(size, before[axis]) and same_size(_product(after[i + 1 :]), behind):
            return i
    return None


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _transpose(view: fx.Node, axis: int, rank: int) -> int | None:
    a, b = (argument(view, n) % rank for n in ("dim0", "dim1"))
    return {a: b, b: a}.get(axis, axis)


def _permute(view: fx.Node, axis: int, rank: int) -> int | None:
    order = [d % rank for d in argument(view, "dims")]
    return order.index(axis)


def _t(view: fx.Node, axis: int, rank: int) -> int | None:
    return axis if rank < 2 else 1 - axis


def _unsqueeze(view: fx.Node, axis: int, rank: int) -> int | None:
    at = argument(view, "dim") % (rank + 1)
    return axis + 1 if at <= axis else axis


def _select(view: fx.Node, axis: int, rank: int) -> int | None:
    at = argument(view, "dim") % rank
    return None if at == axis else axis - (at < axis)


def _slice(view: fx.Node, axis: int, rank: int) -> int | None:
    return None if argument(view, "dim") % rank == axis else axis


def _index(view: fx.Node, axis: int, rank: int) -> int | None:
    given = argument(view, "indices")
    picked = [(d, i) for d, i in enumerate(given) if i is not None]
    if len(picked) != 1 or picked[0][0] == axis:
        return None
    at, index = picked[0]
    shape = shape_of(index)
    if shape is None or dtype_of(index) in (torch.bool, torch.uint8):
        return None
    return axis if axis < at else axis + len(shape) - 1


def _same(view: fx.Node, axis: int, rank: int) -> int | None:
    return axis


_MOVES: dict[Any, Callable[[fx.Node, int, int], int | None]] = {
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
}
