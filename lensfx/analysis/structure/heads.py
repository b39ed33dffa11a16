"""Heads, key/value heads and the places of q, k, v, z of one attention, from its labels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from lensfx.analysis.contraction import letters
from lensfx.analysis.structure.attention import Core, linear_behind, scaled_by, turns
from lensfx.analysis.structure.facts import AttentionBranch, Note, Place
from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.labels import Atom, Labels
from lensfx.analysis.structure.layout import count, row_layout, score_layout
from lensfx.graph.node import argument, is_op, is_weight
from lensfx.graph.ops import VIEWS

__all__ = ["described"]

aten = torch.ops.aten

# What lies between a fused projection and the part of it that is a query.
_APART = VIEWS | {
    operator.getitem,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
}


def described(
    flow: Flow, labels: Labels, above: dict[Any, Any], core: Core, inside: set[fx.Node], cross: bool
) -> AttentionBranch:
    """What one attention is made of; a place that cannot be given its canonical axes is None."""
    return _Heads(flow, labels, above, core, inside).run(cross)


class _Heads:
    def __init__(
        self, flow: Flow, labels: Labels, above: dict[Any, Any], core: Core, inside: set[fx.Node]
    ) -> None:
        self.flow, self.labels, self.above, self.core = flow, labels, above, core
        self.inside = inside
        self.notes: list[Note] = []

    def run(self, cross: bool) -> AttentionBranch:
        core = self.core
        width = self._width(core.query)
        heads = self._heads(width)
        q, rot_q, q_linear, _ = self._projected(core.query, width, heads)
        k, rot_k, k_linear, kv = self._projected(core.key, width, None)
        value_width = self._width(core.value, last=False)
        v, _, v_linear, v_heads = self._projected(core.value, value_width, None)
        if v_heads != kv:
            self.notes.append(Note(f"{kv} key heads but {v_heads} value heads", core.value))
        if heads is not None and kv is not None and heads % kv:
            self.notes.append(Note(f"{kv} key heads do not divide {heads} heads", core.key))
            kv, k, v = None, None, None
        z = self._per_head(core.z, heads, value_width, core.value)
        if z is None:
            self.notes.append(Note("what is weighed has no one axis of heads", core.z))
        scores, pattern = self._weights()
        if core.fused is None and (scores is None or pattern is None):
            text = "scores or pattern are not [batch, head, query, key] and have no hook point"
            self.notes.append(Note(text, core.softmax))
        return AttentionBranch(
            heads,
            kv if kv is not None else None,
            width,
            value_width,
            *(q, k, v, rot_q, rot_k, scores, pattern, z),
            core.fused,
            *(q_linear, k_linear, v_linear, self._output()),
            scale=self._scale((rot_q or q, core.query), (rot_k or k, core.key)),
            mask=core.mask,
            causal=core.causal,
            sinks=core.sinks,
            softcap=core.softcap,
            cross=cross,
            nodes=core.nodes,
            notes=tuple(self.notes),
        )

    def _scale(self, *sides: tuple[Place | None, fx.Node]) -> float | None:
        """What the product of the named query and key is multiplied by, if that is a number."""
        total = self.core.scale
        for place, node in sides:
            while total is not None and place is not None and node is not place.node:
                total *= scaled_by(node)
                above = self.above.get(node)
                if not isinstance(above, fx.Node):
                    break
                node = above
        return total

    def _atoms(self, node: fx.Node) -> list[Atom]:
        return self.labels.features(node)

    def _width(self, node: fx.Node, last: bool = True) -> int | None:
        """The size of the axis that query and key have in common, or of the values' own."""
        product = self.core.product
        axes = self.labels.of.get(node, [])
        if product is None or not last:
            found = axes[-1] if axes else ()
            if product is not None and not found:
                return 1
            return count(found) if found else 1
        return self._contracted(node)

    def _contracted(self, node: fx.Node) -> int | None:
        axes = self.labels.of.get(node, [])
        summed = self._summed(node, len(axes))
        gone = [a for i in sorted(summed) for a in axes[i] if not self._sequence(a)]
        return count(gone) if gone else 1

    def _sequence(self, atom: Atom) -> bool:
        return self.labels.is_sequence(atom)

    def _heads(self, width: int | None) -> int | None:
        atoms = self._of_heads(self._atoms(self.core.query))
        # What nobody can name may as well be positions.
        unproven = any(self.labels.root[a.label] in self.labels.unproven for a in atoms)
        total = None if unproven else count(atoms)
        if width is None or total is None or not width or total % width:
            self.notes.append(Note("the number of heads is unknown", self.core.query))
            return None
        return total // width

    def _of_heads(self, atoms: list[Atom]) -> list[Atom]:
        """The atoms without copies stacked side by side, if heads are told apart anyway."""
        root = self.labels.root
        same = [a for a in atoms if root[a.label] == root[atoms[-1].label]]
        copies = [a for a in atoms if root[a.label] in self.labels.stacked]
        return [a for a in atoms if a not in copies] if len(same) > 1 else atoms

    def _projected(
        self, operand: fx.Node, width: int | None, heads: int | None
    ) -> tuple[Place | None, Place | None, fx.Node | None, int | None]:
        """The value per head before rotary, after it, its linear, and the number of its heads."""
        path = linear_behind(self.flow, self.above, operand)
        linear = path[-1] if is_weight_linear(path[-1]) else None
        inside = [n for n in path if n in self.inside]
        if width is None or not inside:
            return None, None, linear, None
        own = heads if heads is not None else self._fewest(inside, width)
        if own is None:
            return None, None, linear, None
        behind = inside[::-1][self._biased(inside[::-1]) :]
        found = (self._per_head(node, own, width, operand) for node in behind)
        first = next((place for place in found if place is not None), None)
        turned = any(turns(self.flow, self.labels, a, b) for a, b in pairwise(path))
        after = None
        if turned:
            places = (self._per_head(n, own, width, operand) for n in inside)
            after = next((p for p in places if p is not None), None)
        return first, after, linear, own

    def _biased(self, path: Sequence[fx.Node]) -> int:
        """Where on the way from a projection its bias has been added, if that stands alone."""
        last = 0
        for at, node in enumerate(path):
            if is_op(node, aten.add.Tensor) and any(map(is_weight, node.all_input_nodes)):
                last = at
            elif not (is_weight_linear(node) or node.target in _APART):
                break
        return last

    def _fewest(self, path: Sequence[fx.Node], width: int) -> int | None:
        """The heads a key or value has before they are repeated for the queries."""
        sizes = []
        for node in path:
            val = node.meta.get("val")
            if not isinstance(val, torch.Tensor) or val.is_complex():
                continue
            total = count(self._atoms(node))
            if total is not None and total % width == 0 and total:
                sizes.append(total // width)
        return min(sizes, default=None)

    def _per_head(
        self, node: fx.Node, heads: int | None, width: int | None, operand: fx.Node
    ) -> Place | None:
        """The place of a value with these heads of this width, if its axes tell them apart.

        `operand` is what it becomes in the product, where one axis is contracted: the width.
        """
        if heads is None or width is None:
            return None
        atoms = self._atoms(node)
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or val.is_complex():
            return None
        known = self._told_apart(atoms, operand)
        wanted = self._checked(known, heads, width) if known else self._split(atoms, heads, width)
        layout = row_layout(self.labels, node, wanted) if wanted is not None else None
        return Place(node, layout) if layout is not None else None

    def _told_apart(self, atoms: list[Atom], operand: fx.Node) -> list[list[Atom]] | None:
        """The atoms of heads and of the width, by the axes they become; None if none is known."""
        ends = self._contracted_atoms(operand)
        rest = {a.label for a in self._atoms(operand)} - ends
        of_width = [a for a in atoms if a.label in ends]
        of_heads = [a for a in atoms if a.label in rest]
        if not of_heads and not of_width:
            return None
        if len(of_heads) + len(of_width) < len(atoms):
            others = [a for a in atoms if a not in of_heads and a not in of_width]
            if of_heads and of_width:
                return None
            of_heads, of_width = of_heads or others, of_width or others
        return [of_heads, of_width]

    def _contracted_atoms(self, operand: fx.Node) -> set[int]:
        """The labels of the width: what query and key are contracted over, or a value's own."""
        axes = self.labels.of.get(operand, [])
        if self.core.product is None or operand is self.core.value:
            out = self.labels.of.get(self.core.z, [])
            kept = {a.label for a in out[-1]} if out else set()
            own = {a.label for a in axes[-1]} if axes else set()
            return own & kept or own
        return {
            atom.label
            for axis, atoms in enumerate(axes)
            for atom in atoms
            if axis in self._summed(operand, len(axes)) and not self._sequence(atom)
        }

    def _summed(self, operand: fx.Node, rank: int) -> set[int]:
        """The axes of an operand that the product of query and key sums over."""
        product = self.core.product
        assert product is not None
        if is_op(product, aten.einsum.default):
            given = list(argument(product, "tensors"))
            found = letters(str(argument(product, "equation")), given)
            at = next((i for i, n in enumerate(given) if self.flow.rep(n) is operand), None)
            if found is None or at is None:
                return set()
            return {i for i, letter in enumerate(found[at]) if letter not in found[-1]}
        operands = [n for n in product.args if isinstance(n, fx.Node)][-2:]
        return {rank - 1} if self.flow.rep(operands[0]) is operand else {rank - 2}

    def _checked(self, known: list[list[Atom]], heads: int, width: int) -> list[list[Atom]] | None:
        return known if [count(atoms) for atoms in known] == [heads, width] else None

    def _split(self, atoms: list[Atom], heads: int, width: int) -> list[list[Atom]] | None:
        """The atoms as those of the heads and those of their width, the width behind."""
        if heads == width and len(atoms) > 1:
            # Which of two axes of one size is which cannot be told here.
            return None
        for cut in range(len(atoms) + 1):
            if count(atoms[:cut]) == heads and count(atoms[cut:]) == width:
                return [atoms[:cut], atoms[cut:]]
        return None

    def _weights(self) -> tuple[Place | None, Place | None]:
        core = self.core
        if core.scores is None or core.pattern is None or core.softmax is None:
            return None, None
        found = []
        for node, keys in ((core.scores, core.keys), (core.pattern, core.pattern_keys)):
            rank = len(self.labels.of.get(node, []))
            layout = score_layout(self.labels, node, keys) if keys < rank else None
            found.append(Place(node, layout) if layout is not None else None)
        return found[0], found[1]

    def _output(self) -> fx.Node | None:
        """The linear that the weighed values are projected by: the first one behind them."""
        seen, queue = {self.core.z}, [self.core.z]
        for node in queue:
            for reader in self.flow.readers[node]:
                if reader in self.inside and reader not in seen:
                    if is_weight_linear(reader):
                        return reader
                    seen.add(reader)
                    queue.append(reader)
        return None
