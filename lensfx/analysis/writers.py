"""Who writes to a stream from weights, and whether the mean of what it writes is seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import is_one, same_size
from lensfx.analysis.constants import sizes
from lensfx.analysis.gauge import Gauge, Proof, Seen, Step
from lensfx.analysis.mean_zero import mean_parts, mean_sources
from lensfx.analysis.products import product
from lensfx.analysis.transfer import TABLE
from lensfx.analysis.weights import CONVS
from lensfx.graph.node import argument, is_op, is_weight
from lensfx.graph.ops import data_inputs, readers
from lensfx.graph.program import Program

__all__ = ["Writer", "table_of", "writers"]

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_ADDED = (*_SUMS, aten.cat.default, aten.stack.default)
_ROWS = {"identity", "reshape", "permute", "select", "same axes", "expand", "index", "embedding"}


@dataclass(frozen=True)
class Writer:
    """A value that goes into a stream and moves with its weights, all of them along one axis each.

    `operands` are those weights, or rows of them, with their axis; the value itself where it is
    rows. `found` says whether a shift of `node` along `axis` is seen. `left` are the sources of a
    mean that its norms still see once every writer is centred; `centred`: this one has none then.
    """

    node: fx.Node
    axis: int
    operands: tuple[tuple[fx.Node, int], ...]
    found: Proof | Seen
    left: tuple[fx.Node, ...] = ()
    centred: bool = False


def writers(program: Program) -> list[Writer]:
    """Every writer of a stream whose mean a norm takes out, and every one whose mean is seen."""
    gauge = Gauge()
    found = [w for n in program.graph.nodes for w in _writer(gauge, n)]
    legal = [w for w in found if isinstance(w.found, Proof)]
    centred = {pair for w in legal for pair in _pairs(w)}
    at_leaf: dict[tuple[fx.Node, int], tuple[fx.Node, ...]] = {}
    done = []
    for w in found:
        left: dict[fx.Node, None] = {}
        for value, axis in _ends(w.found):
            if (value, axis) not in at_leaf:
                at_leaf[value, axis] = mean_sources(value, axis, centred=centred)
            left.update(dict.fromkeys(at_leaf[value, axis]))
        own = mean_sources(w.node, w.axis, centred=set(_pairs(w)))
        done.append(replace(w, left=tuple(left), centred=not own))
    return done


def _pairs(writer: Writer) -> Iterator[tuple[fx.Node, fx.Node]]:
    for operand, _ in writer.operands:
        yield operand, writer.node if is_weight(operand) else operand


def _ends(found: Proof | Seen) -> Iterator[tuple[fx.Node, int]]:
    """Each value whose mean a norm takes out, and the axis of that mean."""
    kept = found.kept if isinstance(found, Proof) else ()
    for step in found.leaves if isinstance(found, Proof) else ():
        axes = [a for a in step.axes_in if not is_one(sizes(step.value)[a])]
        if len(axes) == 1 and step.node in kept:
            yield step.value, axes[0]


def _writer(gauge: Gauge, node: fx.Node) -> Iterator[Writer]:
    """The node as a writer, if it is one that matters."""
    if node.op != "call_function" or is_weight(node) or not _is_floating(node):
        return
    axis = _channel_axis(node)
    if is_one(sizes(node)[axis]):
        return
    operands = tuple(_operands(node, axis))
    if not operands:
        return
    found = gauge.dead(node, {axis})
    if isinstance(found, Seen):
        joins = _joins(gauge, node, axis)
        matters = any(s.axes_in >= {len(sizes(s.value)) - 1} for s in joins) or _is_scaled(found)
    else:
        families = [TABLE[s.node.target].name for s in found.leaves if s.node.target in TABLE]
        stream = {"layer norm", "group norm", "spread", "add", "sum"}.intersection(families)
        matters = bool(stream) and any(_joins(gauge, node, axis))
    if matters:
        yield Writer(node, axis, operands, found)


def _is_floating(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point() and val.ndim > 0


def _channel_axis(node: fx.Node) -> int:
    if is_op(node, *CONVS):
        return len(sizes(node)) - len(sizes(argument(node, "weight"))) + 1
    return len(sizes(node)) - 1


def _joins(gauge: Gauge, node: fx.Node, axis: int) -> Iterator[Step]:
    """The sums with another value that the mean goes into."""
    for step in gauge.carried(node, {axis}):
        said = any(not is_one(sizes(step.value)[a]) for a in step.axes_in)
        if said and is_op(step.node, *_SUMS):
            both = [argument(step.node, name) for name in ("self", "other")]
            if not any(_is_entrywise(n, step.value) for n in both if n is not step.value):
                yield step


def _is_scaled(seen: Seen) -> bool:
    """Whether a scale for each channel, on the way into a sum, is who sees the mean."""
    if not is_op(seen.node, aten.mul.Tensor) or not any(map(is_weight, seen.node.args)):
        return False
    sums = (r for r in readers(seen.node) if is_op(r, *_SUMS))
    return any(not any(map(is_weight, r.all_input_nodes)) for r in sums)


def _is_entrywise(other: Any, value: fx.Node) -> bool:
    """Whether an operand is a weight, or made of the value entry by entry as in x + x ** 3."""
    stack = [other]
    while stack:
        node = stack.pop()
        if node is value or not isinstance(node, fx.Node) or is_weight(other):
            return True
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            stack.extend(n for n in data_inputs(node) if not is_weight(n) and not n < value)
    return False


def _operands(node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """The weights, or rows of weights, that the node is linear in along its axis."""
    given: list[tuple[Any, int]] = []
    found = product(node)
    if found is not None and found.out:
        label = found.out[-1]
        having = [(x, labels.index(label)) for x, labels in found.terms if label in labels]
        given = having if len(having) == 1 else []
    elif is_op(node, *CONVS):
        given = [(argument(node, "weight"), 0)]
    elif is_op(node, *_ADDED):
        yield from _summands(node, axis)
        return
    else:
        if table_of(node, axis) is not None and any(not _goes_on(r, node) for r in readers(node)):
            yield node, axis
        return
    target: Any = node.target
    bias = "bias" if found is None else _BIAS.get(target)
    b = None if bias is None else argument(node, bias)
    given += [(b, len(sizes(b)) - 1)] if isinstance(b, fx.Node) and sizes(b) else []
    for operand, own in given:
        if same_size(sizes(operand)[own], sizes(node)[axis]) and table_of(operand, own) is not None:
            yield operand, own


_BIAS = {
    aten.linear.default: "bias",
    aten.addmm.default: "self",
    aten.baddbmm.default: "self",
}


def _summands(node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """The weights among what is added or joined, the rest of it computed."""
    if is_op(node, *_SUMS):
        given = [argument(node, "self"), argument(node, "other")]
    else:
        given = list(argument(node, "tensors"))
        if argument(node, "dim") % len(sizes(node)) == axis:
            return
    for operand in dict.fromkeys(given):
        if is_weight(operand) and sizes(operand):
            own = len(sizes(operand)) - 1
            if _is_floating(operand) and same_size(sizes(operand)[own], sizes(node)[axis]):
                yield operand, own


def _goes_on(reader: fx.Node, value: fx.Node) -> bool:
    """Whether a reader of rows makes rows of them again, or multiplies by them."""
    return _is_rows(reader) or product(reader) is not None


def _is_rows(node: fx.Node) -> bool:
    family = TABLE.get(node.target)
    return family is not None and family.name in _ROWS


def table_of(value: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """The weight that a value is rows of, with the axis of it that lies whole along `axis`."""
    while not is_weight(value):
        if not _is_rows(value) or not isinstance(value.args[0], fx.Node):
            return None
        parts = mean_parts(value, axis)
        if not parts or not same_size(sizes(parts[0][0])[parts[0][1]], sizes(value)[axis]):
            return None
        value, axis = parts[0]
    return value, axis
