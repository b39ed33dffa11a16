"""Residual chains: for each value how many adds its stream has behind it, and where it starts.

A value is stripped of casts, views, scales, shifts and norms; what is left is an add of two live
values, one of which may be the stream that the other was computed from, or it starts a chain.
Where a stream is gated, or mixed with copies of itself, on its way to the add, the carry is soft.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.labels import Labels
from lensfx.analysis.structure.normalise import Norm
from lensfx.analysis.structure.soft import Soft, leaves
from lensfx.graph.node import argument, is_op, op_name, shape_of
from lensfx.graph.ops import VIEWS

__all__ = ["Chain", "Chains", "Site"]

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, aten.sub.Tensor)
_AFFINE = frozenset({"mul", "div", "add", "sub", "masked_fill", "where", "neg", "rsub"})
_PARTS = frozenset({"cat", "pad", "constant_pad_nd", "slice", "index", "select", "flip", "roll"})
_SUMS = frozenset({"sum", "mean"})


@dataclass(frozen=True)
class Site:
    """A write: `add` = `carry` + `write`, the operands as they stand.

    `write` is `add` itself where a product is fused with the add and has no value of its own.
    `gates` are what the carry was multiplied by on its way here; then it is soft, and `source` is
    the stream before that.
    """

    add: fx.Node
    carry: fx.Node
    write: fx.Node
    source: fx.Node
    gates: tuple[fx.Node, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether what is written has no value of its own."""
        return self.write is self.add


@dataclass(frozen=True)
class Chain:
    """What a value is in its stream: the adds behind it, the last of them, and the start."""

    depth: int
    site: Site | None
    start: fx.Node


class Chains:
    """The chain of every live value, found bottom up."""

    def __init__(self, flow: Flow, labels: Labels, norms: dict[fx.Node, Norm]) -> None:
        self.flow, self.labels, self.norms = flow, labels, norms
        self._root: dict[fx.Node, fx.Node] = {}
        self._below: dict[fx.Node, fx.Node | None] = {}
        self.of: dict[fx.Node, Chain] = {}
        self.total: dict[fx.Node, int] = {}
        for node in flow.nodes:
            if node in flow.live:
                self._add(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The value behind casts, views, scales, shifts and norms."""
        found = self._root[node]
        while (soft := self._below[found]) is not None:
            found = self._root[soft]
        return found

    def chain(self, node: fx.Node) -> Chain:
        """The chain of a value."""
        return self.of[self.root(node)]

    def passed(self, node: fx.Node) -> list[fx.Node]:
        """The values between a value and its root, both included, latest first."""
        found = [node]
        while (below := self._below[node]) is not None:
            node = below
            found.append(node)
        return found

    def _of(self, node: fx.Node) -> fx.Node | None:
        """The value that a view, scale, shift or norm is of; None if the node is none of these."""
        same = self.flow.rep(node)
        if same is not node:
            return same
        norm = self.norms.get(node)
        if norm is not None:
            return self.flow.rep(norm.value)
        deps = self.flow.deps[node]
        if node in self.flow.seeds:
            return None
        if len(deps) != 1:
            return self._rescaled(node)
        name = op_name(node)
        if name in _AFFINE or node.target in VIEWS:
            inside = name in ("select", "index", "slice")
            return deps[0] if not inside or self._along_positions(node) else None
        if name in _SUMS:
            return deps[0] if self._over_copies(node) else None
        return deps[0] if name in _PARTS and self._along_positions(node) else None

    def _rescaled(self, node: fx.Node) -> fx.Node | None:
        """The operand of `l0 * x + l1 * x`, which is x, scaled; None if a side moved positions."""
        pair = self._operands(node)
        if pair is None or self.root(pair[0]) is not self.root(pair[1]):
            return None
        return None if any(map(self._moved, pair)) else pair[0]

    def _moved(self, node: fx.Node) -> bool:
        """Whether a value is its root with positions changed."""
        return any(self.labels.position_mixes(n) for n in self.passed(node)[:-1])

    def _over_copies(self, node: fx.Node) -> bool:
        """Whether a sum is over copies of a stream: neither over positions nor over features."""
        before, after = shape_of(self.flow.deps[node][0]) or (), shape_of(node) or ()
        if self.labels.mixed.get(node) or len(before) < 4 or not after:
            return False
        return self.labels.axes(node)[-1] == self.labels.axes(self.flow.deps[node][0])[-1]

    def _along_positions(self, node: fx.Node) -> bool:
        """Whether what a part, pad or cat changes are positions, so that features stay whole."""
        kept = [a.label for a in self.labels.features(node)]
        before = [a.label for a in self.labels.features(self.flow.deps[node][0])]
        return kept == before

    def _add(self, node: fx.Node) -> None:
        below = self._below[node] = self._of(node)
        if below is not None:
            self._root[node] = self.root(below)
            return
        self._root[node] = node
        self.of[node] = self._chain(node)
        start = self.of[node].start
        behind = max((self.total[self.root(d)] for d in self.flow.deps[start]), default=0)
        self.total[node] = self.of[node].depth + behind

    def _chain(self, node: fx.Node) -> Chain:
        site = self._fused(node) or self._site(node)
        if site is None:
            return Chain(0, None, node)
        below = self.chain(site.source)
        return Chain(below.depth + 1, site, below.start)

    def _site(self, node: fx.Node) -> Site | None:
        pair = self._operands(node)
        if pair is None:
            return None
        a, b = pair
        if self.root(a) is self.root(b):
            # The stream and a shift of it: what stands still carries.
            chosen = None if self._moved(a) == self._moved(b) else self._moved(b)
        else:
            chosen = self._carry(self.root(a), self.root(b))
        if chosen is None:
            return self._soft(node, a, b)
        carry, write = (a, b) if chosen else (b, a)
        return Site(node, carry, write, carry)

    def _operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        if not is_op(node, *_ADDS):
            return None
        a, b = node.args[:2]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        live = a in self.flow.live and b in self.flow.live
        return (self.flow.rep(a), self.flow.rep(b)) if live else None

    def _fused(self, node: fx.Node) -> Site | None:
        """The write of a product that is added to the stream by the same operator."""
        product = is_op(node, aten.addmm.default, aten.baddbmm.default) and is_weight_linear(node)
        if not product and not is_op(node, aten.addcmul.default):
            return None
        carry = argument(node, "self")
        read = [n for n in self.flow.deps[node] if n is not self.flow.rep(carry)]
        if carry not in self.flow.live or not read:
            return None
        carry = self.flow.rep(carry)
        chain = self.chain(carry)
        origin = chain.start if chain.depth else self.root(carry)
        if not any(self.flow.reaches(origin, n) for n in read):
            return None
        return Site(node, carry, node, carry)

    def _carry(self, a: fx.Node, b: fx.Node) -> bool | None:
        """Whether the first of two roots carries the stream; None if neither does."""
        above = self.flow.reaches
        (da, sa), (db, sb) = ((c.depth, c.start) for c in (self.of[a], self.of[b]))
        if sa is sb:
            first = da > db or (da == db and not above(a, b))
            return first is not self._normed_inside(*((a, b) if first else (b, a)))
        if above(a, sb):
            return True
        if above(b, sa):
            return False
        if (da > 0) != (db > 0):
            deep, other = (sa, sb) if da else (sb, sa)
            if above(deep, other) or not above(other, deep):
                return da > 0
        return None

    def _normed_inside(self, deep: fx.Node, other: fx.Node) -> bool:
        """Whether a value adds to a norm of the other: `x + (norm(x) + f)` is a write to x."""
        site = self.of[deep].site
        if site is None or self.root(site.carry) is not other:
            return False
        return any(n in self.norms for n in self.passed(site.carry))

    def _soft(self, node: fx.Node, a: fx.Node, b: fx.Node) -> Site | None:
        """The write to a stream one side of the add is a gate or a mix of, found by its leaves."""
        sides = [leaves(self.flow, self.labels, self.root(v)) for v in (a, b)]
        first, second = (self._source(own, other) for own, other in (sides, sides[::-1]))
        if first is not None and second is not None:
            # A gate may be part of both sides; the stream is what the gate was computed from.
            early = self.flow.reaches(first.node, second.node)
            first, second = (first, None) if early else (None, second)
        found = first or second
        if found is None:
            return None
        carry, write = (a, b) if first else (b, a)
        gates = [leaf.node for leaf in sides[first is None] if leaf is not found]
        # The stream as it stands, before what it is a view or scale of.
        whole = next(n for n in found.path if self.root(n) is self.root(found.node))
        path = found.path[: found.path.index(whole) + 1]
        for upper, lower in pairwise(path):
            self._below[upper] = lower
        return Site(node, carry, write, whole, tuple(gates))

    def _source(self, own: list[Soft], other: list[Soft]) -> Soft | None:
        """The leaf that what is on the other side was computed from: the latest of several."""
        found = [
            leaf
            for leaf in own
            if len(leaf.path) > 1
            and any(o.node is not leaf.node and self.flow.reaches(leaf.node, o.node) for o in other)
        ]
        return max(
            found,
            key=lambda leaf: (self.total[self.root(leaf.node)], self.flow.rank[leaf.node]),
            default=None,
        )
