"""Make of one linear op that is read in pieces a linear op for each piece.

    split(linear(x; W, b))[i]  =  linear(x; W[rows of i], b[rows of i])       W: [out, d]   b: [out]

The pieces are what split, chunk, unbind, slices and selections make of the result: q, k and v, or
gate and up, side by side, interleaved by head or by group. Which rows are whose follows from the
views themselves. Exact, and no number is computed in another way. MergeFused is the inverse.

Leaves alone: a linear op whose whole result somebody reads; parts that are joined side by side
again, as those of a partial rotary embedding, which are parts of one value.

Source: the fused projections of Radford et al. (2019) and Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import LINEARS, pieces, rows_of, weight_of
from lensfx.graph import Program, argument, is_op
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    for linear in program.graph.nodes:
        if not is_op(linear, *LINEARS) or weight_of(linear) is None:
            continue
        found = pieces(linear)
        if isinstance(found, Miss):
            yield found
        elif found is not None:
            yield Match({"root": linear, "linear": linear, "pieces": found}, (), program)


def part(at: At, linear: fx.Node, steps: tuple[int, int, int]) -> list[fx.Node | None]:
    """The weight and the bias of one piece."""
    parts = (argument(linear, k) for k in ("weight", "bias"))
    return [None if p is None else rows_of(at, p, steps) for p in parts]


def replace(m: Match, edit: Edit) -> None:
    made: dict[tuple[int, ...], fx.Node] = {}
    for piece in m.pieces:
        if piece.rows not in made:
            at, x = edit.before(m.linear), argument(m.linear, "input")
            W, b = part(at, m.linear, piece.steps)
            made[piece.rows] = at.call(aten.linear.default, x, W, b)
        at = edit.before(piece.node)
        at.replace(piece.node, piece.views(at, made[piece.rows]))


@dataclass(frozen=True)
class SplitFused(Pass):
    """Split linear ops that are read in pieces, such as a fused q, k and v, or gate and up."""

    rules = (Rule(Sites(find), lambda m: None, replace),)
    contract = Exact()
    needs = ("canonical-linear", "untie")
