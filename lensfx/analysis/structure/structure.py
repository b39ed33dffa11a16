"""What was found in a model, as a plain object that prints as a tree."""

from __future__ import annotations

import html
from dataclasses import dataclass

from torch import fx

from lensfx.analysis.structure.facts import Block, Embedding, Note, Stream
from lensfx.analysis.structure.find import Search
from lensfx.analysis.structure.points import Point
from lensfx.analysis.structure.tree import tree
from lensfx.graph.program import Program

__all__ = ["Structure", "structure"]


@dataclass(frozen=True)
class Structure:
    """The streams of a model with their blocks, its embeddings, its unembedding, what is unknown.

    `streams` are all of them, the one that leads to the outputs last; `unclaimed` are products
    that lead to an output and belong to nothing that was found: while there are any, blocks are
    not to be trusted as the whole model, and `complete` is False. Writes to a stream are facts;
    their grouping into `blocks` is a convention. `points` are the canonical hook points.
    """

    streams: tuple[Stream, ...]
    unembed: fx.Node | None
    unclaimed: tuple[fx.Node, ...]
    notes: tuple[Note, ...]
    points: tuple[Point, ...] = ()

    @property
    def stream(self) -> Stream | None:
        """The stream that leads to the outputs; None if there is none."""
        return self.streams[-1] if self.streams else None

    @property
    def encoder(self) -> Stream | None:
        """The stream that the main one reads, in a model with an encoder."""
        return next((s for s in self.streams if s.role == "encoder"), None)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the main stream."""
        return self.stream.blocks if self.stream is not None else ()

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """What the main stream starts from."""
        return self.stream.embeddings if self.stream is not None else ()

    @property
    def embed(self) -> Embedding | None:
        """The token embedding."""
        return self._first("token")

    @property
    def pos_embed(self) -> Embedding | None:
        """The absolute positions that are added; None for rotary, and where several are."""
        found = [e for e in self.embeddings if e.kind == "position"]
        return found[0] if len(found) == 1 else None

    @property
    def complete(self) -> bool:
        """Whether every product that leads to an output is part of something that was found."""
        return bool(self.streams) and not self.unclaimed

    def _first(self, kind: str) -> Embedding | None:
        return next((e for e in self.embeddings if e.kind == kind), None)

    def __str__(self) -> str:
        return tree(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(tree(self))}</pre>"

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(tree(self))  # type: ignore[attr-defined]


def structure(program: Program) -> Structure:
    """The structure of a program, from its dataflow alone; what is not understood is in `notes`."""
    search = Search(program)
    notes = [n for s in search.streams for n in s.notes]
    if not search.streams:
        notes.append(Note("no residual stream leads to an output"))
    unclaimed = search.unclaimed if search.streams else ()
    notes += [Note("a product that belongs to nothing that was found", n) for n in unclaimed]
    for stream in search.streams:
        notes += [n for w in stream.writes for n in w.branch.notes]
        notes += [n for w in stream.writes for a in w.attention for n in a.notes]
    trusted = () if unclaimed else search.points
    return Structure(search.streams, search.head, unclaimed, tuple(notes), trusted)
