"""Which channel of a vector each entry of a value belongs to, and that vector at the value.

Channels are numbered where they start, at the last axis of a norm or the entries of a bias. Every
view is run on the numbers themselves, with size 1 along the axes that no number depends on, so
that those axes may be dynamic. The calls are kept: run on the vector, they give a weight that
broadcasts against the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.axes import Shape, is_one
from lensfx.graph.node import shape_of
from lensfx.rewrite import At

__all__ = [
    "FILL",
    "VECTOR",
    "Channels",
    "Made",
    "broadcast",
    "fixed",
    "joined",
    "replay",
    "seed",
]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Made:
    """`target(*args)`, where an argument may be another call, the vector itself or FILL."""

    target: Any
    args: tuple[Any, ...] = ()


VECTOR = Made(None)


class _Fill:
    """The number at entries that belong to no channel: 1 in a scale, 0 in a shift."""


FILL = _Fill()


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel numbers of a value: `idx` has its rank, and size 1 along all but `axes`.

    An entry of -1 belongs to no channel. `made` is how `idx` follows from the numbers in order,
    `factors` are numbers and single weights by which a shift of the channels was multiplied since.
    A value with several parts, as a split, has the channels of each in `parts`.
    """

    idx: torch.Tensor
    axes: frozenset[int]
    count: int
    made: Made = VECTOR
    factors: tuple[Any, ...] = ()
    parts: tuple[Channels, ...] = field(default=(), repr=False)

    @cached_property
    def in_order(self) -> bool:
        """Whether the entries, read row by row, are the channels in order, each once."""
        return torch.equal(self.idx.flatten(), torch.arange(self.count))

    @cached_property
    def numbers(self) -> frozenset[int]:
        """The channels that some entry belongs to."""
        return frozenset(self.idx.flatten().tolist()) - {-1}

    def call(self, target: Any, *args: Any, axes: Iterable[int]) -> Channels:
        """The channels of `target(value, *args)`, which has them along `axes`."""
        made = Made(target, (self.made, *args))
        return replace(
            self,
            idx=target(self.idx, *_filled(args, -1)),
            axes=frozenset(axes),
            made=made,
            parts=(),
        )

    def shaped(self, sizes: Sequence[int], axes: Iterable[int]) -> Channels:
        """The channels in another shape of as many entries."""
        if list(sizes) == list(self.idx.shape):
            return replace(self, axes=frozenset(axes), parts=())
        return self.call(aten.reshape.default, list(sizes), axes=axes)

    def times(self, *factors: Any) -> Channels:
        """The channels of the value times numbers or single weights."""
        return replace(self, factors=(*self.factors, *factors))


def seed(node: fx.Node, axis: int) -> Channels:
    """The entries along one axis of a value, numbered. The size of the axis must be fixed."""
    shape = shape_of(node) or ()
    axis %= len(shape)
    count = fixed(shape[axis])
    if count is None:
        raise ValueError(f"axis {axis} of {node.name} has no fixed size")
    start = Channels(torch.arange(count), frozenset({0}), count)
    return start.shaped([count if a == axis else 1 for a in range(len(shape))], {axis})


def fixed(size: int | torch.SymInt) -> int | None:
    """The size as a number, None if it depends on the inputs; nothing is specialised."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)


def replay(
    at: At, vector: fx.Node, channels: Channels, fill: float = 0.0, scaled: bool = False
) -> fx.Node:
    """The vector at the value: size 1 along the axes that are no channel axes.

    `fill` stands at entries that belong to no channel. `scaled`: times the factors, as a shift is.
    """
    known: dict[int, fx.Node] = {id(VECTOR): vector}

    def given(arg: Any) -> Any:
        if isinstance(arg, list):
            return [given(a) for a in arg]
        if isinstance(arg, Made):
            return run(arg)
        return fill if arg is FILL else arg

    def run(made: Made) -> fx.Node:
        if id(made) not in known:
            known[id(made)] = at.call(made.target, *map(given, made.args))
        return known[id(made)]

    found = run(channels.made)
    for factor in channels.factors if scaled else ():
        found = at.call(aten.mul.Tensor, found, factor)
    return found


def _filled(args: Any, fill: int) -> Any:
    return pytree.tree_map(lambda a: fill if a is FILL else a, args)


def joined(parts: Sequence[Channels], axis: int) -> Channels:
    """The channels of `cat` of values along one axis, all of them numbered from one vector."""
    first = parts[0]
    axes = frozenset({axis}).union(*(p.axes for p in parts))
    made = Made(aten.cat.default, ([p.made for p in parts], axis))
    return replace(first, idx=torch.cat([p.idx for p in parts], axis), axes=axes, made=made)


def broadcast(channels: Channels, before: Shape, after: Shape) -> Channels:
    """The channels of a value that is repeated along axes to fit a larger shape."""
    new = len(after) - len(before)
    # A channel axis of size 1 that is repeated holds one channel, as a data axis does.
    kept = (a for a in channels.axes if not is_one(before[a]) or is_one(after[a + new]))
    return channels.shaped([1] * new + list(channels.idx.shape), {a + new for a in kept})
