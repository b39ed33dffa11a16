"""From hook names to places in the graph, and from what a user writes to hook names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis import Point
from lensfx.errors import UnknownNameError
from lensfx.graph.layout import PLAIN, Layout, shown_shape
from lensfx.graph.names import native_name
from lensfx.graph.node import is_weight, shape_of, value_of
from lensfx.graph.ops import hook_layout, is_hook
from lensfx.graph.program import Program

__all__ = ["NameFilter", "Names", "Place"]

NameFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class Place:
    """Where a name is read and edited: a node, or a part of what it computes.

    `layout` is how hooks see the value, `point` what the structure says of a part.
    """

    node: fx.Node
    part: str = ""
    layout: Layout = PLAIN
    point: Point | None = None

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """The sizes of the node's value as hooks see it; None for a part, which has others."""
        shape = shape_of(self.node)
        return None if self.part or shape is None else shown_shape(shape, self.layout)


class Names:
    """The hook names of a program: canonical ones first, then one native name per operator.

    The canonical ones are those of the hook points in its graph, and of parts of values at the
    `points` of its structure, which have none; `without` are names that numbers contradict.
    """

    def __init__(
        self, program: Program, points: Iterable[Point] = (), without: Collection[str] = ()
    ) -> None:
        found: list[tuple[fx.Node, str, Place]] = []
        native: dict[str, Place] = {}
        for node in program.graph.nodes:
            if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
                continue
            if is_hook(node):
                found.append((node, str(node.args[1]), Place(node, layout=hook_layout(node))))
            elif native_name(node) and not is_weight(node):
                native[native_name(node)] = Place(node)
        if found:
            # Parts of a norm come before it, and of two at one node the later in a run is first.
            parts = [p for p in points if p.part]
            found += [(p.node, p.name, Place(p.node, p.part, p.layout, p)) for p in parts[::-1]]
            # A run writes the parts of a node before it visits the node itself.
            found.sort(key=lambda entry: (entry[0], not entry[2].part))
        canonical = {name: place for _, name, place in found if name not in without}
        self.canonical = tuple(canonical)
        self.places = {**native, **canonical}
        self.all = (*canonical, *(n for n in native if n not in canonical))

    def resolve(self, wanted: NameFilter) -> list[str]:
        """The names meant by a name, a list of names, a predicate, or None for all, in order.

        Raises: UnknownNameError for a name that is not there, with the nearest ones, and for a
        predicate that holds for no name.
        """
        if wanted is None:
            return list(self.all)
        if callable(wanted):
            found = [n for n in self.all if wanted(n)]
            if not found:
                raise UnknownNameError(
                    "the predicate holds for no hook name",
                    hint=f"lens.hook_names begins with {', '.join(self.all[:4])}",
                )
            return found
        if not isinstance(wanted, Iterable):
            raise UnknownNameError(
                f"{wanted!r} is no hook name, list of names or predicate",
                hint=f"lens.hook_names begins with {', '.join(self.all[:4])}",
            )
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in names:
            if name not in self.places:
                raise self.unknown(name)
        return list(dict.fromkeys(names))

    def unknown(self, name: object) -> UnknownNameError:
        """The error for a name that is not there."""
        near = nearest(str(name), self.all)
        hint = f"the nearest are {', '.join(near)}" if near else "lens.hook_names lists them all"
        return UnknownNameError(f"there is no hook point {name!r}", hint=hint)


def nearest(name: str, known: Iterable[str], count: int = 4) -> list[str]:
    """The known names most like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
