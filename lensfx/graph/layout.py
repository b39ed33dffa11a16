"""How the axes of a value in the graph become those a hook shows: split, then put in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["PLAIN", "Layout", "as_stored", "show", "shown", "shown_shape", "store"]

aten = torch.ops.aten

Call = Callable[..., Any]
Splits = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Layout:
    """How the axes of a node's value become those of a hook: axes split, then put in order.

    `splits` gives an axis and the sizes it falls into (-1: the rest), the last axis first;
    `order` the new axes by their number after the splits.
    """

    splits: Splits = ()
    order: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the value is as the hook shows it."""
        return not self.splits and self.order == tuple(range(len(self.order)))


PLAIN = Layout()


def show(call: Call, value: Any, layout: Layout) -> Any:
    """A value as its hook shows it, a view wherever the sizes allow one; `call` makes each step."""
    if layout.is_plain:
        return value
    for axis, sizes in layout.splits:
        value = call(aten.unflatten.int, value, axis, list(sizes))
    return call(aten.permute.default, value, list(layout.order)) if layout.order else value


def store(call: Call, value: Any, layout: Layout) -> Any:
    """What a hook gives back, with the axes the graph goes on with; `call` makes each step."""
    if layout.is_plain:
        return value
    if layout.order:
        value = call(aten.permute.default, value, _inverse(layout.order))
    for axis, sizes in reversed(layout.splits):
        value = call(aten.flatten.using_ints, value, axis, axis + len(sizes) - 1)
    return value


def shown(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A value as its hook shows it."""
    found: torch.Tensor = show(_now, value, layout)
    return found


def as_stored(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What a hook gives back, with the axes the graph goes on with."""
    found: torch.Tensor = store(_now, value, layout)
    return found


def _now(target: Any, *args: Any) -> Any:
    return target(*args)


def shown_shape(shape: Sequence[Any], layout: Layout) -> tuple[Any, ...]:
    """The shape of a value as its hook shows it, sizes that stay open worked out."""
    sizes = list(shape)
    for axis, parts in layout.splits:
        known = 1
        for part in parts:
            known *= 1 if part == -1 else part
        sizes[axis : axis + 1] = [sizes[axis] // known if p == -1 else p for p in parts]
    return tuple(sizes[i] for i in layout.order) if layout.order else tuple(sizes)


def _inverse(order: Sequence[int]) -> list[int]:
    found = [0] * len(order)
    for new, old in enumerate(order):
        found[old] = new
    return found
