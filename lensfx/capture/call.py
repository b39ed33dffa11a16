"""An example call taken apart, and the model as a flat function of its tensors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_not
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lensfx.capture.decide import Decisions
from lensfx.capture.untouched import holds_tensors
from lensfx.errors import CaptureError
from lensfx.graph.mode import EVAL, Mode
from lensfx.graph.signature import Leaf, Signature, filled, outline

__all__ = ["Call", "Flat", "Seen", "kind_of", "resized", "taken_apart", "widenings"]

_SYMBOLS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class Seen:
    """What a call of the flat model showed besides tensors; kept outside the module tree."""

    out_spec: Any = None
    outputs: tuple[str, ...] = ()
    constants: tuple[Any, ...] = ()
    rewrote_arguments: bool = False


@dataclass(frozen=True)
class Constant:
    """A leaf of the model's result that no tensor decides."""

    value: Any


@dataclass(frozen=True)
class Call:
    """An example call, taken apart: its input tree, the tensors in it, what a run of it showed."""

    forward: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    example: tuple[torch.Tensor, ...]
    out_spec: Any = None
    outputs: tuple[str, ...] = ()
    contiguous: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()
    mode: Mode = EVAL
    watches_identity: bool = False
    calls: int = 0
    draws: Mapping[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        """How calls bind to a program."""
        inputs = (self.forward, self.positional, self.keywords, self.in_spec, self.leaves)
        return Signature(*inputs, self.out_spec, self.outputs, self.watches_identity)

    def showing(self, seen: Seen) -> Call:
        """The call with the kind of result that was seen."""
        return dataclasses.replace(self, out_spec=seen.out_spec, outputs=seen.outputs)


class Flat(nn.Module):
    """The model as a function from a list of tensors to a list of tensors and sizes.

    With `decisions` the result also holds, behind all else, each value that decided a branch.
    """

    def __init__(
        self, model: nn.Module, call: Call, seen: Seen, decisions: Decisions | None = None
    ) -> None:
        super().__init__()
        self.model = model
        # In a tuple, since what is an attribute of a module is searched and restored by torch.
        self._call = (call, seen, decisions)

    def forward(self, leaves: list[torch.Tensor]) -> list[Any]:
        """The leaves of the model's result that depend on the call."""
        call, seen, decisions = self._call
        flat = filled(call.leaves, leaves)
        args, kwargs = pytree.tree_unflatten(flat, call.in_spec)
        before = pytree.tree_leaves((args, kwargs), is_leaf=_is_object)
        held = [(m._buffers, name, b) for m in self.model.modules() for name, b in _held(m)]
        with call.mode.entered():
            if decisions is None:
                result = self.model(*args, **kwargs)
            else:
                with decisions:
                    result = self.model(*args, **kwargs)
        after = pytree.tree_leaves((args, kwargs), is_leaf=_is_object)
        seen.rewrote_arguments = len(after) != len(before) or any(map(is_not, after, before))
        register_dataclasses(result)
        # A torch.Size holds no symbols, so tracing returns a tuple in its place.
        result = pytree.tree_map_only(torch.Size, tuple, result)
        out, seen.out_spec = pytree.tree_flatten(result)
        # By the result itself: an object made anew from its tree need not have the same leaves.
        seen.outputs = output_names(result)
        for buffers, name, old in held:
            _write_back(buffers, name, old)
        seen.constants = tuple(None if isinstance(v, _SYMBOLS) else Constant(v) for v in out)
        decided = [] if decisions is None else decisions.values
        return [*(v for v in out if isinstance(v, _SYMBOLS)), *decided]


def _is_object(value: Any) -> bool:
    """Whether a value is no plain container: what a cache does to itself, it also returns."""
    return not isinstance(value, (list, tuple, dict))


def _held(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]


def _write_back(buffers: dict[str, Any], name: str, old: torch.Tensor) -> None:
    """Make `self.steps = self.steps + 1` a write into the buffer, which a graph can hold."""
    new = buffers.get(name)
    if new is not old and new is not None and new.shape == old.shape and new.dtype == old.dtype:
        with torch.no_grad():
            old.copy_(new)
        buffers[name] = old


def taken_apart(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode
) -> Call:
    """The call by the model's own signature.

    Raises: CaptureError if the signature does not take it, or an argument hides tensors.
    """
    forward = inspect.signature(model.forward)
    try:
        named, positional, keywords = Signature.split(forward, args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward does not accept this call: {error}",
            hint=f"the signature is {forward}",
        ) from None
    register_dataclasses(named)
    tree = (tuple(named[n] for n in positional), {n: named[n] for n in keywords})
    flat, spec = pytree.tree_flatten(tree)
    leaves = tuple(_leaves(tree, positional))
    for leaf in leaves:
        if not leaf.is_tensor and holds_tensors(leaf.constant):
            kind = type(leaf.constant).__name__
            raise CaptureError(
                f"{leaf.name} is an object of type {kind}, in which torch sees no tensors",
                hint=f"pass the tensors in lists or dicts, or register {kind} as a pytree node",
            )
    for leaf, v in zip(leaves, flat, strict=True):
        if isinstance(v, torch.Tensor) and (v.layout is not torch.strided or v.is_nested):
            kind = "nested" if v.is_nested else str(v.layout).removeprefix("torch.")
            raise CaptureError(
                f"{leaf.name} is a {kind} tensor, and graphs here are of dense ones",
                hint=f"let forward make it out of dense tensors, or pass {leaf.name}.to_dense()",
            )
    tensors = (v.detach() for v in flat if isinstance(v, torch.Tensor))
    example = tuple(v.clone() if v.is_inference() else v for v in tensors)
    return Call(forward, positional, keywords, spec, leaves, example, mode=mode)


def _leaves(tree: Any, positional: Sequence[str]) -> Iterator[Leaf]:
    first_seen: dict[int, int] = {}
    count = itertools.count()
    for path, value in pytree.tree_flatten_with_path(tree)[0]:
        keys: Any = path
        side, first, *rest = keys
        head = positional[first.idx] if side.idx == 0 else str(first.key)
        name = head + pytree.keystr(tuple(rest))
        if isinstance(value, torch.Tensor):
            number = next(count)
            same = first_seen.setdefault(id(value), number)
            yield Leaf(name, True, same=None if same == number else same)
        else:
            yield Leaf(name, False, value, _copy_of(value))


def _copy_of(value: Any) -> Any:
    """What a constant is now, since its owner may change it; None if it cannot be copied."""
    try:
        return copy.deepcopy(value)
    except Exception:
        # The owner's `__deepcopy__`, which may refuse with anything.
        return None


def register_dataclasses(tree: Any) -> None:
    """Make torch see the fields of plain dataclass objects, as it does those of tuples and dicts.

    The class is registered for good, by torch's own public call for it.
    """
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and holds_tensors(leaf):
            if all(f.init for f in dataclasses.fields(leaf)):
                torch.export.register_dataclass(type(leaf))
                register_dataclasses(vars(leaf))


def kind_of(spec: pytree.TreeSpec) -> str:
    """A tree as text, a star for each leaf."""
    return outline(pytree.tree_unflatten([0] * spec.num_leaves, spec))


def _path_name(path: Sequence[Any]) -> str:
    head, *rest = path
    first = str(getattr(head, "key", getattr(head, "idx", head)))
    return first + pytree.keystr(tuple(rest))


def output_names(result: Any) -> tuple[str, ...]:
    """A name for each leaf of the model's result: `logits`, `0`, `hidden[2]`."""
    paths = [p for p, _ in pytree.tree_flatten_with_path(result)[0]]
    return tuple(_path_name(p) if p else "output" for p in paths)


def widenings(example: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The example with its axes of size 1 made larger: all of them, then fewer, then none.

    Torch specialises an axis whose example size is 1. An axis that is 1 by nature makes the
    model fail when it is widened, so the next choice leaves it alone.
    """
    ones = sorted({d for t in example for d, size in enumerate(t.shape) if size == 1})
    sizes = {d: (2, 3, 5, 7, 11, 13)[d % 6] for d in ones}
    choices = [ones, *([d] for d in ones if len(ones) > 1), []]
    for chosen in choices if ones else [[]]:
        yield tuple(_widen(t, {d: sizes[d] for d in chosen}) for t in example)


def _widen(tensor: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    for axis, size in sizes.items():
        if axis < tensor.ndim and tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(size, axis)
    return tensor


def resized(example: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The example, then with all axes of one size made larger together, size by size."""
    yield example
    sizes = sorted({s for t in example for s in t.shape})
    for step in (1, 4):
        for size in sizes:
            yield tuple(_stretched(t, size, size + step) for t in example)


def _stretched(tensor: torch.Tensor, old: int, new: int) -> torch.Tensor:
    for axis, size in enumerate(tensor.shape):
        if size == old and old:
            picked = torch.arange(new, device=tensor.device) % old
            tensor = tensor.index_select(axis, picked)
    return tensor
