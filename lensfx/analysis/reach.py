"""Which linear ops take up a scale or a shift of a value's channels, and all that lies between.

One pass over the graph from the value on. Each node that reads the value, or what carries its
channels on, carries them too, is a sink that can take the scale and shift into its weight, or
forbids it. `reach_rules.py` has the rules by operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.channels import Channels, fixed, replay, seed
from lensfx.analysis.reach_products import Uneven
from lensfx.analysis.reach_rules import Reading, follow
from lensfx.analysis.sinks import Sink
from lensfx.errors import LensError
from lensfx.graph.node import shape_of, where
from lensfx.graph.ops import data_inputs, readers
from lensfx.rewrite import Edit

__all__ = ["Reach", "Refused", "follow_all", "reach"]


@dataclass(frozen=True)
class Refused:
    """Who cannot do with another scale or shift, and why.

    `path` leads from the value to what `node` reads, both included, and `channels` are those of
    what it reads. `count` is the number of such nodes, of which this one is nearest to the value.
    `mixes`: what forbids it is that weights of rows, as those of attention, need not add up to one.
    """

    value: fx.Node
    node: fx.Node
    reason: str
    path: tuple[fx.Node, ...]
    channels: Channels = field(repr=False, compare=False)
    count: int = 1
    mixes: bool = False


@dataclass(frozen=True)
class Reach:
    """Where the channels of a value go: `sinks` that take them up, `carried` on the way there.

    `refused` are the readers that forbid it, nearest first. `mixed` are the values of `carried`
    that come by sums over positions whose weights add up to one, as attention makes them.
    A split stands among `carried` beside its parts.
    """

    value: fx.Node
    sinks: tuple[Sink, ...]
    carried: Mapping[fx.Node, Channels] = field(repr=False)
    refused: tuple[Refused, ...] = ()
    mixed: frozenset[fx.Node] = frozenset()

    def changed(
        self,
        edit: Edit,
        scale: fx.Node | None = None,
        shift: fx.Node | None = None,
        only: Iterable[int] | None = None,
    ) -> None:
        """Say of every value on the way how it follows from what it is without scale and shift.

        `only`: the channels that have changed.
        """
        moved = None if only is None else set(only)
        for node, channels in self.carried.items():
            if shape_of(node) is None or not (moved is None or moved & channels.numbers):
                continue
            at, first = edit.before(node), node is self.value
            vectors: dict[str, Any] = {}
            if scale is not None:
                vectors["scale"] = scale if first else replay(at, scale, channels, 1.0)
            if shift is not None:
                there = shift if first else replay(at, shift, channels, 0.0, scaled=True)
                vectors["shift"] = there
            edit.changes(node, **vectors)

    def copied(self, edit: Edit, other: fx.Node) -> dict[fx.Node, fx.Node]:
        """Every value that a sink reads, or that leads there, made of `other` instead."""
        needed = {sink.value for sink in self.sinks}
        for node in reversed(tuple(self.carried)):
            if node in needed and node is not self.value:
                needed.update(n for n in node.all_input_nodes if n in self.carried)
        twins = {self.value: other}
        for node in self.carried:
            if node in needed and node is not self.value:
                given = (node.args, dict(node.kwargs))
                args, kwargs = fx.node.map_arg(given, lambda n: twins.get(n, n))
                twins[node] = edit.before(node).call(node.target, *args, **kwargs)
        return twins


def reach(
    value: fx.Node, axis: int = -1, *, scale: bool = True, shift: bool = True
) -> Reach | Refused:
    """Every reader that a scale, and a shift, of the channels along one axis ends in.

    All of them are linear sinks; else the refusal is nearest to the value. It holds for every
    value of the inputs and of the other parameters. The graph must be functional.

    Raises: LensError if the value has no such axis of a fixed size.
    """
    found = follow_all(value, axis, scale=scale, shift=shift)
    if found.refused:
        return found.refused[0]
    if not found.sinks:
        channels = found.carried[value]
        return Refused(value, value, "no reader can take it up", (value,), channels, 0)
    return found


def follow_all(value: fx.Node, axis: int = -1, *, scale: bool = True, shift: bool = True) -> Reach:
    """As `reach`, with every refusal beside the sinks; a shift of 0 is wanted by all of them."""
    shape = shape_of(value)
    if not shape or not -len(shape) <= axis < len(shape) or fixed(shape[axis]) is None:
        headline = f"axis {axis} of this value has no fixed number of channels"
        raise LensError(headline, at=where(value), hint="ask about an axis that a weight fixes")
    walk = _Walk(value, axis, scale, shift)
    while walk.waiting:
        walk.visit(min(walk.waiting))
    return walk.found()


class _Walk:
    """Visits, in graph order, every node that reads a value with known channels."""

    def __init__(self, value: fx.Node, axis: int, scale: bool, shift: bool) -> None:
        self.value = value
        self.carried: dict[fx.Node, Channels] = {value: seed(value, axis)}
        self.waiting: set[fx.Node] = set(readers(value))
        self._need = (scale, shift)
        self._came: dict[fx.Node, fx.Node] = {}
        self._depth: dict[fx.Node, int] = {value: 0}
        self._mixed: set[fx.Node] = set()
        self._sinks: list[Sink] = []
        self._refused: list[Refused] = []

    def visit(self, node: fx.Node) -> None:
        self.waiting.discard(node)
        sources = [n for n in data_inputs(node) if n in self.carried]
        nearest = min(sources, key=self._depth.__getitem__)
        self._came[node], self._depth[node] = nearest, self._depth[nearest] + 1
        if node.op == "output":
            for source in sources:
                self._refuse(node, source, _as_output(node, source))
            return
        found = follow(Reading(node, self.carried, *self._need))
        if isinstance(found, str):
            for source in sources:
                self._refuse(node, source, found)
            return
        mixed = any(s in self._mixed for s in sources) or found.mixes
        if isinstance(found, Sink):
            self._sinks.append(found.after_rows() if mixed else found)
            return
        for source, words in found.beside:
            self._refuse(node, source, words)
        self.carried[node] = found.channels
        self._mixed.update({node} if mixed else ())
        self.waiting.update(readers(node))

    def _path(self, node: fx.Node) -> tuple[fx.Node, ...]:
        path = [node]
        while path[-1] is not self.value:
            path.append(self._came[path[-1]])
        return tuple(reversed(path))

    def _refuse(self, node: fx.Node, source: fx.Node, reason: str) -> None:
        path, channels = self._path(source), self.carried[source]
        mixes = isinstance(reason, Uneven)
        blamed = reason.node if isinstance(reason, Uneven) else node
        self._refused.append(Refused(self.value, blamed, str(reason), path, channels, mixes=mixes))

    def found(self) -> Reach:
        nearest = sorted(self._refused, key=lambda r: len(r.path))
        count = len(nearest)
        refused = tuple(replace(r, count=count) for r in nearest)
        return Reach(self.value, tuple(self._sinks), self.carried, refused, frozenset(self._mixed))


def _as_output(output: fx.Node, value: fx.Node) -> str:
    k = next(i for i, leaf in enumerate(pytree.tree_leaves(output.args[0])) if leaf is value)
    return f"it is output {k} of the model; allowed only under a contract that names it"
