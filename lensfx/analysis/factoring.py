"""The weights of a circuit, one matrix for each group of heads, and back into their linear ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lensfx.analysis.channels import Channels
from lensfx.analysis.circuits import Side
from lensfx.graph.node import argument, dtype_of, shape_of
from lensfx.graph.program import Program
from lensfx.rewrite import At, Edit

__all__ = ["Heads", "declare"]

aten = torch.ops.aten


class Heads:
    """The weight and bias of one side, over the axes that its heads share.

    `stacked` has the heads of a group one above the other: [groups, heads * n, width], where n
    counts the inputs and the bias; `install` puts other numbers of that shape in their place.
    """

    def __init__(self, edit: Edit, side: Side, name: str) -> None:
        self.side, self._edit = side, edit
        self.groups, self.heads, self.width = side.rows.shape
        self._rows = edit.constant(name, side.rows.flatten())

    def stacked(self, at: At, anchor: fx.Node, program: Program) -> fx.Node:
        """The matrices of the groups in float64, computed ahead of `anchor`."""
        W = argument(self.side.linear, "weight")
        W = self._wide(at, _copied(at, anchor, self._edit, program, W))
        rows = at.call(aten.index_select.default, W, 0, self._rows)  # [all heads * width, in]
        b = self._bias()
        if b is not None:
            b = _copied(at, anchor, self._edit, program, b)
            b = at.call(aten.to.dtype, b, torch.float64)
            b = at.call(aten.index_select.default, b, 0, self._rows)
            rows = at.call(aten.cat.default, [rows, at.call(aten.unsqueeze.default, b, 1)], 1)
        n = int((shape_of(rows) or ())[1])
        apart = at.call(aten.reshape.default, rows, [self.groups, self.heads, self.width, n])
        apart = at.call(aten.transpose.int, apart, 2, 3)
        return at.call(aten.reshape.default, apart, [self.groups, self.heads * n, self.width])

    def install(self, stacked: fx.Node) -> None:
        """Put other numbers in the place of what `stacked` gave."""
        linear = self.side.linear
        at = self._edit.before(linear)
        W, b = argument(linear, "weight"), self._bias()
        n = int((shape_of(stacked) or ())[1]) // self.heads
        apart = at.call(aten.reshape.default, stacked, [self.groups, self.heads, n, self.width])
        apart = at.call(aten.transpose.int, apart, 2, 3)
        rows = at.call(aten.reshape.default, apart, [-1, n])  # [all heads * width, in and bias]
        columns = n if b is None else n - 1
        kept = at.call(aten.slice.Tensor, rows, 1, 0, columns)
        made = at.call(aten.index_copy.default, self._wide(at, W), 0, self._rows, kept)
        made = at.call(aten.to.dtype, made, dtype_of(W))
        changed = {"weight": at.call(aten.t.default, made) if self.side.reads else made}
        if b is not None:
            last = at.call(aten.select.int, rows, 1, columns)
            wide = at.call(aten.to.dtype, b, torch.float64)
            made = at.call(aten.index_copy.default, wide, 0, self._rows, last)
            changed["bias"] = at.call(aten.to.dtype, made, dtype_of(b))
        at.set(linear, **changed)

    def _wide(self, at: At, W: fx.Node) -> fx.Node:
        W = at.call(aten.t.default, W) if self.side.reads else W
        return at.call(aten.to.dtype, W, torch.float64)

    def _bias(self) -> Any:
        return None if self.side.reads else argument(self.side.linear, "bias")


def declare(edit: Edit, at: At, name: str, turned: Sequence[tuple[Side, fx.Node]]) -> None:
    """Say of every value of the sides that `was = now @ turn`, with a turn for each group."""
    found: dict[fx.Node, fx.Node | None] = {}
    for i, (side, turns) in enumerate(turned):
        for j, (value, channels) in enumerate(side.values):
            if channels.parts:
                continue
            turn = _turn_of(at, edit, f"{name}.{i}.{j}", side, channels, turns)
            other = found.get(value, turn)
            # Both turn channels of their own in a fused value, so that their order is free.
            both = turn is not None and other is not None and value in found
            found[value] = at.call(aten.matmul.default, other, turn) if both else turn and other
    for value, turn in found.items():
        axes = range(len(shape_of(value) or ())) if turn is None else ()
        edit.changes(value, turn=turn, free=axes)


def _copied(at: At, anchor: fx.Node, edit: Edit, program: Program, value: fx.Node) -> fx.Node:
    """A weight, computed again ahead of `anchor` where it is computed behind it."""
    known: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node < anchor:
            return node
        if node not in known and node.op == "get_attr":
            name = str(node.target)
            known[node] = edit.constant(name, program.tensors[name])
        elif node not in known:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), copy)
            known[node] = at.call(node.target, *args, **kwargs)
        return known[node]

    return copy(value)


def _turn_of(
    at: At, edit: Edit, name: str, side: Side, channels: Channels, turns: fx.Node
) -> fx.Node | None:
    """The matrices [groups, width, width] as one for each head that a value shows, or for all.

    None where the value mixes heads and other channels along several axes.
    """
    rows = side.rows.flatten(0, 1).tolist()  # [all heads, width]
    group = {tuple(row): i // side.rows.shape[1] for i, row in enumerate(rows)}
    idx, width = channels.idx, side.rows.shape[-1]
    if idx.shape[-1] == width:
        shown = [tuple(row) for row in idx.reshape(-1, width).tolist()]
        if all(row in group for row in shown):
            order = edit.constant(f"{name}.order", torch.tensor([group[row] for row in shown]))
            return at.call(aten.index_select.default, turns, 0, order)
    if idx.numel() != idx.shape[-1]:
        return None
    place = {c: i for i, c in enumerate(idx.flatten().tolist())}
    if not all(c in place for row in rows for c in row):
        return None
    spread = torch.tensor([[place[c] for c in row] for row in rows])
    order = edit.constant(f"{name}.order", torch.tensor([group[tuple(row)] for row in rows]))
    each = at.call(aten.index_select.default, turns, 0, order)
    eye = at.call(aten.eye.default, len(place), dtype=torch.float64)
    down = edit.constant(f"{name}.down", spread.unsqueeze(2))
    along = edit.constant(f"{name}.along", spread.unsqueeze(1))
    return at.call(aten.index_put.default, eye, [down, along], each)
