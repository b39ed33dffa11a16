"""Write hand-made norms as `layer_norm` and `rms_norm`.

    (x - mean(x)) / sqrt(var(x) + eps)  =  layer_norm(x, eps=eps)             x: [..., d]
    x * rsqrt(mean(x^2) + eps)          =  rms_norm(x, eps=eps)
    norm(x) * g + s                     =  norm(x, weight=g, bias=s)          g, s: [d]

A cast up before the chain and back down behind it become part of the operator, which computes
in float32 inside. Exact in real arithmetic.

Leaves alone what only looks like a norm: a variance that divides by n-1, eps outside the root,
a reduction over other axes than the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import NORMS, WRITTEN_NORM, Norm, written_norm
from lensfx.graph import argument, dtype_of, is_op, is_weight, readers, same_shape, shape_of
from lensfx.rewrite import Any, Const, Edit, Match, Op, Param, Pass, Rule
from lensfx.verify import Exact

aten = torch.ops.aten

ONE = Const(value=1)
UNSCALED = Op(
    "norm", NORMS, {"input": Any("x"), "weight": Const(value=None), "eps": Const("eps")}, readers=1
)
SCALED = Op("mul", (aten.mul.Tensor,), {"self": UNSCALED, "other": Param("g", axes=1)})
UNSHIFTED = Op("norm", NORMS[:1], {"input": Any("x"), "bias": Const(value=None)}, readers=1)
SHIFTED = Op(
    "add", (aten.add.Tensor,), {"self": UNSHIFTED, "other": Param("s", axes=1), "alpha": ONE}
)


def unless_written(m: Match) -> str | None:
    if is_weight(m.x):
        return ""
    found = written_norm(m)
    if isinstance(found, str):
        return found
    if found.gain is not None and dtype_of(found.gain) != dtype_of(found.x):
        return "its scale has another dtype than the value it scales"
    same = dtype_of(m.norm) == dtype_of(found.x)
    return None if same else "it is computed in another dtype than the value it normalises"


def replace_written(m: Match, edit: Edit) -> None:
    found = written_norm(m)
    assert isinstance(found, Norm)
    # The cast stays where a gain stands in front of it: one operator takes one dtype.
    x, end = (found.x, m.norm) if found.gain is not None else island(found.x, m.norm)
    at = edit.before(end)
    if found.centred:
        y = at.call(aten.layer_norm.default, x, [found.size], found.gain, None, found.eps)
    else:
        y = at.call(aten.rms_norm.default, x, [found.size], found.gain, found.eps)
    at.replace(end, y)


def island(x: fx.Node, norm: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Input and output of the chain with a cast up and back down around it taken in."""
    ends = readers(norm)
    if len(ends) != 1 or not is_op(ends[0], aten.to.dtype) or not is_op(x, aten.to.dtype):
        return x, norm
    source = x.args[0]
    assert isinstance(source, fx.Node)
    small = dtype_of(source) in (torch.bfloat16, torch.float16) and dtype_of(x) == torch.float32
    return (source, ends[0]) if small and dtype_of(ends[0]) == dtype_of(source) else (x, norm)


def unless_scaled(m: Match) -> str | None:
    return None if fits(m.norm, m.g, m.x) and dtype_of(m.mul) == dtype_of(m.x) else ""


def fits(norm: fx.Node, vector: fx.Node, x: fx.Node) -> bool:
    """Whether the norm is over the last axis alone and the vector has a number for each entry."""
    last = same_shape(shape_of(vector) or (), (shape_of(x) or (0,))[-1:])
    alone = len(argument(norm, "normalized_shape")) == 1
    return last and alone and dtype_of(vector) == dtype_of(x)


def replace_scaled(m: Match, edit: Edit) -> None:
    at = edit.before(m.mul)
    rest = (None, m.eps) if is_op(m.norm, aten.layer_norm.default) else (m.eps,)
    shape = argument(m.norm, "normalized_shape")
    at.replace(m.mul, at.call(m.norm.target, m.x, shape, m.g, *rest))


def unless_shifted(m: Match) -> str | None:
    return None if fits(m.norm, m.s, m.x) and dtype_of(m.add) == dtype_of(m.x) else ""


def replace_shifted(m: Match, edit: Edit) -> None:
    at = edit.before(m.add)
    shape, g, eps = (argument(m.norm, k) for k in ("normalized_shape", "weight", "eps"))
    y = at.call(aten.layer_norm.default, m.x, shape, g, m.s, eps)
    at.replace(m.add, y)


@dataclass(frozen=True)
class CanonicalNorm(Pass):
    """Spell hand-written layer and RMS norms as one operator each."""

    rules = (
        Rule(WRITTEN_NORM, unless_written, replace_written),
        Rule(SCALED, unless_scaled, replace_scaled),
        Rule(SHIFTED, unless_shifted, replace_shifted),
    )
    contract = Exact()
