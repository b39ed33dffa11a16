"""From hook names to places in the graph, and from what a user writes to hook names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.errors import UnknownNameError
from lensfx.graph.names import native_name
from lensfx.graph.node import is_op, is_weight, value_of
from lensfx.graph.ops import is_hook
from lensfx.graph.program import Program

__all__ = ["NameFilter", "Names", "Place"]

aten = torch.ops.aten

NameFilter = str | Sequence[str] | Callable[[str], bool] | None
_NORMALIZED = "hook_normalized"


@dataclass(frozen=True)
class Place:
    """Where a name is read and edited: a node, or the divisor of the norm that a node is."""

    node: fx.Node
    is_scale: bool = False


class Names:
    """The hook names of a program: canonical ones first, then one native name per operator."""

    def __init__(self, program: Program) -> None:
        canonical: dict[str, Place] = {}
        native: dict[str, Place] = {}
        for node in program.graph.nodes:
            if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
                continue
            if is_hook(node):
                name, source = str(node.args[1]), node.args[0]
                if name.endswith(_NORMALIZED) and _is_whole_norm(source):
                    assert isinstance(source, fx.Node)
                    scale = name.removesuffix(_NORMALIZED) + "hook_scale"
                    canonical[scale] = Place(source, is_scale=True)
                canonical[name] = Place(node)
            elif native_name(node) and not is_weight(node):
                native[native_name(node)] = Place(node)
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


def _is_whole_norm(node: object) -> bool:
    return is_op(node, aten.layer_norm.default, aten.rms_norm.default)
