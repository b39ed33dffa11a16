"""What rules of labels share: the operand, the axes named, entry by entry, a part of an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from lensfx.analysis.axes import is_one
from lensfx.analysis.structure.labels import Axes, Axis, Labels
from lensfx.graph.node import argument, is_weight, schema_names, shape_of

__all__ = ["Rule", "broadcast", "dims", "operand", "shape_before", "shortened"]

Rule = Callable[[Labels, fx.Node], Any]


def operand(node: fx.Node) -> fx.Node | None:
    """The first operand, if it is a node."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def shape_before(node: fx.Node) -> tuple[Any, ...]:
    """The shape of the first operand."""
    found = operand(node)
    return (shape_of(found) or ()) if found is not None else ()


def dims(node: fx.Node, name: str = "dim") -> list[int]:
    """The axes an argument names, none named meaning all."""
    rank = len(shape_before(node))
    given = argument(node, name) if name in schema_names(node.target) else None
    if given is None or given == []:
        return list(range(rank))
    many = [given] if isinstance(given, int) else given
    return [d % rank for d in many] if rank else []


def broadcast(labels: Labels, node: fx.Node) -> Axes | None:
    """Entry by entry: an axis is labelled by the operand that knows most about it."""
    out = shape_of(node)
    if out is None:
        return None
    operands = [n for n in node.all_input_nodes if shape_of(n) is not None]
    found: Axes = []
    for i in range(len(out)):
        best: tuple[int, Axis] = (-1, ())
        for n in operands:
            shape = shape_of(n) or ()
            at = i - len(out) + len(shape)
            if at < 0 or is_one(shape[at]) or is_weight(n):
                continue
            axis = labels.axes(n)[at]
            rank = 2 * any(map(labels.is_sequence, axis)) + (n in labels.flow.live)
            if rank > best[0]:
                best = (rank, axis)
        found.append(best[1])
    return found


def shortened(labels: Labels, axis: Axis, size: Any) -> Axis:
    """The label of a part of an axis: still positions if it was."""
    if is_one(size):
        return ()
    if any(map(labels.is_sequence, axis)):
        first = next(a for a in axis if labels.is_sequence(a))
        atom = labels.fresh(size)
        labels.root[atom.label] = labels.root[first.label]
        return (atom,)
    return (labels.fresh(size),)
