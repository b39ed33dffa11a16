"""What a program, folded or not, takes from the model it came from: tensors, ties, buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lensfx.graph.node import value_of
from lensfx.graph.program import Formula, Program

__all__ = ["Slot", "buffers_of", "leaves", "of_changes", "ties"]


@dataclass(frozen=True)
class Slot:
    """A tensor of the model: one like it, and the one that stays if the weights hold none."""

    like: torch.Tensor
    kept: torch.Tensor | None


def leaves(
    formula: Formula,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Each tensor of the model that a formula reads: its name, one like it, the one it was."""
    likes = {str(n.target): value_of(n) for n in formula.graph.nodes if n.op == "get_attr"}
    for name in formula.sources:
        below = formula.over.get(name)
        if isinstance(below, Formula):
            yield from leaves(below)
        else:
            yield name, likes[name], below


def ties(levels: Sequence[Program], slots: Mapping[str, Slot]) -> dict[str, tuple[str, ...]]:
    """The names of each tensor that has several in the model."""
    groups: dict[str, dict[str, None]] = {name: {name: None} for name in slots}
    first: dict[int, str] = {}
    pairs = [(alias, name) for alias, name in levels[0].source.aliases.items()]
    pairs += [(n, first.setdefault(id(s.like), n)) for n, s in slots.items()]
    for a, b in pairs:
        both = groups.setdefault(b, {b: None}) | groups.get(a, {a: None})
        groups |= dict.fromkeys(both, both)
    return {name: (name, *(n for n in group if n != name)) for name, group in groups.items()}


def buffers_of(program: Program) -> Mapping[str, bool]:
    """Each buffer of the model, and whether a state dict holds it; empty if it is not known."""
    if program.source.buffers is not None or program.origin is None:
        return program.source.buffers or {}
    model = program.origin.model
    return {
        f"{path}.{name}" if path else name: name not in part._non_persistent_buffers_set
        for path, part in model.named_modules(remove_duplicate=False)
        for name in part._buffers
    }


def of_changes(program: Program) -> list[str]:
    """The vectors that tell what a value was before a pass changed it.

    A matrix is not held for that: the raw value of what needs one is then said to be unknown.
    """
    changes = (c for rewrite in program.journal for c in rewrite.changes)
    formulas = (f for c in changes for f in (c.scale, c.shift, c.turn) if f is not None)
    known = (program.unfolded or program).tensors
    small = (f for f in formulas if all(known[s].ndim < 2 for s in f.sources if s in known))
    return list(dict.fromkeys(name for f in small for name in f.sources))
