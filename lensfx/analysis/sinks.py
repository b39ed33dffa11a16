"""A linear op that takes up the scale or shift of its input, and how its weight takes them up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lensfx.analysis.channels import Channels, replay
from lensfx.analysis.weights import CONVS, like
from lensfx.graph.node import argument, is_op, schema_names, shape_of
from lensfx.rewrite import At, Edit

__all__ = ["Sink"]

aten = torch.ops.aten

_BIASED = (aten.linear.default, *CONVS)


@dataclass(frozen=True, eq=False)
class Sink:
    """A product of `value` with a weight that sums over its channels.

    `weight` is the parameter, or an expression of parameters, whose axis i holds what axis
    `axes[i]` of the value does (None: an axis of its own), `summed` are those it sums over. The op
    reads it in `slot` after `path`, as picking experts from it. `out[i]` is the axis of the
    weight, as it is read, that axis i of the result comes from. `mixed`: the value came by sums
    over positions whose weights add up to one.
    """

    node: fx.Node
    value: fx.Node
    channels: Channels
    weight: fx.Node
    slot: str
    axes: tuple[int | None, ...]
    summed: tuple[int, ...]
    out: tuple[int | None, ...]
    path: tuple[fx.Node, ...] = ()
    mixed: bool = False

    mixes = False

    def after_rows(self) -> Sink:
        """The same sink of a value that is mixed."""
        return replace(self, mixed=True)

    @property
    def W(self) -> fx.Node:
        """The weight as it is now; another rewrite may have changed it since it was found."""
        if self.path or self.slot not in schema_names(self.node.target):
            return self.weight
        found: fx.Node = argument(self.node, self.slot)
        return found

    @property
    def b(self) -> fx.Node | None:
        """The bias of a linear op or convolution, as it is now."""
        found: fx.Node | None = None
        if is_op(self.node, *_BIASED):
            found = argument(self.node, "bias")
        return found

    def scaled(self, at: At, g: fx.Node) -> fx.Node:
        """The weight that makes of the value what the old one makes of its channels times `g`."""
        vector = self._at_weight(at, replay(at, g, self.channels, 1.0), g)
        return like(at, at.call(aten.mul.Tensor, self.W, vector), self.W)

    def moved(self, at: At, s: fx.Node) -> fx.Node:
        """What the op makes of the channels `s` alone: it broadcasts against the result."""
        moved = replay(at, s, self.channels, 0.0, scaled=True)
        W, weight_axes = self.W, len(self.axes)
        if is_op(self.node, aten.linear.default) and weight_axes == 2:
            plain = self.channels.in_order and not self.channels.factors
            flat = s if plain else at.call(aten.reshape.default, moved, [-1])
            return at.call(aten.mv.default, W, like(at, flat, W))
        whole = moved if self.channels.factors else s
        vector = self._at_weight(at, like(at, moved, W), like(at, whole, W))
        rows = at.call(aten.mul.Tensor, W, vector)
        rows = at.call(aten.sum.dim_IntList, rows, list(self.summed), True)
        for view in self.path:
            rows = at.call(view.target, rows, *view.args[1:], **view.kwargs)
        return self._at_result(at, rows)

    def install(
        self, edit: Edit, weight: fx.Node | None = None, shift: fx.Node | None = None
    ) -> None:
        """Let the op read another weight, and add `shift` to what it gives."""
        at = edit.before(self.node)
        if weight is not None:
            self._read(at, weight)
        if shift is None:
            # Nothing new to read is also a claim about what it gives.
            edit.keeps(self.node)
            return
        if is_op(self.node, *_BIASED):
            b = self.b
            if b is not None:
                shift = like(at, at.call(aten.add.Tensor, b, shift), b)
            at.set(self.node, bias=shift)
            return
        behind = edit.after(self.node)
        shift = like(behind, shift, self.node)
        edit.changes(self.node, shift=shift)
        edit.before(self.node).replace(self.node, behind.call(aten.add.Tensor, self.node, shift))

    def _read(self, at: At, weight: fx.Node) -> None:
        for view in self.path:
            weight = at.call(view.target, weight, *view.args[1:], **view.kwargs)
        if self.slot in schema_names(self.node.target):
            at.set(self.node, **{self.slot: weight})
            return
        place = int(self.slot)
        tensors = list(argument(self.node, "tensors"))
        tensors[place] = weight
        at.set(self.node, tensors=tensors)

    def _at_weight(self, at: At, vector: fx.Node, whole: fx.Node) -> fx.Node:
        """A vector with the axes of the value, as one with the axes of the weight."""
        held = [a for a in self.axes if a in self.channels.axes]
        plain = self.channels.in_order and held == [self.axes[-1]]
        if plain and len(shape_of(whole) or ()) == 1:
            return whole
        shape = self.channels.idx.shape
        wanted = [1 if a is None else int(shape[a]) for a in self.axes]
        return _arranged(at, vector, held, wanted)

    def _at_result(self, at: At, rows: fx.Node) -> fx.Node:
        shape = shape_of(rows) or ()
        held = [a for a in self.out if a is not None]
        wanted = [1 if a is None else shape[a] for a in self.out]
        return _arranged(at, rows, held, wanted)


def _arranged(at: At, value: fx.Node, held: Sequence[int], wanted: Sequence[Any]) -> fx.Node:
    """The axes `held` in this order and all others, of size 1, left out; then in this shape."""
    rank = len(shape_of(value) or ())
    if list(held) != sorted(held):
        order = [*(a for a in range(rank) if a not in held), *held]
        value = at.call(aten.permute.default, value, order)
    shape, wanted = list(shape_of(value) or ()), list(wanted)
    while len(wanted) > len(shape) and wanted[0] == 1:
        wanted.pop(0)
    return value if shape == wanted else at.call(aten.reshape.default, value, wanted)
