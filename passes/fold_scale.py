"""Move the numbers that the result of a linear op is multiplied by into its weight and bias.

    linear(x; W, b) * c  =  linear(x; W*c, b*c)        c: a number or [out], W: [out, d]   b: [out]

c is a layer scale, a residual multiplier, the scale of a query: one number for all channels or
one for each, multiplied or divided by, several in a row, behind views and casts. Exact in real
arithmetic; in a run's own dtype it moves one rounding from the activation to the weight.

Leaves alone: a linear op whose bare result somebody else reads, and a gate, which is computed.

Source: Touvron et al., Going deeper with Image Transformers (2021), on layer scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis import LINEARS, Scaled, like, scaled, weight_of
from lensfx.graph import Program, argument, is_op, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    for node in program.graph.nodes:
        if not is_op(node, *LINEARS) or weight_of(node) is None:
            continue
        found = scaled(node)
        if isinstance(found, Scaled):
            yield Match({"root": node, "linear": node, "scale": found}, (), program)
        elif found is not None:
            yield found


def times(at: At, target: Any, c: Any, W: fx.Node, b: fx.Node | None) -> tuple[Any, Any]:
    """The weight and the bias times c, or over it; `target` is the product or the quotient."""
    column = row = c
    if isinstance(c, fx.Node) and shape_of(c):
        row = at.call(aten.reshape.default, c, [-1])  # [out]
        column = at.call(aten.unsqueeze.default, row, 1)  # [out, 1]
    W = like(at, at.call(target, W, column), W)
    return W, None if b is None else like(at, at.call(target, b, row), b)


def replace(m: Match, edit: Edit) -> None:
    at = edit.before(m.scale.last)
    W, b = (argument(m.linear, k) for k in ("weight", "bias"))
    for target, c in m.scale.factors(m.linear):
        W, b = times(at, target, c, W, b)
    made = at.call(aten.linear.default, argument(m.linear, "input"), W, b)
    at.replace(m.scale.last, m.scale.views(at, made))


@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold what the results of linear ops are multiplied by into their weights and biases."""

    rules = (Rule(Sites(find), lambda m: None, replace),)
    contract = Exact()
    needs = ("canonical-linear", "untie", "split-fused")
