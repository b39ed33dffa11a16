"""How calls bind to a captured graph: the model's own signature, its input and output trees."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lensfx.errors import GuardError

__all__ = ["Leaf", "Signature", "bound_arguments", "filled", "outline"]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the input tree: a tensor the graph reads, or a constant baked at capture.

    `kept` is a copy of a constant that can change. `same` numbers the first tensor leaf that was
    this very object: a model may ask `q is k`.
    """

    name: str
    is_tensor: bool
    constant: Any = None
    kept: Any = None
    same: int | None = None


def bound_arguments(
    forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, in the signature's order; `*args[i]` for extra positions.

    Raises: TypeError, as the model's own call would.
    """
    bound = forward.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = forward.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"*{name}[{i}]": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            if twice := named.keys() & value.keys():
                raise TypeError(f"{sorted(twice)} given by position and again by keyword")
            named.update(value)
        else:
            named[name] = value
    return named


@dataclass(frozen=True)
class Signature:
    """How a call becomes the flat tensors a graph takes, and how its flat results become a value.

    `positional` and `keywords` say how the example call was split; any call that binds to the
    model's own signature is rearranged into that split. `watches_identity` if the model does
    something else where two of its inputs are one object.
    """

    forward: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    out_spec: pytree.TreeSpec
    outputs: tuple[str, ...]
    watches_identity: bool = False

    @staticmethod
    def split(
        forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
        """The bound arguments of a call, and which of them go by position and which by keyword."""
        named = bound_arguments(forward, args, kwargs)
        positional = tuple(list(named)[: len(args)])
        return named, positional, tuple(n for n in named if n not in positional)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in the order of the graph's placeholders.

        Raises: GuardError if the call does not fit the model's signature, has another structure
        than the captured one, or another value where the example's was baked in.
        """
        try:
            named = bound_arguments(self.forward, args, kwargs)
        except TypeError as error:
            raise GuardError(f"this call does not fit the model's signature: {error}") from None
        values = {name: self._given(named, name) for name in (*self.positional, *self.keywords)}
        for name in named.keys() - values.keys():
            self._expect_default(name, named[name])
        tree = (tuple(values[n] for n in self.positional), {n: values[n] for n in self.keywords})
        flat, spec = pytree.tree_flatten(tree)
        if spec != self.in_spec:
            raise self._other_structure(values)
        tensors = [v for leaf, v in zip(self.leaves, flat, strict=True) if _checked(leaf, v)]
        self._check_same(tensors)
        return tensors

    def _check_same(self, tensors: Sequence[torch.Tensor]) -> None:
        if not self.watches_identity:
            return
        first: dict[int, int] = {}
        for k, tensor in enumerate(tensors):
            now = first.setdefault(id(tensor), k)
            then = self.same[k]
            if now != then:
                other = self.tensor_names[now if now != k else then]
                verb = "is" if now != k else "was"
                raise GuardError(
                    f"{self.tensor_names[k]} {verb} the same tensor as {other}, and "
                    f"{'was not at capture' if now != k else 'is not here'}",
                    hint="capture again with this call: a model may ask whether they are the same",
                )

    @cached_property
    def same(self) -> tuple[int, ...]:
        """For each tensor leaf, the number of the first leaf that is this very object."""
        tensors = [leaf for leaf in self.leaves if leaf.is_tensor]
        return tuple(k if leaf.same is None else leaf.same for k, leaf in enumerate(tensors))

    def _other_structure(self, values: Mapping[str, Any]) -> GuardError:
        leaves = [leaf.constant for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        then = {**dict(zip(self.positional, args, strict=True)), **kwargs}
        # By the trees themselves: an object made anew from them may leave empty fields out.
        names = (*self.positional, *self.keywords)
        trees = [tree for side in self.in_spec._children for tree in side._children]
        known = dict(zip(names, trees, strict=True))
        name = next(n for n, v in values.items() if pytree.tree_structure(v) != known[n])
        return GuardError(
            f"{name} is {outline(values[name])}, and was {outline(then[name])} at capture",
            hint="capture again with an example of this structure",
        )

    def _given(self, named: Mapping[str, Any], name: str) -> Any:
        if name in named:
            return named[name]
        parameter = self.forward.parameters.get(name)
        if parameter is None or parameter.default is inspect.Parameter.empty:
            raise GuardError(
                f"argument {name!r} was given at capture and is missing here",
                hint=f"pass {name}, or capture again without it",
            )
        return parameter.default

    def _expect_default(self, name: str, value: Any) -> None:
        parameter = self.forward.parameters.get(name)
        default = inspect.Parameter.empty if parameter is None else parameter.default
        if not _same(default, value):
            raise GuardError(
                f"argument {name!r} was not given at capture, so the graph does not read it",
                hint=f"capture again with {name} in the example call",
            )

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call whose tensors are these: the inverse of `bind`, in the example's split."""
        args, kwargs = pytree.tree_unflatten(filled(self.leaves, tensors), self.in_spec)
        return tuple(args), dict(kwargs)

    def unflatten(self, flat: list[Any]) -> Any:
        """The model's own kind of result, from the flat results of the graph."""
        return pytree.tree_unflatten(flat, self.out_spec)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of the tensor leaves, in the order of the graph's placeholders."""
        return tuple(leaf.name for leaf in self.leaves if leaf.is_tensor)


def filled(leaves: Sequence[Leaf], tensors: Sequence[torch.Tensor]) -> list[Any]:
    """The leaves of a call: its tensors, one object where it was one at capture, and constants."""
    numbers = iter(range(len(tensors)))
    flat: list[Any] = []
    for leaf in leaves:
        if leaf.is_tensor:
            k = next(numbers)
            flat.append(tensors[k if leaf.same is None else leaf.same])
        else:
            flat.append(leaf.constant)
    return flat


def _checked(leaf: Leaf, value: Any) -> bool:
    if leaf.is_tensor:
        if not isinstance(value, torch.Tensor):
            raise GuardError(
                f"{leaf.name} was a tensor at capture and is {type(value).__name__} here",
                hint="capture again with an example of this kind",
            )
        return True
    if not _unchanged(leaf, value):
        raise GuardError(
            f"{leaf.name} was {leaf.constant!r} at capture and is {_short(value)} here: "
            "values that are not tensors are baked into the graph",
            hint=f"capture again with {leaf.name}={_short(value)}",
        )
    return False


def _unchanged(leaf: Leaf, value: Any) -> bool:
    try:
        return _same(leaf.constant if leaf.kept is None else leaf.kept, value)
    except GuardError:
        if value is leaf.constant:
            return True
        raise


class _Star:
    def __repr__(self) -> str:
        return "*"


def outline(tree: Any) -> str:
    """A tree with a star for each leaf: `{'ids': *, 'masks': [*, *]}`."""
    return repr(pytree.tree_map(lambda leaf: _Star(), tree))


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _own_names(kind: type) -> set[str]:
    """What a class and its bases define, other than `object`."""
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)


def _same(a: Any, b: Any, inside: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether two constants are equal; `inside` are the pairs that these are parts of."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        # Zero has two signs, and a division tells them apart; NaN is not equal to itself.
        return repr(a) == repr(b) if isinstance(a, (float, complex)) else bool(a == b)
    if type(a) not in (tuple, list, dict):
        try:
            equal = a == b
            if isinstance(equal, bool) and (equal or "__eq__" in _own_names(type(a))):
                return equal
            if not isinstance(equal, bool):
                return bool(getattr(equal, "all", lambda: equal)())
        except Exception as error:
            raise GuardError(
                f"values of type {type(a).__name__} cannot be compared: {error}",
                hint="pass the very object that was given at capture, or capture again",
            ) from error
    if (id(a), id(b)) in inside:
        return True
    inside = inside | {(id(a), id(b))}
    mine, other = _parts(a), _parts(b)
    if mine is None or other is None:
        return False
    return list(mine) == list(other) and all(_same(mine[k], other[k], inside) for k in mine)


def _parts(value: Any) -> dict[Any, Any] | None:
    """What an object holds, by name or number; None if that cannot be known."""
    if isinstance(value, dict):
        return value
    if type(value) in (tuple, list):
        return dict(enumerate(value))
    bases = [base for base in type(value).__mro__ if base is not object]
    if any(map(_written_in_c, bases)):
        # It shows its state to `copy` only.
        try:
            made = value.__reduce_ex__(4)
        except Exception:
            # Code of whoever wrote the class, which may refuse with anything.
            return None
        return dict(enumerate(made)) if isinstance(made, tuple) else None
    slots = [m for base in bases for m in vars(base).values() if _is_slot(m)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    held: dict[Any, Any] = dict(sorted(getattr(value, "__dict__", {}).items()))
    for slot in slots:
        with contextlib.suppress(AttributeError):
            held[slot] = slot.__get__(value)
    return held


def _written_in_c(kind: type) -> bool:
    methods = (types.WrapperDescriptorType, types.MethodDescriptorType)
    return any(isinstance(m, methods) and m.__objclass__ is kind for m in vars(kind).values())


def _is_slot(member: Any) -> bool:
    return isinstance(member, types.MemberDescriptorType)
