"""Give each reader of a role a parameter of its own where one parameter is read in two roles.

    linear(x; E), embedding(E, ids)  =  linear(x; copy of E), embedding(E, ids)       E: [vocab, d]

Nothing computes anything else; only that who edits the one no longer edits the other. Exact.

Leaves alone: a parameter with one role, and a reader whose weight is an expression that some pass
wrote already: folding gives that a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from lensfx.errors import PipelineError
from lensfx.graph import Program, is_op, is_weight, module_path, readers
from lensfx.rewrite import At, Edit, Match, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten

LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default)
ROLES = ("head", "table", "each")

Use = tuple[fx.Node, fx.Node]


def uses(program: Program) -> Iterator[list[Use]]:
    """For each stored tensor that has several, its readers with the weight that each reads."""
    shared: dict[int, list[Use]] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        found = shared.setdefault(id(program.tensors[str(node.target)]), [])
        stack, seen = [node], {node}
        while stack:
            weight = stack.pop()
            for reader in readers(weight):
                if not is_weight(reader):
                    found.append((reader, weight))
                elif reader not in seen and "lensfx" not in reader.meta:
                    seen.add(reader)
                    stack.append(reader)
    yield from (sorted(found) for found in shared.values() if len(set(found)) > 1)


def role(reader: fx.Node) -> str:
    return "table" if is_op(reader, *LOOKUPS) else "head"


def found_by(which: str, path: str | None) -> Rule:
    """The rule for the readers of one role, or for all but the first of each parameter."""

    def find(program: Program) -> Iterator[Match]:
        for found in uses(program):
            roles = {role(reader) for reader, _ in found}
            own = found[1:] if which == "each" else [u for u in found if role(u[0]) == which]
            for reader, weight in own if which == "each" or len(roles) > 1 else ():
                if path is None or module_path(reader) == path:
                    yield Match({"root": reader, "W": weight}, (), program)

    return Rule(Sites(find), lambda m: None, replace)


def copied(at: At, weight: fx.Node) -> fx.Node:
    return at.call(aten.clone.default, weight)


def replace(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    at.redirect(m.root, m.W, copied(at, m.W))


@dataclass(frozen=True)
class Untie(Pass):
    """Untie parameters: `which` readers get their own copy, only those in module `at` if named.

    "head": what multiplies by a parameter that is also a table; "table": what looks rows of it up;
    "each": every reader of a shared parameter but the first.
    """

    which: Literal["head", "table", "each"] = "head"
    at: str | None = None

    contract = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        if self.which not in ROLES:
            raise PipelineError(f"there is no role {self.which!r}", hint=f"name one of {ROLES}")
        return (found_by(self.which, self.at),)
