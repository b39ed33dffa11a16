"""What a value is multiplied by on its way to its only reader, where that can go into a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, dtype_of, is_op, is_weight, op_name, shape_of
from lensfx.graph.ops import CASTS, VIEWS, readers
from lensfx.graph.program import Program
from lensfx.graph.views import carried_axis, same_shape
from lensfx.rewrite import At, Miss

__all__ = ["Scaled", "is_learned", "scaled"]

aten = torch.ops.aten

_TIMES = (aten.mul.Tensor, aten.mul.Scalar)
_OVER = (aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Scaled:
    """A value and what stands between it and the last scaling: views, casts and scalings.

    Each scaling multiplies all channels by one number, or each by its own.
    """

    path: tuple[fx.Node, ...]
    scalings: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        """The value after all scalings."""
        return self.path[-1]

    def factors(self, value: fx.Node) -> list[tuple[Any, Any]]:
        """The operator and the operand of each scaling; a negation is a product with -1."""
        found: list[tuple[Any, Any]] = []
        for node in self.path:
            if node in self.scalings:
                c = factor(node, value)
                over = is_op(node, *_OVER)
                found.append((aten.div.Tensor if over else aten.mul.Tensor, c))
            value = node
        return found

    def views(self, at: At, value: fx.Node) -> fx.Node:
        """The views and casts of the path, without the scalings, of a value that has them in."""
        for node in self.path:
            if node not in self.scalings:
                value = at.call(node.target, value, *node.args[1:], **node.kwargs)
            elif dtype_of(node) != dtype_of(value):
                value = at.call(aten.to.dtype, value, dtype_of(node))
        return value


def scaled(value: fx.Node) -> Scaled | Miss | None:
    """How a value is scaled along its last axis; None if it is not, a Miss if somebody else reads.

    Each value on the way must have one reader.
    """
    node, axis, path, scalings = value, _rank(value) - 1, list[fx.Node](), list[fx.Node]()
    kept: int | None = axis
    last = 0
    while True:
        found = readers(node)
        scaling = [r for r in found if scales(r, node, kept)]
        if len(found) != 1 or not (scaling or is_op(found[0], *VIEWS, *CASTS)):
            break
        reader = found[0]
        path.append(reader)
        if scaling:
            scalings.append(reader)
            last = len(path)
        elif reader.args[0] is not node:
            path.pop()
            break
        else:
            kept = None if kept is None else carried_axis(reader, kept)
        node = reader
    if scalings:
        return Scaled(tuple(path[:last]), tuple(scalings))
    # A number times a value that others read is part of something else, such as an activation.
    if scaling and isinstance(factor(scaling[0], node), fx.Node):
        other = next(r for r in found if r not in scaling)
        how = "is an output" if other.op == "output" else f"is also read by {op_name(other)}"
        return Miss(f"{scaling[0].name} scales {value.name}, which {how}", other, at_site=True)
    return None


def scales(reader: fx.Node, value: fx.Node, axis: int | None) -> bool:
    """Whether a reader multiplies all of a value by one number, or each channel along `axis`."""
    c = factor(reader, value)
    if c is None or not same_shape(shape_of(reader) or (), shape_of(value) or ()):
        return False
    if not isinstance(c, fx.Node):
        return True
    sizes = shape_of(c) or ()
    wide = [i - len(sizes) for i, size in enumerate(sizes) if size != 1]
    return not wide or (axis is not None and wide == [axis - _rank(value)] == [-1])


def factor(reader: fx.Node, value: fx.Node) -> Any:
    """The number or weight that a reader multiplies or divides a value by; None if it does not."""
    if is_op(reader, aten.neg.default):
        return -1
    if not is_op(reader, *_TIMES, *_OVER):
        return None
    c = argument(reader, "other")
    if c is value and is_op(reader, *_TIMES):
        c = argument(reader, "self")
    elif argument(reader, "self") is not value:
        return None
    known = is_weight(c) if isinstance(c, fx.Node) else isinstance(c, (int, float))
    return c if known else None


def is_learned(weight: fx.Node, program: Program) -> bool:
    """Whether a weight follows from a tensor that takes a gradient."""
    stack, seen = [weight], {weight}
    while stack:
        node = stack.pop()
        if node.op == "get_attr" and program.tensors[str(node.target)].requires_grad:
            return True
        stack.extend(n for n in node.all_input_nodes if n not in seen)
        seen.update(node.all_input_nodes)
    return False


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())
