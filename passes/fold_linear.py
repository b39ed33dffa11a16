"""Make one linear op of two in a row.

    linear(linear(x; A, a); B, b)  =  linear(x; B@A, B@a + b)    A: [r, d]  B: [out, r]  b: [out]

Every reader of the inner value takes it up, so that the value itself is gone. Exact in real
arithmetic; the product of the weights is rounded once where activations were rounded twice.

Leaves alone: an inner value that anything but linear ops reads, and, unless `grow=True`, a pair
whose product would hold more numbers than its factors, as in a low-rank update.

Source: associativity of the matrix product; Elhage et al., A Mathematical Framework for
Transformer Circuits (2021), on OV and QK circuits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import LINEARS, again, like, taken_by, weight_of
from lensfx.graph import Program, argument, is_op, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def found_by(grow: bool) -> Rule:
    """The rule for every pair, or for those whose product is no larger than its factors."""

    def find(program: Program) -> Iterator[Match | Miss]:
        linears = [n for n in program.graph.nodes if is_op(n, *LINEARS) and weight_of(n)]
        found = [taken_by(n, LINEARS, program, others=True) for n in linears]
        matches = [m for m in found if isinstance(m, Match)]
        yield from filter(None, map(forbidden, matches))
        open_ = {m.root: m for m in matches if not m.others}
        width = {n: int(shape_of(argument(n, "weight"))[-1]) for n in linears}  # type: ignore[index]
        feeds = {n: [r.op for r in m.readers] for n, m in open_.items()}
        # What was too large may fit once a neighbour has been folded, and the other way round.
        while fitting := [n for n in open_ if grow or growth(n, feeds[n], width)[0] <= 0]:
            inner = fitting[0]
            yield open_.pop(inner)
            width.update(dict.fromkeys(feeds[inner], width[inner]))
            for outers in feeds.values():
                if inner in outers:
                    outers[outers.index(inner) : outers.index(inner) + 1] = feeds[inner]
        for inner in open_:
            words = "the product would hold {1} numbers where the factors hold {2}; grow=True folds"
            yield Miss(words.format(*growth(inner, feeds[inner], width)), inner, at_site=True)

    return Rule(Sites(find), lambda m: None, replace)


def forbidden(m: Match) -> Miss | None:
    if not m.others:
        return None
    how = (
        "is an output of the model"
        if m.others[0].op == "output"
        else f"is also read by {m.others[0].name}"
    )
    return Miss(f"the value that {m.readers[0].op.name} reads {how}", m.others[0], at_site=True)


def growth(inner: fx.Node, outers: list[fx.Node], width: dict[fx.Node, int]) -> tuple[int, ...]:
    """By how much the weights would grow; the numbers in the products and in the factors."""
    rank, *outs = [int(shape_of(argument(n, "weight"))[0]) for n in (inner, *outers)]  # type: ignore[index]
    product, factors = sum(outs) * width[inner], rank * (width[inner] + sum(outs))
    return product - factors, product, factors


def product(at: At, inner: fx.Node, outer: fx.Node) -> dict[str, fx.Node | None]:
    """The weight and the bias of both ops in one."""
    A, a, B, b = (argument(op, k) for op in (inner, outer) for k in ("weight", "bias"))
    W = at.call(aten.mm.default, B, like(at, A, B))  # [out, d]
    if a is None:
        return {"weight": W, "bias": b}
    Ba = at.call(aten.mv.default, B, like(at, a, B))  # [out]
    return {"weight": W, "bias": Ba if b is None else at.call(aten.add.Tensor, b, Ba)}


def replace(m: Match, edit: Edit) -> None:
    # A fold at a neighbour may have changed the readers.
    now = taken_by(m.root, LINEARS, m.program)
    assert isinstance(now, Match)
    for r in now.readers:
        at = edit.before(r.op)
        x = again(at, r.path, argument(m.root, "input"), resized=True)
        at.set(r.op, input=x, **product(at, m.root, r.op))


@dataclass(frozen=True)
class FoldLinear(Pass):
    """Fold a linear op into the linear ops that read it; `grow` also where weights grow by it."""

    grow: bool = False

    contract = Exact()
    needs = ("canonical-linear", "untie", "split-fused", "fold-scale", "fold-batch-norm")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by(self.grow),)
