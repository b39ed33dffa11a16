"""Pattern values: what a rule looks for, written by operator and argument name.

A pattern is a frozen value without state. `Op` describes one operator node and, by schema name,
the arguments the rule cares about; arguments it does not name may be anything.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lensfx.graph.ops import CASTS, VIEWS

__all__ = [
    "Any",
    "Const",
    "EveryReader",
    "Maybe",
    "OneOf",
    "Op",
    "Param",
    "Pattern",
    "Ref",
    "Sites",
    "Through",
]


@dataclass(frozen=True)
class Any:
    """Any node; bound to `name`."""

    name: str


@dataclass(frozen=True)
class Param:
    """A node that depends on parameters and constants only; bound to `name`.

    `axes` restricts its rank.
    """

    name: str
    axes: int | None = None


class _AnyValue:
    def __repr__(self) -> str:
        return "any value"


ANY_VALUE = _AnyValue()


@dataclass(frozen=True)
class Const:
    """A literal: bound to `name`, and equal to `value` if one is given.

    Floats match within `tolerance` relative: exported literals may be off by one rounding.
    """

    name: str | None = None
    value: typing.Any = ANY_VALUE
    tolerance: float = 1e-9


@dataclass(frozen=True)
class Ref:
    """The node already bound to `name`, or one that computes the same from the same inputs."""

    name: str


@dataclass(frozen=True)
class Maybe:
    """The pattern, or nothing: an absent optional argument binds every name in it to None."""

    pattern: Pattern


@dataclass(frozen=True)
class OneOf:
    """The first of the alternatives that lets the rest of the pattern match."""

    alternatives: tuple[Pattern, ...]

    def __init__(self, *alternatives: Pattern) -> None:
        object.__setattr__(self, "alternatives", alternatives)


@dataclass(frozen=True)
class Op:
    """A call of one of `targets` whose named arguments match; bound to `name`.

    Operators that commute match with their two operands in either order. `readers=1` asks that
    nobody else reads the node's data.
    """

    name: str
    targets: tuple[typing.Any, ...]
    args: Mapping[str, Pattern] = field(default_factory=dict)
    readers: int | None = None


@dataclass(frozen=True)
class Through:
    """The pattern behind any number of views and casts that keep axis `keeps` whole and in place.

    `path`, if given, is bound to the nodes passed through, nearest first.
    """

    pattern: Pattern
    keeps: int = -1
    via: frozenset[typing.Any] = VIEWS | CASTS
    path: str | None = None


@dataclass(frozen=True)
class EveryReader:
    """A producer all of whose readers match `reader`, directly or through views and casts.

    Each reader's bindings are one entry of `match.readers`. Readers that do not match make a
    miss that names them, or are bound to `others` if it is given.
    """

    producer: Op
    reader: Op
    keeps: int = -1
    others: str | None = None


@dataclass(frozen=True)
class Sites:
    """The places an analysis finds in a whole program, each a Match, or a Miss that is reported.

    A `live` one is asked for the next place when the one before it was rewritten.
    """

    find: Callable[[typing.Any], Iterable[typing.Any]]
    live: bool = False


Pattern = Any | Param | Const | Ref | Maybe | OneOf | Op | Through | EveryReader
