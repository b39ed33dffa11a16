"""The hooks attached to a lens: who is called where, in which order, and for how long."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lensfx.errors import HookError
from lensfx.run.hooks import Active, HookFunction, HookPoint
from lensfx.run.names import NameFilter, Names

__all__ = ["Attached", "Registry", "pairs"]

DIRECTIONS = ("fwd", "bwd")


@dataclass(eq=False)
class Attached:
    """One function and the names it is for; `by_name` if a user wrote them out."""

    names: tuple[str, ...]
    fn: HookFunction
    direction: str
    permanent: bool
    by_name: bool


def pairs(hooks: Any) -> list[tuple[NameFilter, Any]]:
    """The entries of a list of hooks, each a name and a function.

    Raises: HookError for anything that is no list of pairs.
    """
    entries = list(hooks) if isinstance(hooks, (list, tuple)) else [hooks]
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise HookError(
                f"{entry!r} is no pair of a name and a function",
                hint="fwd_hooks=[(name, fn), ...]",
            )
    return [(name, fn) for name, fn in entries]


def _takes_two(fn: Any) -> bool:
    try:
        inspect.signature(fn).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        # Some built-in functions do not say what they take.
        return True
    return True


class Registry:
    """Attached hooks in calling order, and one HookPoint per name."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._attached: list[Attached] = []
        self._points: dict[str, HookPoint] = {}

    def check(
        self,
        name: NameFilter,
        fn: Any,
        direction: str = "fwd",
        permanent: bool = False,
    ) -> Attached:
        """A hook with the names it is for; nothing is attached yet.

        Raises: UnknownNameError, or HookError if `fn` cannot be called or there is no such
        direction.
        """
        if not callable(fn):
            raise HookError(
                f"a hook is a function of (value, hook), not {type(fn).__name__}",
                hint="pass lambda value, hook: ...",
            )
        if not _takes_two(fn):
            raise HookError(
                f"the hook for {name} takes other arguments than (value, hook)",
                hint="def hook(value, hook): ...",
            )
        if direction not in DIRECTIONS:
            raise HookError(f"dir={direction!r} is no direction", hint="dir='fwd' or dir='bwd'")
        by_name = name is not None and not callable(name)
        return Attached(tuple(self._names.resolve(name)), fn, direction, permanent, by_name)

    @property
    def change_values(self) -> bool:
        """Whether a hook is attached that is called with values, and so may change them."""
        return any(entry.direction == "fwd" for entry in self._attached)

    def rename(self, names: Names) -> None:
        """Check what is attached from now on against these names."""
        self._names = names

    def add(self, entry: Attached, prepend: bool = False) -> None:
        """Attach a checked hook, behind all others or before them."""
        self._attached.insert(0 if prepend else len(self._attached), entry)

    def remove(self, entry: Attached) -> None:
        """Detach one hook; the others stay."""
        self._attached = [e for e in self._attached if e is not entry]

    def reset(self, direction: str, including_permanent: bool) -> None:
        """Detach all hooks of a direction (`fwd`, `bwd` or `both`)."""
        if direction not in (*DIRECTIONS, "both"):
            raise HookError(f"direction={direction!r} is none", hint="'fwd', 'bwd' or 'both'")
        self._attached = [
            e
            for e in self._attached
            if (e.permanent and not including_permanent)
            or (direction != "both" and e.direction != direction)
        ]

    def clear_contexts(self) -> None:
        """Empty the context of every hook point."""
        for point in self._points.values():
            point.clear_context()

    def active(self, collect: Mapping[str, HookFunction]) -> Active:
        """The hooks of one run; `collect` are called with gradients after all others."""
        calls: dict[str, dict[str, list[HookFunction]]] = {d: {} for d in DIRECTIONS}
        demanded: set[str] = set()
        for entry in self._attached:
            for name in entry.names:
                calls[entry.direction].setdefault(name, []).append(entry.fn)
            if entry.by_name and entry.direction == "bwd":
                demanded.update(entry.names)
        for name in {*calls["fwd"], *calls["bwd"], *collect}:
            self._points.setdefault(name, HookPoint(name))
        return Active(self._points, calls["fwd"], calls["bwd"], collect, frozenset(demanded))
