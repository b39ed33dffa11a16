"""Along which axes a value does not vary, whatever the inputs and parameters are."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from lensfx.analysis.axes import Axes, Carry, Read, all_axes, is_one, lifted
from lensfx.analysis.transfer import FILLED, TABLE, transfer
from lensfx.graph.node import schema_names, shape_of
from lensfx.graph.ops import data_inputs, is_random

__all__ = ["Constants", "owner_of", "sizes", "with_ones"]


def sizes(value: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of a value; empty if it is no tensor."""
    return shape_of(value) or ()


def with_ones(value: fx.Node, axes: Axes) -> Axes:
    """The axes, and those of size 1, along which everything is constant."""
    return axes | {a for a, size in enumerate(sizes(value)) if is_one(size)}


class Constants:
    """Axes along which a value does not vary, for any inputs and parameters.

    Nothing but axes of size 1 is taken for granted of `opaque`.
    """

    def __init__(self, opaque: fx.Node | None = None) -> None:
        self.opaque = opaque
        self._known: dict[fx.Node, Axes] = {}

    def __call__(self, node: fx.Node) -> Axes:
        """The axes, those of size 1 among them."""
        pending = [node]
        while pending:
            top = pending[-1]
            missing = [n for n in self._sources(top) if n not in self._known]
            if missing and top not in self._known:
                pending.extend(missing)
                continue
            pending.pop()
            if top not in self._known:
                self._known[top] = with_ones(top, self._found(top))
        return self._known[node]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        owner, part = owner_of(node)
        if node is self.opaque or owner.op != "call_function" or owner.target in FILLED:
            return []
        if not _moves(owner) and (part is not None or not _is_pointwise(owner)):
            return []
        return [n for n in data_inputs(owner) if shape_of(n) is not None]

    def _found(self, node: fx.Node) -> Axes:
        sources = self._sources(node)
        owner, part = owner_of(node)
        if not sources:
            filled = owner.target in FILLED and node is not self.opaque
            return all_axes(sizes(node)) if filled else frozenset()
        if _moves(owner):
            first, slot = cast(fx.Node, owner.args[0]), schema_names(owner.target)[0]
            read = Read(owner, slot, first, self._known[first], self._known.__getitem__, 0, part)
            outcome = transfer(read)
            return outcome.axes if isinstance(outcome, Carry) else frozenset()
        out = sizes(node)
        aligned = [lifted(self._known[n], sizes(n), out) for n in sources]
        return frozenset.intersection(*aligned)


def owner_of(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The node whose output this is, and its number if it has several."""
    if node.op == "call_function" and node.target is operator.getitem:
        owner, part = cast("tuple[fx.Node, int]", node.args)
        if isinstance(owner.meta.get("val"), tuple | list):
            return owner, part
    return node, None


def _moves(node: fx.Node) -> bool:
    family = TABLE.get(node.target)
    return family is not None and family.moves and len(node.args) > 0


def _is_pointwise(node: fx.Node) -> bool:
    family = TABLE.get(node.target)
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (tagged or (family is not None and family.pointwise)) and not is_random(node)
