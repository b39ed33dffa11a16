"""The structure of a program, put together, with a check that nothing was left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import fx

from lensfx.analysis.structure.attention import SDPA, is_product
from lensfx.analysis.structure.blocks import grouped
from lensfx.analysis.structure.branches import Branches
from lensfx.analysis.structure.chain import Chains
from lensfx.analysis.structure.facts import AttentionBranch, Note, Stream, Write
from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.labels import Labels
from lensfx.analysis.structure.layout import row_layout
from lensfx.analysis.structure.normalise import Norm, find_norms
from lensfx.analysis.structure.points import Point, points
from lensfx.analysis.structure.stem import embeddings
from lensfx.analysis.structure.streams import Line, Streams, WriteSite
from lensfx.analysis.unembed import unembedding
from lensfx.graph.layout import Layout
from lensfx.graph.node import argument, is_op, op_name
from lensfx.graph.program import Program

__all__ = ["Search"]

aten = torch.ops.aten


class Search:
    """One search over one program; `streams` are what it found, `unclaimed` what it did not."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flow = Flow(program)
        self.labels = Labels(self.flow)
        self.norms = find_norms(self.flow, self.labels)
        self.chains = Chains(self.flow, self.labels, self.norms)
        self.found = Streams(self.flow, self.labels, self.chains)
        self.branches = Branches(self.flow, self.labels, self.norms, self.found.above)
        self.streams = tuple(self._stream(line) for line in self.found.lines)

    def _stream(self, line: Line) -> Stream:
        writes = self._with_norms(line, [self._write(line, w) for w in line.writes])
        after = writes[-1].norm_after if writes else None
        final, post_norm = self._final(line, writes)
        if writes and not post_norm and after is not None:
            writes[-1] = replace(writes[-1], norm_after=None)
        blocks = grouped(tuple(writes), self.chains.root, self.chains.passed)
        return Stream(
            self._role(line),
            line.start,
            line.end,
            tuple(writes),
            blocks,
            final,
            embeddings(self.program, self.flow, self.labels, line),
            tuple(line.stages),
            frozenset(line.values),
            self._notes(line, tuple(writes)),
            post_norm,
            row_layout(self.labels, line.start) or Layout(),
        )

    def _role(self, line: Line) -> str:
        main = self.found.lines[-1]
        if line is main:
            return "main"
        read = any(self.flow.reaches(line.end, w.add) for w in (s.site for s in main.writes))
        return "encoder" if read else "tower"

    def _write(self, line: Line, made: WriteSite) -> Write:
        site, region = made.site, made.region
        assert region is not None
        branch = self.branches.branch(region, made.value)
        norm_out = self._norm_out(made.value)
        sign = 1.0
        if is_op(site.add, aten.add.Tensor, aten.sub.Tensor) and made.reader is site.add:
            alpha = argument(site.add, "alpha")
            second = self.flow.rep(site.add.args[1]) is self.flow.rep(made.value)  # type: ignore[arg-type]
            sign = float(alpha) if second and isinstance(alpha, (int, float)) else 1.0
            sign = -sign if second and is_op(site.add, aten.sub.Tensor) else sign
        value = self._operand(made.reader, made.value)
        found = self.branches.attention[id(branch)]
        mlp = self.branches.mlp(branch, made.value)
        norm = branch.norms[0] if branch.norms else None
        carry = self._operand(site.add, site.carry)
        return Write(
            site.add, carry, value, made.reader, branch, sign, norm, norm_out, None, found, mlp
        )

    def _operand(self, reader: fx.Node, value: fx.Node) -> fx.Node:
        """The argument of a reader that is this value, or a copy of it."""
        for node in reader.all_input_nodes:
            if node in self.flow.live and self.flow.rep(node) is self.flow.rep(value):
                return node
        return value

    def _norm_out(self, value: fx.Node) -> Norm | None:
        for node in self.chains.passed(self.flow.rep(value)):
            if node in self.norms:
                return self.norms[node]
        return None

    def _with_norms(self, line: Line, writes: list[Write]) -> list[Write]:
        """Give each write the norm that the stream goes through behind it."""
        found = []
        nexts = [w.carry for w in writes[1:]] + [line.end]
        for write, after in zip(writes, nexts, strict=True):
            norms = [self.norms[n] for n in self.chains.passed(after) if n in self.norms]
            own = norms[-1] if norms and self.chains.root(after) is write.add else None
            found.append(replace(write, norm_after=own))
        if found:
            last = self._end_norms(line)
            found[-1] = replace(found[-1], norm_after=last[0] if last else None)
        return found

    def _end_norms(self, line: Line) -> list[Norm]:
        """The norms between the last write and whatever reads the stream, nearest first."""
        found: dict[int, Norm] = {}
        queue = [line.end]
        for node in queue:
            for reader in self.flow.readers[node]:
                norm = self.norms.get(reader)
                inside = norm is None and reader in self._norm_nodes
                if self.chains.root(reader) is line.end and reader not in queue:
                    queue.append(reader)
                    if norm is not None:
                        found[id(norm)] = norm
                elif inside and reader not in queue:
                    queue.append(reader)
        return list(found.values())

    @cached_property
    def _norm_nodes(self) -> set[fx.Node]:
        return {n for norm in self.norms.values() for n in norm.nodes}

    def _final(self, line: Line, writes: list[Write]) -> tuple[Norm | None, bool]:
        """The norm between the end of the stream and the head, and whether the stream is post-norm.

        Norms behind every write are part of the blocks; one more behind the last is the final one.
        """
        ends = self._end_norms(line)
        read = {self.chains.root(n) for w in writes for n, _ in w.branch.entries}
        inner = {w.add: w.norm_after for w in writes if w.kind != "inject" and w.add in read}
        inner.pop(line.end, None)
        post_norm = bool(inner) and sum(map(bool, inner.values())) * 2 > len(inner)
        rest = ends[1:] if post_norm else ends
        return (rest[-1] if rest else None), post_norm

    def _notes(self, line: Line, writes: tuple[Write, ...]) -> tuple[Note, ...]:
        found = [Note("the stream is projected, joined or resized here", n) for n in line.stages]
        for write in writes:
            weights = [n for n in write.branch.nodes if is_weight_linear(n) or n.target is SDPA]
            if not weights and write.kind not in ("inject",):
                found.append(Note("a write without a product with a weight", write.add))
            if write.fused:
                text = "a product fused with its add: what is written has no value of its own"
                found.append(Note(text, write.add))
            aliases = self.chains.passed(self.flow.rep(write.carry))
            if any(op_name(n) in ("mul", "div") and n not in self.norms for n in aliases):
                found.append(
                    Note("the stream is scaled before what is written is added", write.add)
                )
            if len(write.attention) > 1:
                found.append(Note(f"{len(write.attention)} attentions in one branch", write.add))
        return tuple(found)

    @cached_property
    def head(self) -> fx.Node | None:
        """The unembedding: the linear with evidence for it, or the only one behind the stream."""
        known = unembedding(self.program)
        if known is not None or not self.streams:
            return known
        end = self.streams[-1].end
        linears = [
            n
            for n in self.flow.members(self.flow.wanted)
            if is_weight_linear(n) and self.flow.reaches(end, n)
        ]
        met = [n for n in self.flow.members(self.flow.wanted) if is_product(self.flow, n)]
        if len(linears) != 1 or any(self.flow.reaches(linears[0], n) for n in met):
            return None
        return linears[0]

    @cached_property
    def unclaimed(self) -> tuple[fx.Node, ...]:
        """The products that lead to an output and are part of nothing that was found."""
        claimed: set[fx.Node] = set()
        for line in self.found.lines:
            claimed.update(line.values)
            claimed.update(s.add for s in line.sites)
        branches = [w.branch for s in self.streams for w in s.writes]
        for branch in branches:
            claimed.update(branch.nodes if branch.whole else ())
        stems = 0
        for line in self.found.lines:
            stems |= line.stem
        ends = [line.end for line in self.found.lines]
        found = []
        for node in self.flow.members(self.flow.wanted):
            if not (is_weight_linear(node) or is_product(self.flow, node)) or node in claimed:
                continue
            if stems >> self.flow.rank[node] & 1 and not is_product(self.flow, node):
                # An attention ahead of a stream means that it starts further back.
                continue
            if not any(self.flow.reaches(end, node) for end in ends):
                found.append(node)
        return tuple(found[::-1])

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Every canonical hook point, from the output backwards."""
        rows = partial(row_layout, self.labels)
        return tuple(points(self.streams, self.head, rows, self._weights_layout))

    def _weights_layout(self, found: AttentionBranch) -> Layout | None:
        """`[batch, head, query, key]` for the scores inside a fused attention."""
        assert found.core is not None
        lead = self.labels.axes(argument(found.core, "query"))[:-2]
        atoms = [(i, a) for i, axis in enumerate(lead) for a in axis]
        batch = [i for i, a in atoms if self.labels.is_sequence(a)]
        if len(lead) == 2:
            swapped = batch == [1] and not any(self.labels.is_sequence(a) for a in lead[0])
            return Layout((), (1, 0, 2, 3) if swapped else (0, 1, 2, 3))
        if len(lead) == 1 and found.heads is not None:
            # Heads behind the batch in one axis, or alone where there is no batch.
            apart = len(batch) <= 1 and (not batch or self.labels.is_sequence(lead[0][0]))
            return Layout(((0, (-1, found.heads)),), (0, 1, 2, 3)) if apart and batch else None
        return None
