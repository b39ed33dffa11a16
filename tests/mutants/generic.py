"""What any pass may get wrong, on small graphs that show it, by passes written for one fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from graphs import Sketch
from torch import fx

from lensfx import Program
from lensfx.rewrite import Edit, Match, Op, Param, Pass, Rule
from lensfx.verify import Exact, UpToLogitShift
from mutants.harness import FIRST, Mutant

aten = torch.ops.aten


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass that does nothing until a fault is planted."""

    contract = Exact()
    rules = ()


@dataclass(frozen=True)
class Shifts(Pass):
    """The same, allowed to move logits."""

    contract = UpToLogitShift()
    rules = ()


def generic() -> Iterator[Mutant]:
    for fault, (pattern, rewrite, before) in GENERIC.items():
        yield _own("wrong", fault, Wrong, pattern, rewrite, before)
    for fault, rewrite in SHIFTED.items():
        yield _own("shifts", fault, Shifts, TANH, rewrite, logits)


def _own(name: str, fault: str, kind: Any, pattern: Op, rewrite: Any, before: Any) -> Mutant:
    """Without the fault the pass does nothing."""
    rules = property(lambda self: (Rule(pattern, lambda m: None, rewrite),))
    return Mutant(name, fault, kind, "rules", rules, (kind(),), before, FIRST)


def logits() -> Program:
    s = Sketch()
    x = s.call(aten.linear.default, s.input("x", "B", "T", 8), s.weight("W", 8, 8))
    y = s.call(aten.tanh.default, x)
    return s.done(y, s.call(aten.softmax.int, y, -1))


def _shift_along(axis: int) -> Any:
    def rewrite(m: Match, edit: Edit) -> None:
        at = edit.before(m.root)
        y = at.call(aten.tanh.default, m.root.args[0])
        moved = at.call(aten.sub.Tensor, y, at.call(aten.mean.dim, y, [axis], True))
        at.replace(m.root, moved)
        edit.keeps(moved, up_to=-1)

    return rewrite


def _says_centred(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    same = at.call(aten.tanh.default, m.root.args[0])
    at.replace(m.root, same)
    edit.keeps(same, up_to=-1, centred=True)


def _shifts_another_output(m: Match, edit: Edit) -> None:
    _shift_along(-1)(m, edit)
    edit.remark("only the probabilities move", shifted=[1])


SHIFTED = {
    "shift along the wrong axis": _shift_along(1),
    "said to be centred and is not": _says_centred,
    "another output moves than was said": _shifts_another_output,
}


def tables(tied: bool = True) -> Program:
    """Ids of which one is padding, a table, and a head that is tied to it."""
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    table = s.weight("embed.weight", 8, 8)
    x = s.call(aten.embedding.default, table, ids, path="embed")
    x = s.call(aten.add.Tensor, x, s.call(aten.tanh.default, x, path="act"))
    head = s.weight("head.weight", 8, 8, like="embed.weight" if tied else "")
    return s.done(s.call(aten.linear.default, x, head, s.weight("b", 8), path="head"))


def grouped() -> Program:
    """Two key heads for four query heads, their product written out."""
    s = Sketch()
    x = s.input("x", "B", 4, "T", 4)
    k = s.call(aten.repeat_interleave.self_int, s.weight("k", 1, 2, 5, 4), 2, 1, path="k")
    scores = s.call(aten.matmul.default, x, s.call(aten.transpose.int, k, 2, 3))
    mask = s.stored("mask", torch.arange(5) % 3 < 2)
    hidden = s.call(aten.masked_fill.Scalar, scores, s.call(aten.logical_not.default, mask), -9.0)
    return s.done(s.call(aten.softmax.int, hidden, -1, path="pattern"))


def instead(make: Any) -> Any:
    """A rewrite that puts what `make(at, root, match)` gives in the place of the root."""

    def rewrite(m: Match, edit: Edit) -> None:
        at = edit.before(m.root)
        at.replace(m.root, make(at, m))

    return rewrite


def op(target: Any, **given: Any) -> Op:
    return Op("root", (target,), given)


def _row(at: Any, m: Match) -> fx.Node:
    W = at.call(aten.select_scatter.default, m.W, at.call(aten.select.int, m.W, 0, 1), 0, 0)
    return at.call(aten.embedding.default, W, m.root.args[1])


def _edits_the_table(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    W = at.call(aten.mul.Tensor, m.W, 2.0)
    at.set(m.root, weight=W)


def _half(at: Any, m: Match) -> fx.Node:
    rounded = at.call(aten.mul.Tensor, m.root.args[0], 1 + 1e-9)
    return at.call(aten.tanh.default, rounded)


def _softmax_less(at: Any, m: Match) -> fx.Node:
    return at.call(aten.softmax.int, m.root.args[0], -2)


LINEAR = op(aten.linear.default, weight=Param("W"))
TABLE = op(aten.embedding.default, weight=Param("W"))
TANH = op(aten.tanh.default)
TRANSPOSED = instead(
    lambda at, m: at.call(
        aten.linear.default, m.root.args[0], at.call(aten.t.default, m.W), m.root.args[2]
    )
)
NO_BIAS = instead(lambda at, m: at.call(aten.linear.default, m.root.args[0], m.W))
OTHER_HEADS = instead(lambda at, m: at.call(aten.repeat.default, m.root.args[0], [1, 2, 1, 1]))
FLIPPED = instead(
    lambda at, m: at.call(aten.flip.default, at.call(m.root.target, *m.root.args), [1])
)
GENERIC: dict[str, tuple[Op, Any, Any]] = {
    "weight transposed": (LINEAR, TRANSPOSED, tables),
    "bias dropped": (LINEAR, NO_BIAS, tables),
    "padding row moved": (TABLE, instead(_row), tables),
    "tied weight scaled in one place": (TABLE, _edits_the_table, tables),
    "untied weight scaled in one place": (LINEAR, _edits_the_table, partial(tables, tied=False)),
    "scaled by a billionth": (TANH, instead(_half), tables),
    "detached": (
        TANH,
        instead(lambda at, m: at.call(aten.detach.default, at.call(m.root.target, *m.root.args))),
        tables,
    ),
    "grouped heads permuted": (op(aten.repeat_interleave.self_int), OTHER_HEADS, grouped),
    "heads turned round": (op(aten.repeat_interleave.self_int), FLIPPED, grouped),
    "mask ignored": (
        op(aten.masked_fill.Scalar),
        instead(lambda at, m: at.call(aten.mul.Tensor, m.root.args[0], 1.0)),
        grouped,
    ),
    "mask inverted": (
        op(aten.logical_not.default),
        instead(
            lambda at, m: at.call(
                aten.logical_not.default, at.call(aten.logical_not.default, m.root.args[0])
            )
        ),
        grouped,
    ),
    "softmax over the wrong axis": (op(aten.softmax.int), instead(_softmax_less), grouped),
}
