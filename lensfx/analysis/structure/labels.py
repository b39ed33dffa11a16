"""Which axis of a value is batch, position or a feature: labels followed from the inputs.

Each axis is a list of atoms, major first; an axis of size 1 has none. A reshape joins and splits
atoms by its own row-major sizes, so that no two sizes of different values are ever compared.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from lensfx.analysis.axes import fingerprint, groups, is_one, value_print
from lensfx.analysis.structure.flow import Flow, lookup
from lensfx.graph.node import dtype_of, is_weight, shape_of

__all__ = ["Atom", "Axis", "Labels", "Mix"]

aten = torch.ops.aten


class Atom(NamedTuple):
    """A factor of an axis: its label and its size, as numbers that stand for the symbols."""

    label: int
    size: tuple[int, int]


class Mix(NamedTuple):
    """One way in which an operator joins entries along an axis: how, and the labels of the axis."""

    kind: str
    labels: frozenset[int]


Axis = tuple[Atom, ...]
Axes = list[Axis]


class Labels:
    """The labels of every axis of every value, and what each operator mixes.

    `sequences` are the labels of input axes that may be positions or batch; `batch` the one of
    them that nothing mixes; `positions` the others. `stacked` are axes made by stacking values,
    `unproven` axes of which no rule told what they are.
    """

    def __init__(self, flow: Flow) -> None:
        from lensfx.analysis.structure.label_rules import RULES, other

        self.flow = flow
        self.root: list[int] = []
        self.parts: dict[tuple[int, tuple[int, int]], tuple[int, int]] = {}
        self.symbols: dict[str, int] = {}
        self.sequences: list[int] = []
        self.firsts: set[int] = set()
        self.stacked: set[int] = set()
        self.pairs: dict[fx.Node, Axis] = {}
        self.unproven: set[int] = set()
        self.of: dict[fx.Node, Axes] = {}
        self.outputs: dict[fx.Node, list[Axes]] = {}
        self.mixed: dict[fx.Node, list[Mix]] = {}
        self._name_inputs()
        for node in flow.nodes:
            rule = RULES.get(node.target) if node.op == "call_function" else None
            self._label(node, rule or other)
        self._choose_batch()

    def _label(self, node: fx.Node, rule: Any) -> None:
        val = node.meta.get("val")
        if isinstance(val, (tuple, list)):
            found = rule(self, node)
            self.outputs[node] = found if found is not None else [self.unknown(v) for v in val]
            return
        if not isinstance(val, torch.Tensor) or node in self.of:
            return
        axes = None
        if node.op == "call_function" and not is_weight(node):
            axes = self._item(node) if node.target is operator.getitem else rule(self, node)
        if axes is None or len(axes) != val.ndim:
            axes = self.unknown(val)
            if node in self.flow.live:
                self.unproven.update(self.root[a.label] for axis in axes for a in axis)
        self.of[node] = [
            () if is_one(size) else (atoms or self.by_size(size))
            for atoms, size in zip(axes, val.shape, strict=True)
        ]

    def _item(self, node: fx.Node) -> Axes | None:
        many, at = node.args[0], node.args[1]
        parts = self.outputs.get(many) if isinstance(many, fx.Node) else None
        return parts[at] if parts and isinstance(at, int) and at < len(parts) else None

    def fresh(self, size: Any) -> Atom:
        """An atom of a new label."""
        self.root.append(len(self.root))
        return Atom(len(self.root) - 1, fingerprint(size))

    def unknown(self, val: Any) -> Axes:
        """Labels for a value no rule describes: by the symbols in its sizes, or new ones."""
        return [self.by_size(size) for size in getattr(val, "shape", ())]

    def by_size(self, size: Any) -> Axis:
        """The atoms of a size that is written with the symbols of the inputs, or a new atom."""
        if is_one(size):
            return ()
        expr = getattr(getattr(size, "node", None), "expr", None)
        named = sorted(map(str, expr.free_symbols)) if expr is not None else []
        known = [self.symbols[s] for s in named if s in self.symbols]
        if expr is None or not known:
            return (self.fresh(size),)
        factors = expr.args if expr.is_Mul else (expr,)
        if all(str(f) in self.symbols or f.is_Integer for f in factors):
            # The order in which a product is printed says nothing of the order in memory.
            return tuple(
                self.fresh(int(f)) if f.is_Integer else Atom(self.symbols[str(f)], value_print(f))
                for f in factors
            )
        later = [k for k in known if k not in self.firsts]
        return (Atom((later or known)[0], fingerprint(size)),)

    def axes(self, node: Any) -> Axes:
        """The labels of a value; new ones for a weight, none for a number."""
        if not isinstance(node, fx.Node):
            return []
        found = self.of.get(node)
        return found if found is not None else self.unknown(node.meta.get("val"))

    def is_sequence(self, atom: Atom) -> bool:
        """Whether an atom is an axis of the inputs along which there are tokens or examples."""
        return self.root[atom.label] in self._sequence_set

    def is_position(self, atom: Atom) -> bool:
        """Whether an atom runs along positions."""
        return self.root[atom.label] in self.positions

    def has_positions(self, axis: Iterable[Atom]) -> bool:
        """Whether any atom of an axis runs along positions."""
        return any(map(self.is_position, axis))

    def features(self, node: fx.Node) -> list[Atom]:
        """The atoms of a value that are neither batch nor position, in order."""
        return [a for axis in self.of.get(node, []) for a in axis if not self.is_sequence(a)]

    def mix(self, node: fx.Node, kind: str, axis: Iterable[Atom]) -> None:
        """Note that a node joins entries along an axis."""
        labels = frozenset(self.root[a.label] for a in axis)
        labels = labels & self._sequence_set
        if labels:
            self.mixed.setdefault(node, []).append(Mix(kind, labels))

    def position_mixes(self, node: fx.Node) -> list[Mix]:
        """How a node mixes positions; empty if it keeps them apart."""
        return [m for m in self.mixed.get(node, []) if m.labels & self.positions]

    def reshape(self, axes: Axes, before: Sequence[Any], after: Sequence[Any]) -> Axes:
        """The labels of a row-major view."""
        out: Axes = [()] * len(after)
        for ins, outs in groups(before, after):
            atoms = [a for i in ins for a in axes[i]]
            for at, found in zip(outs, self._dealt(atoms, [after[o] for o in outs]), strict=True):
                out[at] = found
        return out

    def _dealt(self, atoms: list[Atom], sizes: list[Any]) -> list[Axis]:
        """Hand atoms out to axes of these sizes, the last first; what does not fit is new."""
        if len(sizes) == 1:
            return [tuple(atoms)]
        left, found = list(atoms), []
        for k, size in enumerate(reversed(sizes)):
            if k == len(sizes) - 1:
                found.append(tuple(left))
                break
            taken = self._take(left, fingerprint(size))
            if taken is None:
                rest = [self.by_size(s) for s in sizes[: len(sizes) - k]]
                return [*rest, *found[::-1]]
            found.append(taken)
        return found[::-1]

    def _take(self, left: list[Atom], size: tuple[int, int]) -> Axis | None:
        taken: list[Atom] = []
        while size != (1, 1):
            if not left:
                return None
            last = left.pop()
            if all(s % a == 0 for s, a in zip(size, last.size, strict=True)):
                taken.append(last)
                size = (size[0] // last.size[0], size[1] // last.size[1])
            elif all(a % s == 0 for s, a in zip(size, last.size, strict=True)):
                major, minor = self._split(last, size)
                left.append(major)
                taken.append(minor)
                size = (1, 1)
            else:
                return None
        return tuple(taken[::-1])

    def _split(self, atom: Atom, minor: tuple[int, int]) -> tuple[Atom, Atom]:
        """An atom as two; the same split gives the same two labels."""
        key = (atom.label, minor)
        if key not in self.parts:
            pair = []
            for _ in range(2):
                self.root.append(self.root[atom.label])
                pair.append(len(self.root) - 1)
            self.parts[key] = (pair[0], pair[1])
        major = (atom.size[0] // minor[0], atom.size[1] // minor[1])
        a, b = self.parts[key]
        return Atom(a, major), Atom(b, minor)

    def _name_inputs(self) -> None:
        """Labels for the axes of token ids and of inputs of numbers, each input its own."""
        ids = [pair[1] for n in self.flow.seeds if (pair := lookup(n)) is not None]
        behind = {p for n in ids for p in self._placeholders(n)}
        given = [n for n in self.flow.nodes if n.op == "placeholder" and shape_of(n)]
        given.sort(key=lambda n: (n not in behind, n not in self.flow.seeds))
        for node in given:
            shape = shape_of(node) or ()
            kind = dtype_of(node)
            wide = node in self.flow.seeds and kind is not None and kind.is_floating_point
            feature = None if not wide else (1 if len(shape) > 3 else len(shape) - 1)
            self.of[node] = [
                () if is_one(size) else (self._named(size, axis, axis == feature),)
                for axis, size in enumerate(shape)
            ]
        self._sequence_set = frozenset(self.sequences)
        self.positions: frozenset[int] = self._sequence_set

    def _named(self, size: Any, axis: int, feature: bool) -> Atom:
        expr = getattr(getattr(size, "node", None), "expr", None)
        known = self.symbols.get(str(expr)) if expr is not None else None
        atom = Atom(known, fingerprint(size)) if known is not None else self.fresh(size)
        if known is None and not feature:
            self.sequences.append(atom.label)
            if expr is not None and expr.is_Symbol:
                self.symbols[str(expr)] = atom.label
        if axis == 0:
            self.firsts.add(atom.label)
        return atom

    def _placeholders(self, node: fx.Node) -> set[fx.Node]:
        found, stack, seen = set(), [node], {node}
        while stack:
            n = stack.pop()
            if n.op == "placeholder":
                found.add(n)
            new = [m for m in n.all_input_nodes if m not in seen]
            seen.update(new)
            stack.extend(new)
        return found

    def _choose_batch(self) -> None:
        """The batch is the first axis, unless a product of values contracts it and no other."""
        mixed = {
            label
            for node, found in self.mixed.items()
            if node in self.flow.live
            for m in found
            if m.kind in ("contract", "softmax", "conv", "scan")
            for label in m.labels
        }
        firsts = [s for s in self.sequences if s in self.firsts]
        seconds = [s for s in self.sequences if s not in self.firsts]
        swapped = bool(mixed & set(firsts)) and seconds and not mixed & set(seconds)
        alone = not seconds
        batch = seconds if swapped else ([] if alone and mixed & set(firsts) else firsts)
        self.batch = frozenset(batch)
        self.positions = self._sequence_set - self.batch
