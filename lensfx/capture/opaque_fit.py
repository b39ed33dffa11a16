"""What real runs of a module show, and the rules by which its outputs have their sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lensfx.errors import CaptureError
from lensfx.graph.opaque import Output, Size, known_sizes

__all__ = ["Fit", "Meta", "Seen", "alike", "flattened", "rebuilt", "tensors_of"]


@dataclass
class _Record:
    """A dataclass object of the user's, taken apart."""

    kind: type
    values: dict[str, Any]


pytree.register_pytree_node(
    _Record,
    lambda r: (list(r.values.values()), (r.kind, tuple(r.values))),
    lambda values, context: _Record(context[0], dict(zip(context[1], values, strict=True))),
)


def flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and tree of a value; dataclass objects are taken apart as well."""
    return pytree.tree_flatten(_opened(value))


def _opened(value: Any) -> Any:
    def opened(part: Any) -> Any:
        if isinstance(part, torch.Size):
            return tuple(part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            names = [f.name for f in dataclasses.fields(part) if hasattr(part, f.name)]
            return _Record(type(part), {n: _opened(getattr(part, n)) for n in names})
        return part

    return pytree.tree_map(opened, value)


def rebuilt(value: Any) -> Any:
    """The value again, dataclass objects put together."""

    def one(part: Any) -> Any:
        if not isinstance(part, _Record):
            return part
        made: Any = object.__new__(part.kind)
        for name, held in part.values.items():
            object.__setattr__(made, name, rebuilt(held))
        return made

    return pytree.tree_map(one, value, is_leaf=lambda part: isinstance(part, _Record))


@dataclass
class Seen:
    """One call of a module in a real run."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    results: list[Any] = field(default_factory=list)
    out_spec: Any = None
    updates: tuple[int, ...] = ()
    state: int = 0


class Meta:
    """What is kept of a tensor: no numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        axes, strides = range(tensor.ndim), tensor.stride()
        ordered = axes if tensor.is_contiguous() else sorted(axes, key=lambda a: (-strides[a], a))
        self.order = tuple(ordered)

    def is_floating_point(self) -> bool:
        """Whether it held floats."""
        return self.dtype.is_floating_point


def tensors_of(values: Sequence[Any]) -> list[Any]:
    """The tensors among some leaves, or what is kept of them."""
    return [v for v in values if isinstance(v, (Tensor, Meta))]


def alike(seen: Sequence[Any], traced: Sequence[Any]) -> bool:
    """Whether a call in a real run is the call in the trace, at whatever sizes."""
    for a, b in zip(seen, traced, strict=True):
        if isinstance(a, Meta):
            if not isinstance(b, Tensor) or len(a.shape) != b.ndim:
                return False
        elif isinstance(b, torch.SymInt):
            if type(a) is not int:
                return False
        elif not _equal(a, b):
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    try:
        return a is b or (type(a) is type(b) and bool(a == b))
    except Exception:
        # The user's `__eq__`, and results without a truth value: not known to be equal.
        return False


class Fit:
    """The rules by which all observed calls of one site have the outputs that they have."""

    def __init__(self, path: str, calls: Sequence[Seen], kinds: Sequence[str]) -> None:
        self.path, self.calls = path, calls
        self.known = [
            known_sizes(
                tensors_of(s.leaves),
                [v for v, k in zip(s.leaves, kinds, strict=True) if k == "size"],
            )
            for s in calls
        ]
        self.columns = list(zip(*self.known, strict=True))

    def results(self) -> tuple[list[tuple[str, Any]], list[Output]]:
        """The flat results of the site and its output tensors.

        Raises: CaptureError if the runs contradict each other.
        """
        first = self.calls[0]
        if any(s.out_spec != first.out_spec for s in self.calls):
            raise self._refusal("results of another structure", "")
        results: list[tuple[str, Any]] = []
        outputs: list[Output] = []
        for values in zip(*(s.results for s in self.calls), strict=True):
            if isinstance(values[0], Meta):
                results.append(("tensor", len(outputs)))
                outputs.append(self._output(values))
            elif all(_equal(v, values[0]) for v in values):
                results.append(("constant", values[0]))
            elif all(type(v) is int for v in values) and (size := self.size(values)) is not None:
                results.append(("size", size))
            else:
                raise self._refusal(f"{values[0]!r}", f" and {values[-1]!r}")
        return results, outputs

    def _refusal(self, one: str, other: str) -> CaptureError:
        return CaptureError(
            f"the opaque module {self.path} returns {one}{other} in different runs",
            hint="let it return tensors, and of the rest always the same",
        )

    def _output(self, values: Sequence[Any]) -> Output:
        first = values[0]
        for value in values:
            if not isinstance(value, Meta) or len(value.shape) != len(first.shape):
                raise self._refusal("tensors with another number of axes", "")
            if value.dtype != first.dtype:
                raise self._refusal(f"{first.dtype}", f" and {value.dtype}")
        axes = range(len(first.shape))
        order = first.order if all(v.order == first.order for v in values) else tuple(axes)
        sizes = [self.size([v.shape[a] for v in values], (len(axes), a)) for a in axes]
        return Output(tuple(sizes), first.dtype, order)

    def size(self, seen: Sequence[int], place: tuple[int, int] | None = None) -> Size | None:
        """The rule for a size with these values; at its own place in an input, or anywhere."""
        seen = tuple(seen)
        fits = [k for k, column in enumerate(self.columns) if column == seen]
        same = [k for k in self._places(place) if k in fits]
        constant = len(set(seen)) == 1
        if same:
            return Size((same[0],))
        if fits and not (constant and seen[0] < 2):
            return Size((fits[0],))
        if constant:
            return Size(factor=seen[0])
        return self._product(seen) or self._line(seen)

    def _places(self, place: tuple[int, int] | None) -> list[int]:
        shapes = [m.shape for m in tensors_of(self.calls[0].leaves)]
        starts = itertools.accumulate((len(s) for s in shapes), initial=0)
        pairs = zip(starts, shapes, strict=False)
        return [start + place[1] for start, s in pairs if place and len(s) == place[0]]

    def _product(self, seen: tuple[int, ...]) -> Size | None:
        for count in (2, 3):
            for of in itertools.combinations_with_replacement(range(len(self.columns)), count):
                if all(Size(of).among(k) == s for k, s in zip(self.known, seen, strict=True)):
                    return Size(of)
        return None

    def _line(self, seen: tuple[int, ...]) -> Size | None:
        """A multiple of a known size, or one that is some more, which needs a third witness."""
        for k, column in enumerate(self.columns):
            points = sorted({*zip(column, seen, strict=True)})
            if len({x for x, _ in points}) < max(2, len(points)):
                continue
            (x, y), (x1, y1) = points[0], points[-1]
            factor = (y1 - y) // (x1 - x)
            rule = Size((k,), factor, y - factor * x)
            if (rule.more == 0 or len(points) > 2) and factor > 0:
                if all(rule.among(row) == s for row, s in zip(self.known, seen, strict=True)):
                    return rule
        return None
