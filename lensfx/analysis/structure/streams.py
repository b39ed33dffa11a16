"""Streams from chains: the end, the writes back to the start, and the region behind each write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from lensfx.analysis.structure.chain import Chains, Site
from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.labels import Labels
from lensfx.analysis.structure.mixing import mixing
from lensfx.graph.node import argument, is_op, op_name

__all__ = ["Line", "Region", "Streams", "WriteSite"]

aten = torch.ops.aten

_DATA = "data"


@dataclass
class Region:
    """The nodes behind one write, what they read of its stream, of other branches and streams.

    `entries` pair a value of the stream with its reader, `crossing` are values of other branches,
    `foreign` values of other streams and `stem` values from ahead of its own.
    """

    nodes: list[fx.Node]
    entries: list[tuple[fx.Node, fx.Node]]
    crossing: list[fx.Node]
    foreign: list[fx.Node]
    stem: list[fx.Node]


_NOTHING = Region([], [], [], [], [])


@dataclass
class WriteSite:
    """A site of a stream with the part of the write it stands for: one leaf of its sum."""

    site: Site
    value: fx.Node
    reader: fx.Node
    region: Region | None = None


@dataclass
class Line:
    """A stream as found: sites in order, the values it consists of, stage boundaries.

    `stem` is the set of all that its start is computed from, `origin` the values among them that
    add up to it, through norms and projections.
    """

    start: fx.Node
    end: fx.Node
    sites: list[Site]
    values: set[fx.Node]
    stages: list[fx.Node]
    stem: int = 0
    origin: list[fx.Node] = field(default_factory=list)
    writes: list[WriteSite] = field(default_factory=list)


class Streams:
    """Every residual stream of a program, the one that leads to the outputs last."""

    def __init__(self, flow: Flow, labels: Labels, chains: Chains) -> None:
        self.flow, self.labels, self.chains = flow, labels, chains
        self.above = self._dominators()
        self.owner: dict[fx.Node, fx.Node | None] = {}
        self.lines: list[Line] = []
        main = self._main()
        if main is not None:
            self.lines = [*self._others(main), main]
            for line in self.lines[:-1]:
                line.values |= self._behind_end(line)
            values = {n for line in self.lines for n in line.values}
            for line in self.lines:
                line.stem = self._stem(line)
            for line in self.lines:
                self._regions(line, values)
                line.start = self._first_read(line)
                line.origin = self._origin(line, values)

    def _dominators(self) -> dict[Any, Any]:
        """For each wanted value the last one that every path from the data to it goes through."""
        graph = nx.DiGraph()
        for node in self.flow.members(self.flow.wanted):
            graph.add_edges_from((dep, node) for dep in self.flow.deps[node] or (_DATA,))
        return dict(nx.immediate_dominators(graph, _DATA)) if graph else {}

    def _main(self) -> Line | None:
        """The stream that the first output with one rests on."""
        for output in self.flow.outputs:
            node: fx.Node | None = self.flow.rep(output) if output in self.flow.live else None
            while node is not None:
                if self.chains.chain(node).depth > 0:
                    return self._line(node)
                above = self.above.get(node)
                node = above if isinstance(above, fx.Node) else None
        # An output that two streams meet in is behind neither of them alone.
        ends = [n for n in self._roots() if self.chains.of[n].depth > 1]
        end = max(ends, key=lambda n: (self.chains.total[n], -self.flow.rank[n]), default=None)
        return self._line(end) if end is not None else None

    def _roots(self) -> list[fx.Node]:
        """The wanted values that are no view, scale or norm of another one."""
        return [n for n in self.flow.members(self.flow.wanted) if self.chains.root(n) is n]

    def _line(self, end: fx.Node) -> Line:
        """The sites from the end of a stream back to its start, through changes of its form."""
        sites: list[Site] = []
        values: set[fx.Node] = set()
        stages: list[fx.Node] = []
        node = end
        while True:
            passed = self.chains.passed(node)
            values.update(passed)
            root = passed[-1]
            chain = self.chains.of[root]
            if chain.site is not None:
                sites.append(chain.site)
                node = chain.site.source
                values.update(self.chains.passed(chain.site.carry))
                continue
            behind = self._behind(root)
            if behind is None:
                break
            stages.append(root)
            node = behind
        start = sites[-1].source if sites else root
        return Line(start, self.chains.root(end), sites[::-1], values, stages[::-1])

    def _behind(self, start: fx.Node) -> fx.Node | None:
        """Where the stream goes on behind a projection or a join; None at its true start."""
        deps = self.flow.deps[start]
        if not deps:
            return None
        totals = {d: self._total(d) for d in deps}
        best = max(deps, key=totals.__getitem__)
        above = self.above.get(start)
        if totals[best] == 0 or self._joins(start):
            return None
        if isinstance(above, fx.Node) and self._total(above) >= totals[best]:
            return above
        return best

    def _joins(self, node: fx.Node) -> bool:
        """Whether a stream is put beside positions that start here: those of images before text."""
        if op_name(node) not in ("cat", "masked_scatter", "index_put", "where"):
            return False
        if is_op(node, aten.cat.default):
            axes = self.labels.of.get(node, [])
            if not self.labels.has_positions(axes[argument(node, "dim")] if axes else ()):
                return False
        return any(
            not any(map(is_weight_linear, (d, *self.flow.members(self.flow.above[d]))))
            for d in self.flow.deps[node]
        )

    def _total(self, node: fx.Node) -> int:
        return self.chains.total[self.chains.root(node)]

    def _others(self, main: Line) -> list[Line]:
        """Streams beside the main one: encoders it reads, towers that outputs read."""
        found: list[Line] = []
        taken = set(main.values) | self._known(main)
        while True:
            roots = [
                n
                for n in self._roots()
                if n not in taken
                and self.chains.of[n].depth > 1
                and not self._within(n, [main, *found])
                and not self._inside_branch(n, main)
            ]
            if not roots:
                return found[::-1]
            end = max(roots, key=lambda n: (self.chains.of[n].depth, self.flow.rank[n]))
            line = self._line(end)
            found.append(line)
            taken |= line.values | self._known(line)

    def _known(self, line: Line) -> set[fx.Node]:
        return {s.add for s in line.sites}

    def _within(self, node: fx.Node, lines: Iterable[Line]) -> bool:
        """Whether a value is computed from a stream: then it is part of a branch or a head."""
        return any(self.flow.reaches(line.start, node) for line in lines)

    def _inside_branch(self, node: fx.Node, main: Line) -> bool:
        """Whether a chain lies ahead of a stream's start: a stem with adds of its own."""
        start = self.chains.root(self.flow.rep(main.start))
        return self.flow.reaches(node, main.start) and not self._joins(start)

    def _behind_end(self, line: Line) -> set[fx.Node]:
        """The norm, and views, through which all that reads a stream's end reads it."""
        node, found = line.end, {line.end}
        while True:
            read = self.flow.readers[node]
            norms = [m for m in self.chains.norms.values() if m.value is node]
            if norms and set(read) <= set(norms[0].nodes):
                found.update(norms[0].nodes)
                node = norms[0].node
            elif len(read) == 1 and self.chains.root(read[0]) is line.end:
                node = read[0]
            else:
                return found
            found.add(node)

    def _stem(self, line: Line) -> int:
        """The values a stream's start is computed from, as a set."""
        start = self.flow.rep(line.start)
        bits = self.flow.above[start] | (1 << self.flow.rank[start])
        for node in self.chains.passed(line.start):
            bits |= self.flow.above[node] | (1 << self.flow.rank[node])
        return bits

    def _first_read(self, line: Line) -> fx.Node:
        """The start as branches read it, ahead of views and scales that only carry it on."""
        passed = self.chains.passed(line.start)
        read = {self.flow.rep(n) for w in line.writes for n, _ in (w.region or _NOTHING).entries}
        return next((n for n in reversed(passed) if n in read), line.start)

    def _origin(self, line: Line, values: set[fx.Node]) -> list[fx.Node]:
        """The values that a start is the sum of, itself included; the insides of norms are not."""
        inside = {n for norm in self.chains.norms.values() for n in norm.nodes}
        start = self.flow.rep(line.start)
        stack, seen = [start], {start}
        while stack:
            node = stack.pop()
            deps = self.flow.deps[node]
            if len(deps) > 1 and not is_op(node, aten.add.Tensor):
                above = self.above.get(node)
                deps = (above,) if isinstance(above, fx.Node) else ()
            new = [d for d in deps if d not in seen and (d in line.values or d not in values)]
            seen.update(new)
            stack.extend(new)
        return sorted(seen - inside, reverse=True)

    def _regions(self, line: Line, values: set[fx.Node]) -> None:
        """The region behind each write, in order, split where a write is a sum of branches."""
        homes = self._homes(line)
        for site in line.sites:
            for value, reader in self._leaves(site.write, site.add, line, values):
                region = self._region(value, site, line, values, homes)
                line.writes.append(WriteSite(site, value, reader, region))

    def _homes(self, line: Line) -> dict[fx.Node, fx.Node]:
        """For each value the latest value of the stream that it is computed from."""
        found: dict[fx.Node, fx.Node] = {}
        rank = self.flow.rank
        for node in self.flow.nodes:
            if node not in self.flow.live:
                continue
            read = [
                self.chains.root(d) if d in line.values else found[d]
                for d in self.flow.deps[node]
                if d in line.values or d in found
            ]
            if read:
                found[node] = max(read, key=rank.__getitem__)
        return found

    def _leaves(
        self, value: fx.Node, reader: fx.Node, line: Line, values: set[fx.Node]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """The branches that a write is the sum of: split where one side mixes and one does not."""
        node = self.flow.rep(value)
        sides = node.args[:2] if is_op(node, aten.add.Tensor) else ()
        live = [n for n in sides if isinstance(n, fx.Node) and n in self.flow.live]
        if len(live) != 2 or len(self.flow.readers[node]) != 1 or argument(node, "alpha") != 1:
            return [(value, reader)]
        behind = [self._behind_leaf(n, line, values) for n in live]
        mixed = [bool(mixing(self.labels, nodes)) for nodes in behind]
        if mixed[0] == mixed[1] or not all(any(map(is_weight_linear, ns)) for ns in behind):
            return [(value, reader)]
        return [leaf for n in live for leaf in self._leaves(n, node, line, values)]

    def _behind_leaf(self, value: fx.Node, line: Line, values: set[fx.Node]) -> set[fx.Node]:
        """What one side of a sum is computed from, back to the stream."""
        found: set[fx.Node] = set()
        stack = [self.flow.rep(value)]
        while stack:
            node = stack.pop()
            if node in found or node in values or line.stem >> self.flow.rank[node] & 1:
                continue
            found.add(node)
            stack.extend(self.flow.deps[node])
        return found

    def _region(
        self,
        value: fx.Node,
        site: Site,
        line: Line,
        values: set[fx.Node],
        homes: dict[fx.Node, fx.Node],
    ) -> Region:
        """What a write is computed by: back from it to streams, stems and other branches.

        A branch of another home than the write's own, that is: of another stream value that it
        reads last, is not part of this one.
        """
        found = Region([], [], [], [], [])
        top = self.flow.rep(value)
        stack = [(top, site.add), *((gate, site.add) for gate in site.gates)]
        if site.fused:
            found.nodes.append(top)
            stack = [(d, top) for d in self.flow.deps[top] if d is not self.flow.rep(site.carry)]
        known = [self.chains.root(n) if n in line.values else homes.get(n) for n, _ in stack]
        home = max((h for h in known if h is not None), default=None)
        seen: set[fx.Node] = set()
        while stack:
            node, reader = stack.pop()
            if node in line.values:
                found.entries.append((node, reader))
                continue
            if node in seen:
                continue
            seen.add(node)
            if node in values:
                found.foreign.append(node)
            elif line.stem >> self.flow.rank[node] & 1:
                found.stem.append(node)
            elif self.owner.setdefault(node, home) is not home:
                found.crossing.append(node)
            else:
                found.nodes.append(node)
                stack.extend((dep, node) for dep in self.flow.deps[node])
        found.nodes.sort()
        return found
