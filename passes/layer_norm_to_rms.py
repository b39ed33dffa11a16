"""Write a layer norm as a root-mean-square norm where there is no mean to take out.

    layer_norm(x; g, s, eps)  =  rms_norm(x; g, eps) + s        mean(x) = 0     x: [..., d]

The variance of a row without a mean is its mean square, and eps stands under the same root, so the
two are the same function there. Exact in real arithmetic.

Leaves alone: a norm whose input is not proved to have mean zero along an axis it normalises. What
is needed is the fact itself, that every source of the stream is centred, and not that some pass
ran. A weight that was stored after centring has a mean again, as large as the rounding of its
dtype: run this pass before the weights are folded.

Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import mean_sources
from lensfx.graph import shape_of
from lensfx.rewrite import Any, At, Const, Edit, Match, Maybe, Op, Param, Pass, Rule
from lensfx.verify import Exact

aten = torch.ops.aten

NORM = Op(
    "norm",
    (aten.layer_norm.default,),
    {
        "input": Any("x"),
        "normalized_shape": Const("over"),
        "weight": Maybe(Param("g")),
        "bias": Maybe(Param("s")),
        "eps": Const("eps"),
    },
)


def brings_mean(m: Match) -> fx.Node | None:
    """A source of the mean of the norm's input, or None if it has none."""
    rank = len(shape_of(m.x) or ())
    found = None
    for axis in range(rank - len(m.over), rank):
        sources = mean_sources(m.x, axis)
        if not sources:
            return None
        found = found or sources[0]
    return found or m.x


def unless(m: Match) -> str | None:
    source = brings_mean(m)
    if source is None:
        return None
    if source is m.x:
        return f"nothing says that the mean of %{m.x.name} is zero"
    return f"%{source.name} may bring a mean into %{m.x.name}"


def bare_of_mean(at: At, m: Match) -> fx.Node:
    y = at.call(aten.rms_norm.default, m.x, m.over, m.g, m.eps)
    return y if m.s is None else at.call(aten.add.Tensor, y, m.s)


def replace(m: Match, edit: Edit) -> None:
    at = edit.before(m.norm)
    at.replace(m.norm, bare_of_mean(at, m))


@dataclass(frozen=True)
class LayerNormToRMS(Pass):
    """Spell layer norms of values without a mean as root-mean-square norms."""

    rules = (Rule(NORM, unless, replace),)
    contract = Exact()
    needs = ("canonical-norm", "fold-norm", "center-writers")
