"""How views, parts, joins and copies move the labels of axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import is_one
from lensfx.analysis.structure.label_common import (
    Rule,
    broadcast,
    dims,
    operand,
    shape_before,
    shortened,
)
from lensfx.analysis.structure.labels import Axes, Axis, Labels
from lensfx.graph.node import argument, is_op, schema_names, shape_of

__all__ = ["VIEW_RULES"]

aten = torch.ops.aten
# How far back the way into complex numbers is looked for.
_NEAR = 16


def _reshape(labels: Labels, node: fx.Node) -> Axes | None:
    source = operand(node)
    before = shape_before(node) if source is not None else None
    if before is None:
        return None
    return labels.reshape(labels.axes(source), before, shape_of(node) or ())


def _permute(labels: Labels, node: fx.Node) -> Axes:
    axes = labels.axes(operand(node))
    if is_op(node, aten.permute.default):
        return [axes[d % len(axes)] for d in argument(node, "dims")]
    if is_op(node, aten.movedim.int):
        a, b = argument(node, "source") % len(axes), argument(node, "destination") % len(axes)
        moved = [x for i, x in enumerate(axes) if i != a]
        return [*moved[:b], axes[a], *moved[b:]]
    if is_op(node, aten.transpose.int):
        a, b = (argument(node, n) % len(axes) for n in ("dim0", "dim1"))
    elif len(axes) < 2:
        return axes
    else:
        a, b = len(axes) - 2, len(axes) - 1
    order = list(range(len(axes)))
    order[a], order[b] = b, a
    return [axes[i] for i in order]


def _expand(labels: Labels, node: fx.Node) -> Axes:
    source = operand(node)
    axes, shape = labels.axes(source), shape_of(node) or ()
    found: Axes = [()] * (len(shape) - len(axes)) + list(axes)
    # A copy along a new axis of the batch's or positions' size is that axis.
    return [a or labels.by_size(size) for a, size in zip(found, shape, strict=True)]


def _part(labels: Labels, node: fx.Node) -> Axes | None:
    """A slice: along positions it is a mix, and along features another label."""
    source = operand(node)
    at = dims(node)[0]
    axes = list(labels.axes(source))
    before, after = shape_before(node), shape_of(node) or ()
    if str(before[at]) == str(after[at]) and str(argument(node, "step")) == "1":
        return axes
    labels.mix(node, "slice", axes[at])
    axes[at] = shortened(labels, axes[at], after[at])
    return axes


def _select(labels: Labels, node: fx.Node) -> Axes:
    at = dims(node)[0]
    axes = list(labels.axes(operand(node)))
    labels.mix(node, "select", axes[at])
    return [*axes[:at], *axes[at + 1 :]]


def _pieces(labels: Labels, node: fx.Node) -> list[Axes]:
    """split, chunk: each piece has a label of its own along the axis."""
    at = dims(node)[0]
    axes = labels.axes(operand(node))
    labels.mix(node, "split", axes[at])
    found = []
    for val in node.meta["val"]:
        piece = shortened(labels, axes[at], val.shape[at])
        found.append([*axes[:at], piece, *axes[at + 1 :]])
    return found


def _unbind(labels: Labels, node: fx.Node) -> list[Axes]:
    at = dims(node)[0]
    axes = labels.axes(operand(node))
    labels.mix(node, "select", axes[at])
    return [[*axes[:at], *axes[at + 1 :]] for _ in node.meta["val"]]


def _cat(labels: Labels, node: fx.Node) -> Axes | None:
    operands = [
        n for n in argument(node, "tensors") if len(shape_of(n) or ()) == len(shape_of(node) or ())
    ]
    at = _dims_of_out(node)
    found = broadcast(labels, node)
    if found is None or not operands:
        return None
    known = [a for n in operands for a in labels.axes(n)[at] if labels.is_sequence(a)]
    if sum(n in labels.flow.live for n in operands) > 1:
        labels.mix(node, "cat", known)
    found[at] = shortened(labels, tuple(known), (shape_of(node) or ())[at])
    return found


def _dims_of_out(node: fx.Node) -> int:
    return int(argument(node, "dim")) % max(len(shape_of(node) or ()), 1)


def _stack(labels: Labels, node: fx.Node) -> Axes:
    operands = argument(node, "tensors")
    at = _dims_of_out(node)
    axes = labels.axes(operands[0])
    live = [n for n in operands if n in labels.flow.live]
    axes = labels.axes(live[0]) if live else axes
    axis = labels.by_size((shape_of(node) or ())[at])
    labels.stacked.update(labels.root[a.label] for a in axis if not labels.is_sequence(a))
    return [*axes[:at], axis, *axes[at:]]


def _unsqueeze(labels: Labels, node: fx.Node) -> Axes:
    axes = list(labels.axes(operand(node)))
    axes.insert(int(argument(node, "dim")) % (len(axes) + 1), ())
    return axes


def _squeeze(labels: Labels, node: fx.Node) -> Axes:
    source = operand(node)
    shape, axes = shape_before(node), labels.axes(source)
    gone = set(dims(node)) if "dim" in schema_names(node.target) else set(range(len(axes)))
    return [a for d, a in enumerate(axes) if not (d in gone and is_one(shape[d]))]


def _tiled(labels: Labels, node: fx.Node) -> Axes | None:
    """repeat: copies one after the other along an axis, or along a new one in front."""
    source = operand(node)
    axes, before, after = labels.axes(source), shape_before(node), shape_of(node)
    if before is None or after is None:
        return None
    new = len(after) - len(before)
    found: Axes = [labels.by_size(size) for size in after[:new]]
    for axis, a, b in zip(axes, before, after[new:], strict=True):
        found.append(axis if str(a) == str(b) else _copies(labels, axis, b))
    return found


def _copies(labels: Labels, axis: Axis, size: Any) -> Axis:
    """The label of copies of an axis; of a single entry they are whatever has that size."""
    return shortened(labels, axis, size) if axis else labels.by_size(size)


def _repeated(labels: Labels, node: fx.Node) -> Axes | None:
    axes, before, after = labels.axes(operand(node)), shape_before(node), shape_of(node)
    if not before or not after or len(before) != len(after):
        return None
    return [
        a if str(s) == str(t) else shortened(labels, a, t)
        for a, s, t in zip(axes, before, after, strict=True)
    ]


def _paired(labels: Labels, node: fx.Node) -> Axes:
    """view_as_complex: pairs of numbers as one; the axis of each pair is kept for the way back."""
    *axes, pair = labels.axes(operand(node))
    labels.pairs[node] = pair
    return axes


def _unpaired(labels: Labels, node: fx.Node) -> Axes:
    source = operand(node)
    stack = [source] if source is not None else []
    for n in stack:
        if n in labels.pairs:
            return [*labels.axes(source), labels.pairs[n]]
        stack.extend(m for m in n.all_input_nodes if m in labels.flow.live and m not in stack)
        if len(stack) > _NEAR:
            break
    return [*labels.axes(source), (labels.fresh(2),)]


def _halved(labels: Labels, node: fx.Node) -> Axes:
    at = dims(node)[0]
    axes = list(labels.axes(operand(node)))
    labels.mix(node, "split", axes[at])
    axes[at] = shortened(labels, axes[at], (shape_of(node) or ())[at])
    return axes


VIEW_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"),
        _reshape,
    ),
    **dict.fromkeys(("transpose", "permute", "t", "movedim", "swapaxes", "mT"), _permute),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "slice": _part,
    "narrow": _part,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _pieces),
    "unbind": _unbind,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": _stack,
    "repeat_interleave": _repeated,
    "repeat": _tiled,
    "glu": _halved,
    "view_as_complex": _paired,
    "view_as_real": _unpaired,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
}
