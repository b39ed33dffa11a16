"""The graph that circuit searches run on: components, and who reads whom through what."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from lensfx.analysis.structure.facts import AttentionBranch, Block, Stream, Write
from lensfx.analysis.structure.find import Search
from lensfx.analysis.structure.points import block_prefix
from lensfx.errors import LensError
from lensfx.graph.node import shape_of, where
from lensfx.graph.program import Program

__all__ = ["component_graph"]

KINDS = ("heads", "blocks")


def component_graph(
    program: Program, component: str, names: Collection[str] = ()
) -> nx.MultiDiGraph:
    """Embeddings, heads or blocks, MLPs and the unembedding, with an edge for each read.

    A node has `kind`, `block`, `head` (None where it is not one), `hook`, the name of what it
    writes, and `shape`. An edge from a writer to a reader of the residual stream has `read`, one
    of q, k, v, mlp, mixer, unembed, and `hook`, where that read can be edited. Of grouped heads
    the k and v of one key/value head belong to each of its query heads. An edge with `direct` does
    not go through the stream: a value of another block that a branch reads itself. `names` are the
    hook names there are; `hook` is empty for any other.

    Raises: LensError if the structure is not wholly understood, or there is no such component.
    """
    if component not in KINDS:
        raise LensError(
            f"there is no component graph of {component!r}",
            hint="component='heads', 'blocks' or 'ops'",
        )
    search = Search(program)
    if not search.streams:
        raise LensError("no residual stream was found", hint="component='ops'")
    if search.unclaimed:
        raise LensError(
            "a product with a weight belongs to no component that was found",
            at=where(search.unclaimed[0]),
            hint="component='ops', or look at lens.structure",
        )
    return _Components(search, component, frozenset(names)).graph()


@dataclass(frozen=True)
class _Part:
    """One component: what it writes to which stream, and its reads by name."""

    name: str
    write: Write | None
    facts: dict[str, Any]
    head: int | None = None


class _Components:
    def __init__(self, search: Search, component: str, names: frozenset[str]) -> None:
        self.search, self.flow = search, search.flow
        self.by_head = component == "heads"
        self.known = names
        self.found = nx.MultiDiGraph()
        self.parts: list[tuple[Stream, _Part]] = []
        self.starts: dict[int, list[str]] = {}

    def graph(self) -> nx.MultiDiGraph:
        for at, stream in enumerate(self.search.streams):
            self._embeddings(at, stream)
            for block in stream.blocks:
                for part in self._of_block(block, block_prefix(self.search.streams, at)):
                    self.parts.append((stream, part))
                    self.found.add_node(part.name, **part.facts)
        for stream, part in self.parts:
            self._reads(stream, part)
        self._head()
        return self.found

    def _embeddings(self, at: int, stream: Stream) -> None:
        front = "" if stream.role == "main" else f"{stream.role}."
        names = []
        for number, embedding in enumerate(stream.embeddings):
            label = {"token": "embed", "position": "pos_embed"}.get(embedding.kind, embedding.kind)
            name = f"{front}{label}" if label != "other" else f"{front}other.{number}"
            hook = f"{front}hook_{label}" if label.endswith("embed") else ""
            self._node(name, "embedding", hook, embedding.scaled)
            names.append(name)
        if not names:
            self._node(f"{front}start", "start", "", stream.start)
            names.append(f"{front}start")
        self.starts[id(stream)] = names

    def _node(self, name: str, kind: str, hook: str, node: fx.Node) -> None:
        facts = {"kind": kind, "block": None, "head": None, "hook": hook, "shape": _shape(node)}
        self.found.add_node(name, **facts)

    def _of_block(self, block: Block, prefix: str) -> Iterator[_Part]:
        at = f"{prefix}.{block.index}"
        if not self.by_head:
            for write in block.writes:
                facts = self._facts("block", block, None, f"{at}.hook_resid_post", write)
                yield _Part(at, write, facts)
            return
        for number, write in enumerate(block.writes):
            own = block.label(write)
            label = own or f"{write.kind}.{number}"
            heads = write.attention[0].heads if len(write.attention) == 1 else None
            if label.endswith("attn") and heads is not None:
                for head in range(heads):
                    folder = "cross_attn" if label == "cross_attn" else "attn"
                    facts = self._facts("head", block, head, f"{at}.{folder}.hook_result", write)
                    yield _Part(f"{at}.{folder}.{head}", write, facts, head)
                continue
            hook = f"{at}.hook_{label}_out" if own is not None else ""
            yield _Part(f"{at}.{label}", write, self._facts(label, block, None, hook, write))

    def _facts(
        self, kind: str, block: Block, head: int | None, hook: str, write: Write
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "block": block.index,
            "head": head,
            "hook": hook if hook in self.known else "",
            "shape": _shape(write.value),
        }

    def _reads(self, stream: Stream, part: _Part) -> None:
        """An edge from everything that is in a stream value to the component that reads it."""
        assert part.write is not None
        for read, entry in self._entries(part.write):
            hook = self._hook(part, read)
            for source in self._writers(entry):
                if source != part.name:
                    self._edge(source, part.name, read, hook)
        for node in part.write.branch.crossing:
            for other in self._owners(node, part):
                read = self._slot(part.write, node)
                self._edge(other, part.name, read, "", direct=True)

    def _edge(self, source: str, target: str, read: str, hook: str, direct: bool = False) -> None:
        known = self.found.get_edge_data(source, target) or {}
        if not any(d["read"] == read and d["direct"] == direct for d in known.values()):
            hook = hook if hook in self.known else ""
            self.found.add_edge(source, target, read=read, hook=hook, direct=direct)

    def _entries(self, write: Write) -> Iterator[tuple[str, fx.Node]]:
        """The stream values a branch reads, each with what it reads it for."""
        values = {n for s in self.search.streams for n in s.values}
        found = dict.fromkeys(entry for entry, _ in write.branch.entries)
        for node in write.branch.nodes:
            found.update(dict.fromkeys(d for d in self.flow.deps[node] if d in values))
        if len(write.attention) == 1 and write.branch.is_mixer:
            yield from self._attention_entries(write, write.attention[0], list(found))
            return
        kind = "mlp" if write.mlp is not None else ("inject" if write.kind == "inject" else "mixer")
        yield from ((kind, entry) for entry in found)

    def _attention_entries(
        self, write: Write, found: AttentionBranch, entries: list[fx.Node]
    ) -> Iterator[tuple[str, fx.Node]]:
        places = {
            "q": found.q.node if found.q is not None else found.q_linear,
            "k": found.k.node if found.k is not None else found.k_linear,
            "v": found.v.node if found.v is not None else found.v_linear,
        }
        known = [(name, node) for name, node in places.items() if node is not None]
        for entry in entries:
            slots = [name for name, node in known if self._feeds(entry, node, write)]
            yield from ((slot, entry) for slot in slots or ["mixer"])

    def _feeds(self, source: fx.Node, node: fx.Node, write: Write) -> bool:
        """Whether a branch's value is computed from a stream value inside the branch."""
        inside = set(write.branch.nodes)
        seen, stack = set(), [self.flow.rep(node)]
        while stack:
            n = stack.pop()
            if n is source:
                return True
            if n in inside and n not in seen:
                seen.add(n)
                stack.extend(self.flow.deps[n])
        return False

    def _slot(self, write: Write, node: fx.Node) -> str:
        """What a value of another branch is read for."""
        if len(write.attention) == 1:
            found = write.attention[0]
            core = found.core or (found.z.node if found.z is not None else None)
            for slot, operand in zip("qkv", self._operands(write, core), strict=False):
                if operand is not None and self._feeds(node, operand, write):
                    return slot
        return "mlp" if write.mlp is not None else "mixer"

    def _operands(self, write: Write, core: fx.Node | None) -> list[fx.Node | None]:
        if core is None:
            return []
        return [n if n in self.flow.live else None for n in core.all_input_nodes]

    def _hook(self, part: _Part, read: str) -> str:
        at = part.name.split(".attn.")[0].split(".mlp")[0]
        if read in ("q", "k", "v") and ".attn." in part.name:
            return f"{at}.hook_{read}_input"
        return f"{at}.hook_mlp_in" if read == "mlp" and self.by_head else ""

    def _writers(self, entry: fx.Node) -> Iterator[str]:
        """The components whose writes are part of a stream value."""
        for stream in self.search.streams:
            if entry in stream.values:
                yield from self.starts[id(stream)]
                for other, part in self.parts:
                    written = part.write is not None and self.flow.reaches(part.write.add, entry)
                    if other is stream and written:
                        yield part.name

    def _owners(self, node: fx.Node, reader: _Part) -> Iterator[str]:
        for _, part in self.parts:
            if part.write is None or part.name == reader.name:
                continue
            same = part.head is None or reader.head is None or part.head == reader.head
            if same and node in part.write.branch.nodes:
                yield part.name

    def _head(self) -> None:
        """The unembedding, or the output, reads all that is in the end of the main stream."""
        stream = self.search.streams[-1]
        head = self.search.head
        name = "unembed" if head is not None else "output"
        self._node(name, name, "unembed.hook_out" if head is not None else "", head or stream.end)
        for source in self._writers(self.flow.rep(stream.end)):
            self._edge(source, name, "unembed", "unembed.hook_in" if head is not None else "")


def _shape(node: fx.Node) -> str:
    return "[" + ", ".join(str(s) for s in shape_of(node) or ()) + "]"
