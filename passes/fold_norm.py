"""Move the scale and shift of a norm into the linear ops that read it.

    linear(n*g + s; W, b)  =  linear(n; W*g, b + W@s)        g, s: [d]   W: [out, d]   b: [out]

After this pass the norm only centres and divides, so a direction in its output
means the same thing to every reader. Exact in real arithmetic; in a run's own
dtype it moves one rounding from the activation to the weight.

Leaves alone: a norm with any reader other than a linear op, because that
reader would see the bare value. With `split=True` such a norm is kept as it is
for that reader, and the linear ops read a bare one beside it.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on handling
layer normalization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.graph import argument, dtype_of, is_op, shape_of
from lensfx.rewrite import At, Edit, EveryReader, Match, Maybe, Op, Param, Pass, Ref, Rule
from lensfx.verify import Exact

aten = torch.ops.aten

NORM = Op(
    "norm",
    (aten.layer_norm.default, aten.rms_norm.default),
    {"weight": Maybe(Param("g")), "bias": Maybe(Param("s"))},
)
READER = Op(
    "linear",
    (aten.linear.default,),
    {"input": Ref("norm"), "weight": Param("W", axes=2), "bias": Maybe(Param("b"))},
)


def unless(m: Match) -> str | None:
    if m.g is None and m.s is None:
        return ""
    axes = len(shape_of(m.g if m.g is not None else m.s) or ())
    return None if axes == 1 else f"the scale has {axes} axes; the fold is written for one"


def fold_into(at: At, r: Match, g: fx.Node | None, s: fx.Node | None) -> dict[str, fx.Node]:
    """The reader's new weight and bias; both read the old weight."""
    changed = {}
    if g is not None:
        changed["weight"] = like(at, at.call(aten.mul.Tensor, r.W, g), r.W)  # [out, d]
    if s is not None:
        Ws = at.call(aten.mv.default, r.W, like(at, s, r.W))  # [out]
        b = Ws if r.b is None else at.call(aten.add.Tensor, r.b, Ws)  # [out]
        changed["bias"] = b if r.b is None else like(at, b, r.b)
    return changed


def like(at: At, value: fx.Node, other: fx.Node) -> fx.Node:
    same = dtype_of(value) == dtype_of(other)
    return value if same else at.call(aten.to.dtype, value, dtype_of(other))


def replace(m: Match, edit: Edit) -> None:
    for r in m.readers:
        at = edit.before(r.linear)
        at.set(r.linear, **fold_into(at, r, m.g, m.s))
    bare = {} if is_op(m.norm, aten.rms_norm.default) else {"bias": None}
    edit.before(m.norm).set(m.norm, weight=None, **bare)


def replace_split(m: Match, edit: Edit) -> None:
    if not m.others:
        return replace(m, edit)
    x, shape, eps = (argument(m.norm, k) for k in ("input", "normalized_shape", "eps"))
    rest = (eps,) if is_op(m.norm, aten.rms_norm.default) else (None, eps)
    bare = edit.before(m.norm).call(m.norm.target, x, shape, None, *rest)
    for r in m.readers:
        at = edit.before(r.linear)
        n = bare
        for view in r.path:
            n = at.call(view.target, n, *view.args[1:], **view.kwargs)
        at.set(r.linear, input=n, **fold_into(at, r, m.g, m.s))
    edit.remark(f"kept affine for {', '.join(o.name for o in m.others)}")


WHOLE = Rule(EveryReader(NORM, READER), unless, replace)
SPLIT = Rule(EveryReader(NORM, READER, others="others"), unless, replace_split)


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold norm scales and shifts into their linear readers; `split` keeps other readers' value."""

    split: bool = False

    contract = Exact()
    needs = ("canonical-linear", "canonical-norm")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (SPLIT,) if self.split else (WHOLE,)
