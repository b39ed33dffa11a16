"""The pieces that the result of a fused linear op is read in, and the same views of one piece."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lensfx.analysis.channels import Channels, seed, through
from lensfx.analysis.weights import steps_of
from lensfx.graph.node import argument, is_op, op_name, shape_of
from lensfx.graph.ops import is_hook, readers
from lensfx.graph.views import same_size
from lensfx.rewrite import At, Miss

__all__ = ["Piece", "pieces"]

aten = torch.ops.aten

_SIZED = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default)
_CUTS = (aten.slice.Tensor, aten.narrow.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
_JOINS = (aten.cat.default, aten.stack.default)
_LIKE_ANOTHER = (aten.view_as.default, aten.reshape_as.default, aten.expand_as.default)
# Behind these a value is no longer made of the channels of a piece.
_CONTRACT = frozenset(
    "linear matmul mm bmm addmm baddbmm einsum softmax _softmax layer_norm rms_norm conv1d conv2d "
    "conv3d scaled_dot_product_attention output embedding".split()
)


@dataclass(frozen=True)
class _Step:
    """A node on the way to a piece, the channels of what it reads and of what it gives."""

    node: fx.Node
    before: Channels
    after: Channels


@dataclass(frozen=True)
class Piece:
    """A value that holds some of the channels of a linear op and none of the others.

    `steps` are its rows of the weight as `steps_of` describes them, `path` the views on the way.
    """

    node: fx.Node
    rows: tuple[int, ...]
    steps: tuple[int, int, int]
    path: tuple[_Step, ...] = field(repr=False)

    def views(self, at: At, value: fx.Node) -> fx.Node:
        """The piece, from a linear op that gives its channels alone, in the order of the rows."""
        for step in self.path:
            value = self._again(at, step, value)
        return value

    def _again(self, at: At, step: _Step, value: fx.Node) -> fx.Node:
        node, before = step.node, step.before
        args = list(node.args[1:])
        held = _dim(node) in before.axes
        if is_op(node, *_SPLITS) or (is_op(node, *_CUTS) and held):
            return value
        if is_op(node, operator.getitem):
            split = node.args[0]
            unbound = is_op(split, aten.unbind.int)
            return at.call(aten.select.int, value, _dim(split), 0) if unbound else value  # type: ignore[arg-type]
        if is_op(node, aten.unbind.int):
            return value
        if is_op(node, aten.select.int) and held:
            args[1] = 0
        elif is_op(node, *_SIZED, aten.unflatten.int):
            args[-1] = self._sizes(step, args)
        elif is_op(node, aten.squeeze.default):
            before_sizes = shape_of(node.args[0]) or ()  # type: ignore[arg-type]
            args = [[i for i, size in enumerate(before_sizes) if same_size(size, 1)]]
            return at.call(aten.squeeze.dims, value, *args)
        return at.call(node.target, value, *args, **node.kwargs)

    def _sizes(self, step: _Step, args: list[Any]) -> list[Any]:
        """The sizes of a reshape with those of the channel axes made to fit the piece."""
        own = _kept(step.after, self.rows)
        assert own is not None
        first = _dim(step.node) if is_op(step.node, aten.unflatten.int) else 0
        axes = step.after.axes
        return [own[first + i] if first + i in axes else s for i, s in enumerate(args[-1])]


def pieces(linear: fx.Node) -> list[Piece] | Miss | None:
    """The pieces that all readers of a linear op are content with, at least two of them.

    None if it is read in one, a Miss if one reader is not content. Parts that are joined side by
    side again, as the halves of a rotary embedding are, make one piece.
    """
    found, whole = _walk(linear, seed(linear, -1), ())
    if not found or len({p.rows for p in found}) < 2 or _rejoined(found):
        return None
    if whole:
        reader = whole[0]
        how = "is an output" if reader.op == "output" else f"reads it whole ({op_name(reader)})"
        return Miss(
            f"{found[0].node.name} is a part of {linear.name}, but {reader.name} {how}",
            reader,
            True,
        )
    for piece in found:
        words = _irregular(piece)
        if words:
            return Miss(words, piece.node, at_site=True)
    return found


def _walk(
    node: fx.Node, channels: Channels, path: tuple[_Step, ...]
) -> tuple[list[Piece], list[fx.Node]]:
    """The pieces of a value, and the readers that take it as it is."""
    found: list[Piece] = []
    whole: list[fx.Node] = []
    for reader in readers(node):
        after = through(reader, node, channels) if not is_hook(reader) else ""
        if isinstance(after, str):
            whole.append(reader)
            continue
        step = (*path, _Step(reader, channels, after))
        inner, others = _walk(reader, after, step)
        rows = tuple(sorted(set(after.idx.flatten().tolist())))
        part = not after.parts and len(rows) < channels.count and _is_cut(reader, channels, after)
        if part and (others or not inner or len({p.rows for p in inner}) < 2 or _rejoined(inner)):
            found.append(Piece(reader, rows, steps_of(rows, channels.count) or (0, 0, 0), step))
        else:
            found += inner
            whole += others
    return found, whole


def _is_cut(reader: fx.Node, before: Channels, after: Channels) -> bool:
    """Whether a node takes some of the channels of what it reads, or is one part of a split."""
    if is_op(reader, operator.getitem):
        return True
    return len(after.idx.unique()) < len(before.idx.unique())


def _irregular(piece: Piece) -> str:
    """Why the views of a piece cannot be applied to it alone; empty if they can."""
    if not piece.steps[1]:
        return f"the rows of {piece.node.name} lie in no regular pattern"
    for step in piece.path:
        node = step.node
        if is_op(node, *_LIKE_ANOTHER):
            return f"{node.name} takes its sizes from another value"
        if is_op(node, *_SPLITS, aten.unbind.int) and _dim(node) not in step.before.axes:
            return f"{node.name} splits an axis that holds no channels"
        if not step.after.parts and _kept(step.after, piece.rows) is None:
            return f"the channels of {piece.node.name} are no block of {node.name}"
    return ""


def _kept(channels: Channels, rows: tuple[int, ...]) -> list[int] | None:
    """How many entries of each axis are of these channels; None if they make no block."""
    mask = torch.isin(channels.idx, torch.tensor(rows))
    block = torch.ones_like(mask)
    sizes = []
    for axis in range(mask.ndim):
        others = [a for a in range(mask.ndim) if a != axis]
        own = mask.any(dim=others, keepdim=True) if others else mask
        sizes.append(int(own.sum()))
        block &= own
    return sizes if torch.equal(block, mask) else None


def _rejoined(found: list[Piece]) -> bool:
    """Whether two of the pieces stand side by side again before anything is summed over them."""
    met: dict[fx.Node, dict[int, set[int]]] = {}
    for number, piece in enumerate(found):
        stack, seen = [piece.node], {piece.node}
        while stack:
            node = stack.pop()
            for reader in readers(node):
                if is_op(reader, *_JOINS):
                    places = {i for i, n in enumerate(argument(reader, "tensors")) if n is node}
                    met.setdefault(reader, {}).setdefault(number, set()).update(places)
                elif reader not in seen and op_name(reader) not in _CONTRACT:
                    seen.add(reader)
                    stack.append(reader)
    return any(len(by) > 1 and len(set().union(*by.values())) > 1 for by in met.values())


def _dim(node: fx.Node) -> int:
    """The axis that a node works along, -1 if it names none."""
    try:
        dim = argument(node, "dim")
    except KeyError:
        return -1
    rank = len(shape_of(node.args[0]) or ())  # type: ignore[arg-type]
    return int(dim) % rank if isinstance(dim, int) and rank else -1
