"""Rule and Pass: frozen values. A rule says what to find, when not to, and what to put there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from lensfx.graph.node import where
from lensfx.rewrite.edit import Edit
from lensfx.rewrite.match import Match
from lensfx.rewrite.pattern import Pattern, Sites

__all__ = ["Pass", "PassReport", "Refusal", "Rule"]


@dataclass(frozen=True)
class Rule:
    """One rewrite: a pattern, `unless`, and `replace`.

    `unless` returns None to fire, a reason to refuse and report, or an empty string where the
    pattern matched something that is none of the rule's business.
    """

    pattern: Pattern | Sites
    unless: Callable[[Match], str | None]
    replace: Callable[[Match, Edit], None]


@dataclass(frozen=True)
class Refusal:
    """A site a pass left alone: where it is, why, and the node that forbids it."""

    root: str
    path: str
    reason: str
    blame: str

    @classmethod
    def at(cls, root: fx.Node, path: str, reason: str, blame: fx.Node) -> Refusal:
        """The refusal at `root`, blaming `blame`."""
        return cls(root.name, path, reason, where(blame))

    def __str__(self) -> str:
        return f"%{self.root}  {self.path}: {self.reason}"


@dataclass(frozen=True)
class PassReport:
    """What one pass did: `fired` rewrites, `refused` sites, and `notes` for the reader."""

    name: str
    fired: tuple[Any, ...] = ()
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    entry: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Pass:
    """A named list of rules with a contract. Subclasses are frozen dataclasses; fields are options.

    `contract` says what stays equal, `needs` which passes, if they are run at all, must be run
    before this one, `expect` how many rewrites there must be.
    """

    expect: int | None = field(default=None, kw_only=True)

    contract: ClassVar[Any] = None
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in the order they are applied."""
        raise TypeError(f"{type(self).__name__} defines no rules")

    @property
    def name(self) -> str:
        """The class name in kebab-case: `fold-norm`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()
