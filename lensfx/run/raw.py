"""From a value of the rewritten model to the model's own and back: what passes did to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lensfx.errors import LensError
from lensfx.graph.blocks import evaluate
from lensfx.graph.layout import PLAIN, Layout
from lensfx.graph.names import native_name
from lensfx.graph.node import outputs_of
from lensfx.graph.ops import is_hook
from lensfx.graph.program import Change, Formula, Program, Rewrite
from lensfx.run.names import Place

__all__ = ["Both", "Call", "Kind", "Maps", "captured"]

Kind = Literal["value", "direction", "probe"]
KINDS = ("value", "direction", "probe")
# Parts that are the same numbers whatever a pass moved between a norm, its readers and a bias.
_KEPT = ("scale", "reciprocal", "pattern")
_COPIES = ("input", "shared")
_AGAIN = "cache.raw(name) computes it again from the call, where no hook was attached"


def captured(program: Program) -> Program:
    """The program as it was before any pass, with the same tensors."""
    base = program.unfolded or program
    if not base.stages:
        return base
    first = base.stages[0].graph
    read = {str(n.target) for n in first.nodes if n.op == "get_attr"}
    tensors = MappingProxyType({k: t for k, t in base.tensors.items() if k in read})
    none: dict[str, Any] = {"passes": (), "journal": (), "reports": (), "stages": ()}
    return replace(base, graph=first, tensors=tensors, unfolded=None, **none)


class Wrapped(Protocol):
    """What a call needs of a lens."""

    @property
    def raw(self) -> Any:
        """The model before any pass, as a lens."""

    def to_raw(self, name: str, x: Tensor) -> Tensor:
        """A value as it would be there."""


@dataclass(frozen=True)
class Call:
    """The call that a cache holds the values of, so that raw ones can be computed from it."""

    lens: Wrapped
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: tuple[int, ...]
    edited: bool

    @classmethod
    def of(
        cls,
        lens: Wrapped,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        edited: bool,
    ) -> Call:
        """A call as it is now."""
        return cls(lens, args, dict(kwargs), options, _versions(args, kwargs), edited)

    def raw(self, name: str, value: Tensor) -> Tensor:
        """The value of a name before any pass.

        Raises: LensError where it is not known and the call cannot be run again.
        """
        gradient = name.endswith("_grad")
        if gradient:
            raise LensError(
                f"{name} is a gradient, which has no raw value here",
                hint="lens.raw.run_with_cache(..., incl_bwd=True)",
            )
        try:
            return self.lens.to_raw(name, value)
        except LensError as known:
            if self.edited:
                raise LensError(
                    known.headline,
                    hint="run without hooks: under them the raw value cannot be computed again",
                ) from known
        if _versions(self.args, self.kwargs) != self.versions:
            raise LensError(
                f"the inputs were written to since {name} was cached",
                hint="run_with_cache again",
            )
        _, cache = self.lens.raw.run_with_cache(
            *self.args, names_filter=name, **self.options, **self.kwargs
        )
        found: Tensor = cache[name]
        return found


def _versions(args: Any, kwargs: Any) -> tuple[int, ...]:
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return tuple(t._version for t in leaves if isinstance(t, Tensor))


class Both:
    """The rewritten model and the model before any pass on one call, to hold maps against."""

    def __init__(self, now: Any, was: Any, program: Program) -> None:
        self._now, self._was, self._program = now, was, program
        self._right: dict[str, bool] = {}

    def check(self, name: str, place: Place, maps: Maps) -> None:
        """Pass if the map of a name is right on the example call.

        Raises: LensError where it is not, or the model before any pass has no such name.
        """
        if name not in self._was.hook_names:
            raise LensError(
                f"the model before any pass has no value {name}",
                hint="lens.raw.hook_names lists those it has",
            )
        if name not in self._right:
            was, now = (self._value(lens, name) for lens in (self._was, self._now))
            self._right[name] = maps.holds(name, place, was, now)
        if not self._right[name]:
            maps.explain(name, place)
            raise LensError(f"no pass says how it changed {name}", hint=_AGAIN)

    def _value(self, lens: Any, name: str) -> Tensor:
        signature, given = self._program.signature, iter(self._program.example)
        flat = [next(given).clone() if f.is_tensor else f.constant for f in signature.leaves]
        args, kwargs = pytree.tree_unflatten(flat, signature.in_spec)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _, cache = lens.run_with_cache(*args, names_filter=name, **kwargs)
        found: Tensor = cache[name]
        return found


@dataclass(frozen=True)
class Step:
    """`was = (now * scale + shift) @ turn`, in the axes a hook sees, leading ones left out."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    turn: Tensor | None = None
    free: tuple[int, ...] = ()

    def was(self, x: Tensor, kind: Kind) -> Tensor:
        """A value, direction or probe of what is now as one of what was."""
        if kind == "probe":
            return _turned(_divided(x, self.scale), self.turn, inverse=True, transposed=True)
        x = x if self.scale is None else x * self.scale
        x = x if self.shift is None or kind == "direction" else x + self.shift
        return _turned(x, self.turn)

    def now(self, x: Tensor, kind: Kind) -> Tensor:
        """A value, direction or probe of what was as one of what is now."""
        if self.free and kind != "probe":
            x = x - x.mean(self.free, keepdim=True)
        if kind == "probe":
            x = _turned(x, self.turn, transposed=True)
            return x if self.scale is None else x * self.scale
        x = _turned(x, self.turn, inverse=True)
        x = x if self.shift is None or kind == "direction" else x - self.shift
        return _divided(x, self.scale)


class Maps:
    """How the values of one rewritten program go back to those of the program it came from."""

    def __init__(self, program: Program) -> None:
        self._base = program.unfolded or program
        self._graph = program.graph

    def to_raw(self, name: str, place: Place, x: Tensor, kind: Kind = "value") -> Tensor:
        """What was at a name, given what is there now.

        Raises: LensError where passes took something off that the value does not tell.
        """
        _checked(name, x, kind)
        wide = x.double()
        for step in self._steps(name, place):
            if step.free and kind == "value":
                raise LensError(
                    f"{name} was centred, and what was taken off cannot be told from its value",
                    hint=_AGAIN,
                )
            wide = _fitting(name, wide, step).was(wide, kind)
        return wide.to(x.dtype)

    def from_raw(self, name: str, place: Place, x: Tensor, kind: Kind = "direction") -> Tensor:
        """What is at a name now, given what was there.

        Raises: LensError where that cannot be told.
        """
        _checked(name, x, kind)
        wide = x.double()
        for step in reversed(self._steps(name, place)):
            wide = _fitting(name, wide, step).now(wide, kind)
        return wide.to(x.dtype)

    def holds(self, name: str, place: Place, was: Tensor, now: Tensor) -> bool:
        """Whether the map is right of one value before all passes and the one of today."""
        try:
            if any(step.free for step in self._steps(name, place)):
                return _close(self.from_raw(name, place, was, "value"), now)
            return _close(self.to_raw(name, place, now), was)
        except (LensError, RuntimeError):
            return False

    def explain(self, name: str, place: Place) -> None:
        """Pass if something is known of how a value changed.

        Raises: LensError that says why nothing is.
        """
        self._steps(name, place)

    def _steps(self, name: str, place: Place) -> list[Step]:
        """From today's value to the captured one, in that order.

        Raises: LensError for a part of a value that passes changed in a way nobody wrote down.
        """
        node, layout = _value(place.node), place.layout
        if not all(stage.entry.contract.everywhere for stage in self._base.stages[1:]):
            raise LensError("a pass made another function of the model", hint=_AGAIN)
        if place.part in _KEPT:
            return []
        if name.endswith(".hook_normalized"):
            # A norm's gain and shift come behind it, and a shift of what it reads dies in it.
            return [self._step(c, layout) for c in self._changes(node) if c.turn is not None]
        if place.part in _COPIES and place.point is not None and place.point.source is not None:
            node, layout = _value(place.point.source), PLAIN
        elif place.part not in ("", "rows") and self._base.journal:
            raise LensError(f"no pass says how it changed {name}, a part of a value", hint=_AGAIN)
        return [self._step(change, layout) for change in self._changes(node)]

    def _changes(self, node: fx.Node) -> Iterator[Change]:
        """What the passes did to one value, the last first.

        Raises: LensError for a value that the model never had.
        """
        current, native = node.name, native_name(node)
        stages = self._base.stages
        for before, after in zip(stages[-2::-1], stages[:0:-1], strict=True):
            for rewrite in reversed(after.rewrites):
                yield from (c for c in rewrite.changes if c.value == current)
                current = _before(rewrite, current)
            was = next((n for n in before.graph.nodes if n.name == current), None)
            if was is None:
                raise LensError(
                    f"{native or current} was made by {after.name}: the model has no such value",
                    hint="lens.raw.hook_names lists those it has",
                )

    def _step(self, change: Change, layout: Layout) -> Step:
        parts = (change.scale, change.shift, change.turn)
        scale, shift, turn = (None if f is None else self._tensor(f) for f in parts)
        free = change.free
        return Step(_trimmed(scale, layout), _trimmed(shift, layout), turn, _moved(free, layout))

    def _tensor(self, formula: Formula) -> Tensor:
        (root,) = outputs_of(formula.graph)
        return evaluate(root, lambda n: self._base.tensors[str(n.target)], torch.float64)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two values are the same but for rounding in the dtype they are of."""
    if a.shape != b.shape or not a.is_floating_point():
        return False
    bound = max(1e3 * torch.finfo(torch.float32).eps, 8 * torch.finfo(b.dtype).eps)
    known = b.isfinite()
    a, b = (t.double().where(known, 0.0) for t in (a, b))
    return bool((a - b).norm() <= bound * b.norm())


def _value(node: fx.Node) -> fx.Node:
    """The value that a hook point gives a name to."""
    while is_hook(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _before(rewrite: Rewrite, name: str) -> str:
    return next((old for old, new in rewrite.sites if new == name), name)


def _trimmed(t: Tensor | None, layout: Layout) -> Tensor | None:
    """A tensor that broadcasts against a node's value, against what its hook shows instead."""
    if t is None:
        return None
    for axis, sizes in layout.splits:
        parts = [1] * len(sizes) if t.shape[axis] == 1 else list(sizes)
        t = t.unflatten(axis, parts)
    t = t.permute(layout.order) if layout.order else t
    while t.ndim and t.shape[0] == 1:
        t = t[0]
    return t


def _moved(free: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Axes of a node's value counted from the end of what its hook shows."""
    if not free:
        return ()
    rank = max(len(layout.order), max(free) + 1)
    order = layout.order or tuple(range(rank))
    return tuple(order.index(a) - len(order) for a in free)


def _turned(
    x: Tensor, turn: Tensor | None, inverse: bool = False, transposed: bool = False
) -> Tensor:
    """Rows times a matrix `[d, d]`, or times one of each head, `[..., head, d] @ [head, d, d]`."""
    if turn is None:
        return x
    turn = torch.linalg.inv(turn) if inverse else turn
    turn = turn.mT if transposed else turn
    return (x.unsqueeze(-2) @ turn).squeeze(-2)


def _divided(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x
    if bool((scale == 0).any()):
        where = [int(i) for i in (scale == 0).nonzero()[0]]
        raise LensError(
            f"the gain that was folded away is 0 at {where}, so what was there cannot be undone",
            hint="map from the rewritten model to the raw one instead, or wrap without the fold",
        )
    return x / scale


def _checked(name: str, x: Any, kind: str) -> None:
    if kind not in KINDS:
        raise LensError(f"kind={kind!r} is unknown", hint=f"one of {', '.join(KINDS)}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise LensError(f"{name} is mapped from a tensor of real numbers, not from {given}")


def _fitting(name: str, x: Tensor, step: Step) -> Step:
    """The step on the device of a tensor whose last axes it fits."""
    for part in (step.scale, step.shift):
        wanted = () if part is None else tuple(part.shape)
        given = tuple(x.shape[x.ndim - len(wanted) :]) if len(wanted) <= x.ndim else None
        fits = given is not None and all(w in (1, g) for w, g in zip(wanted, given, strict=True))
        if not fits:
            raise LensError(
                f"{name} ends in axes of sizes {list(wanted)}, and this has the shape "
                f"{list(x.shape)}",
                hint="give a value, or a direction, with the last axes that the cache shows",
            )
    scale, shift, turn = (
        None if t is None else t.to(x.device) for t in (step.scale, step.shift, step.turn)
    )
    return replace(step, scale=scale, shift=shift, turn=turn)
