"""How to run one call of a module with weights that are lent to it, and its random state."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Call", "Slot", "Source", "leaf", "random_state"]

Source = tuple[Callable[[], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Slot:
    """Where modules keep a weight: its name and the dictionaries that hold it, with their keys."""

    name: str
    places: tuple[tuple[dict[str, Any], str], ...] = field(repr=False)
    is_buffer: bool = False

    def value(self) -> Any:
        """The weight as the module holds it now."""
        holder, key = self.places[0]
        return holder.get(key)


@dataclass(frozen=True)
class Call:
    """How to run one call of a module: leaves are `("tensor", k)`, `("size", k)` or constants."""

    module: nn.Module
    forward: Callable[..., Any]
    slots: tuple[Slot, ...]
    flags: tuple[tuple[nn.Module, bool], ...]
    spec: pytree.TreeSpec
    leaves: tuple[tuple[str, Any], ...]
    rebuilt: Callable[[Any], Any]
    flattened: Callable[[Any], tuple[list[Any], pytree.TreeSpec]]

    def run(
        self, inputs: Sequence[Tensor], sizes: Sequence[int], weights: Sequence[Tensor]
    ) -> tuple[list[Any], pytree.TreeSpec, list[Tensor]]:
        """The flat results, their tree, and the weights as the run left them.

        The module's own weights and training flags are back afterwards.
        """
        kinds: dict[str, Sequence[Any]] = {"tensor": inputs, "size": sizes}
        flat = [kinds[kind][v] if kind in kinds else v for kind, v in self.leaves]
        args, kwargs = self.rebuilt(pytree.tree_unflatten(flat, self.spec))
        with self._prepared(weights) as left:
            results, spec = self.flattened(self.forward(*args, **kwargs))
            for slot, weight in zip(self.slots, weights, strict=True):
                new = slot.value()
                same = isinstance(new, Tensor) and new.shape == weight.shape
                left.append(new if same and slot.is_buffer else weight)
        return results, spec, left

    @contextlib.contextmanager
    def _prepared(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        places = [
            (holder, key, weight)
            for slot, weight in zip(self.slots, weights, strict=True)
            for holder, key in slot.places
        ]
        own = [(holder, key, holder.get(key)) for holder, key, _ in places]
        flags = [(module, module.training) for module, _ in self.flags]
        try:
            _put(places, self.flags)
            yield []
        finally:
            _put(own, flags)

    @contextlib.contextmanager
    def undone(self, tensors: Sequence[Tensor], start: bytes = b"") -> Iterator[None]:
        """Runs inside leave no trace in the module's attributes and in any random state.

        They draw from the state `start` if it is given.
        """
        back = self.noted(tensors)
        try:
            if start:
                _set_random_state(self.sources(tensors), start)
            yield
        finally:
            back()

    def noted(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """A function that puts the module's attributes and all random states back as they are."""
        held = [(m.__dict__, dict(m.__dict__)) for m in self.module.modules()]
        filled = [(v, copy.copy(v)) for _, old in held for v in old.values() if _is_filled(v)]
        sources = self.sources(tensors)
        state = random_state(sources)

        def back() -> None:
            _set_random_state(sources, state)
            for attributes, old in held:
                attributes.clear()
                attributes.update(old)
            for value, before in filled:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)

        return back

    def sources(self, tensors: Sequence[Tensor]) -> list[Source]:
        """Everything that a run on these tensors' devices can draw from, and where it stands."""
        numpy: Any = sys.modules.get("numpy")
        found: list[Source] = [(random.getstate, random.setstate)]
        found += [(numpy.random.get_state, numpy.random.set_state)] if numpy else []
        found += _source_of(torch.default_generator)
        for device in sorted({t.device.index for t in tensors if t.is_cuda}):
            found += _source_of(torch.cuda.default_generators[device])
        held = (v for m in self.module.modules() for v in m.__dict__.values())
        return [*found, *(pair for v in held for pair in _source_of(v))]


def _is_filled(value: Any) -> bool:
    """Whether an attribute is a plain container that a run may have put something into."""
    return type(value) in (list, dict, set)


def _put(
    weights: Sequence[tuple[dict[str, Any], str, Any]], flags: Sequence[tuple[nn.Module, bool]]
) -> None:
    for holder, key, value in weights:
        holder[key] = value
    for module, flag in flags:
        module.__dict__["training"] = flag


def leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """The same numbers, cut off from any gradient but its own."""
    return tensor.detach().requires_grad_(wanted)


def random_state(sources: Sequence[Source]) -> bytes:
    """The state of all these sources."""
    return pickle.dumps([get() for get, _ in sources])


def _set_random_state(sources: Sequence[Source], state: bytes) -> None:
    # What follows the end of a pickle is ignored.
    for (_, put), value in zip(sources, pickle.loads(state), strict=True):
        put(value)


def _source_of(held: Any) -> list[Source]:
    if isinstance(held, torch.Generator):
        # As bytes, since two pickles of a tensor need not be equal.
        state = torch.frombuffer
        return [
            (
                lambda: bytes(held.get_state().tolist()),
                lambda given: held.set_state(state(bytearray(given), dtype=torch.uint8)),
            )
        ]
    if isinstance(held, random.Random):
        return [(held.getstate, held.setstate)]
    bits = getattr(held, "bit_generator", getattr(held, "_bit_generator", None))
    return [] if bits is None else [(lambda: bits.state, partial(setattr, bits, "state"))]
