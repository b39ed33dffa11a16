"""From a node's own axes to the axes of a hook, by the labels of its atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lensfx.analysis.structure.labels import Atom, Labels
from lensfx.graph.layout import Layout

__all__ = ["count", "fixed", "row_layout", "score_layout"]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A run of factors of an axis of a value: where they are and what they stand for."""

    axis: int
    role: str
    atoms: tuple[Atom, ...] = ()

    @property
    def size(self) -> int | None:
        return count(self.atoms)


def fixed(atom: Atom) -> int | None:
    """How many entries an atom has; None if that is not a number."""
    return atom.size[0] if atom.size[0] == atom.size[1] else None


def count(atoms: Sequence[Atom]) -> int | None:
    """How many entries these atoms have together; None if that is not a number."""
    total = 1
    for atom in atoms:
        size = fixed(atom)
        if size is None:
            return None
        total *= size
    return total


def row_layout(
    labels: Labels, node: fx.Node, features: Sequence[Sequence[Atom]] | None = None
) -> Layout | None:
    """`[batch, pos, *features]`, each a run of atoms of one axis; an empty one has size 1.

    Without `features` the axes of the value that are no others are kept in their order. None if
    the value has others.
    """
    if features is None:
        axes = [[a for a in x if not labels.is_sequence(a)] for x in labels.of.get(node, [])]
        features = [x for x in axes if x]
    parts = _joined(_pieces(labels, node), [tuple(f) for f in features])
    ones = [p for p in parts if p.role == "one"]
    last: list[_Piece | None] = []
    for atoms in reversed(features):
        if not atoms:
            last.append(ones.pop() if ones else None)
            continue
        found = [p for p in parts if p.atoms == tuple(atoms) and p.role == "feature"]
        if len(found) != 1:
            return None
        last.append(found[0])
    known_batch = any(p.role == "batch" for p in parts)
    lead = [p for p in parts if p.role in ("batch", "pos") or p in ones]
    if len({p.role for p in lead if p.role != "one"}) < sum(p.role != "one" for p in lead):
        return None
    if len(lead) > 2:
        return None
    lead.sort(key=lambda p: {"batch": 0, "pos": 1, "one": int(known_batch)}[p.role])
    return _ordered(parts, [*lead, *last[::-1]])


def score_layout(labels: Labels, node: fx.Node, keys: int) -> Layout | None:
    """`[batch, head, query, key]` for a value whose axis `keys` runs along the keys."""
    parts = _pieces(labels, node)
    last = [p for p in parts if p.axis == keys]
    rest = [p for p in parts if p.axis != keys]
    batch = [p for p in rest if p.role == "batch"]
    queries = [p for p in rest if p.role == "pos"]
    middle: list[_Piece | None] = [p for p in rest if p.role == "feature"]
    ones = [p for p in rest if p.role == "one"]
    if len(last) != 1 or len(queries) > 1 or len(batch) > 1 or len(middle) > 1:
        return None
    if not queries and ones:
        queries = [ones.pop()]
    if not middle:
        middle = [ones.pop() if ones else None]
    if not batch and ones:
        batch = [ones.pop()]
    return None if ones else _ordered(parts, [*batch, *middle, *queries, *last])


def _pieces(labels: Labels, node: fx.Node) -> list[_Piece]:
    """The axes of a value as pieces with roles `batch`, `pos`, `feature` or `one`, in order."""
    found = []
    for axis, atoms in enumerate(labels.of.get(node, [])):
        if not atoms:
            found.append(_Piece(axis, "one"))
        for atom in atoms:
            sequence = "pos" if labels.is_position(atom) else "batch"
            role = sequence if labels.is_sequence(atom) else "feature"
            found.append(_Piece(axis, role, (atom,)))
    return found


def _joined(parts: list[_Piece], runs: list[tuple[Atom, ...]]) -> list[_Piece]:
    """The pieces, those that make up one run together as one piece."""
    found: list[_Piece] = []
    left = list(parts)
    while left:
        run = next((r for r in runs if len(r) > 1 and _starts(left, r)), None)
        taken, left = (left[: len(run)], left[len(run) :]) if run else (left[:1], left[1:])
        found.append(_Piece(taken[0].axis, taken[0].role, run) if run else taken[0])
    return found


def _starts(parts: list[_Piece], run: tuple[Atom, ...]) -> bool:
    head = parts[: len(run)]
    same_axis = len({p.axis for p in head}) == 1
    return same_axis and tuple(a for p in head for a in p.atoms) == run


def _ordered(parts: list[_Piece], wanted: list[_Piece | None]) -> Layout | None:
    """The layout that puts pieces in this order; None in it is a new axis of size 1."""
    if len([p for p in wanted if p is not None]) != len(parts):
        return None
    splits, place, at = [], {}, 0
    missing = [i for i, p in enumerate(wanted) if p is None]
    fresh: list[int] = []
    for axis in sorted({p.axis for p in parts}):
        inside = [p for p in parts if p.axis == axis]
        sizes = [p.size for p in inside]
        if sum(s is None for s in sizes) > 1:
            return None
        new = len(missing) if axis == max(p.axis for p in parts) else 0
        fresh.extend(range(at, at + new))
        at += new
        for p in inside:
            place[id(p)] = at
            at += 1
        if len(inside) + new > 1:
            known = [s for s in sizes if s is not None]
            open_size = [-1 if s is None else s for s in sizes]
            splits.append((axis, (*[1] * new, *(open_size if len(known) < len(sizes) else sizes))))
    order = [fresh.pop(0) if p is None else place[id(p)] for p in wanted]
    return Layout(tuple(splits[::-1]), tuple(order))  # type: ignore[arg-type]
