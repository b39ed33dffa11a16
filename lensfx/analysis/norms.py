"""Hand-written norms: the patterns by which they are known, and what only looks like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.graph.node import argument, is_op, shape_of
from lensfx.rewrite.match import Match
from lensfx.rewrite.pattern import Any, Const, OneOf, Op, Param, Pattern, Ref

__all__ = ["NORMS", "WRITTEN_NORM", "Norm", "written_norm"]

aten = torch.ops.aten

# The operators that are a norm as a whole.
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def _mean_of(name: str, of: Pattern) -> Op:
    args = {"self": of, "dim": Const(f"{name}_axes"), "keepdim": Const(value=True)}
    return Op(name, (aten.mean.dim,), args)


def _square_of(of: Pattern) -> OneOf:
    return OneOf(
        Op("square", (aten.pow.Tensor_Scalar,), {"self": of, "exponent": Const(value=2)}),
        Op("square", (aten.pow.Tensor_Scalar,), {"self": of, "exponent": Const(value=2.0)}),
        Op("square", (aten.square.default,), {"self": of}),
        Op("square", (aten.mul.Tensor,), {"self": of, "other": of}),
    )


_SPREAD_ARGS = {"dim": Const("spread_axes"), "keepdim": Const(value=True)}
_CENTRED = Op(
    "centred", (aten.sub.Tensor,), {"self": Any("x"), "other": _mean_of("mean", Ref("x"))}
)
_VARIANCE = OneOf(
    _mean_of("spread", _square_of(Ref("centred"))),
    Op("spread", (aten.var.correction,), {"self": Ref("x"), **_SPREAD_ARGS}),
    Op("spread", (aten.var.dim,), {"self": Ref("x"), **_SPREAD_ARGS}),
    Op("spread", (aten.var.correction,), {"self": Ref("centred"), **_SPREAD_ARGS}),
    Op("spread", (aten.var.dim,), {"self": Ref("centred"), **_SPREAD_ARGS}),
)
_DEVIATION = OneOf(
    Op("spread", (aten.std.correction,), {"self": Ref("x"), **_SPREAD_ARGS}),
    Op("spread", (aten.std.dim,), {"self": Ref("x"), **_SPREAD_ARGS}),
)
_MEAN_SQUARE = _mean_of("spread", _square_of(Ref("x")))


def _scaled(numerator: Pattern) -> OneOf:
    """The numerator, or a gain times it: some write g * (x - mean) / deviation."""
    gained = Op("scaled", (aten.mul.Tensor,), {"self": numerator, "other": Param("gain", axes=1)})
    return OneOf(numerator, gained)


def _plus(name: str, of: Pattern) -> Op:
    return Op(
        name, (aten.add.Tensor,), {"self": of, "other": Const("eps"), "alpha": Const(value=1)}
    )


def _root_of(of: Pattern, power: float) -> OneOf:
    plain = aten.rsqrt.default if power < 0 else aten.sqrt.default
    return OneOf(
        Op("sqrt", (plain,), {"self": of}),
        Op("sqrt", (aten.pow.Tensor_Scalar,), {"self": of, "exponent": Const(value=power)}),
    )


def _divided(numerator: Pattern, spread: Pattern) -> tuple[Op, ...]:
    """`numerator / sqrt(spread + eps)` in each spelling, and with eps outside the root."""
    inside = OneOf(_plus("inside", spread), spread)
    below = OneOf(_root_of(inside, 0.5), _plus("outside", _root_of(spread, 0.5)))
    inverse = Op("inverse", (aten.reciprocal.default,), {"self": _root_of(inside, 0.5)})
    return (
        Op("norm", (aten.div.Tensor,), {"self": numerator, "other": below}),
        Op("norm", (aten.mul.Tensor,), {"self": numerator, "other": _root_of(inside, -0.5)}),
        Op("norm", (aten.mul.Tensor,), {"self": numerator, "other": inverse}),
    )


WRITTEN_NORM = OneOf(
    *_divided(_scaled(_CENTRED), _VARIANCE),
    Op(
        "norm",
        (aten.div.Tensor,),
        {"self": _scaled(_CENTRED), "other": OneOf(_plus("outside", _DEVIATION), _DEVIATION)},
    ),
    *_divided(_scaled(Any("x")), _MEAN_SQUARE),
)


@dataclass(frozen=True)
class Norm:
    """A hand-written norm over the last axis of `x`, of size `size`; `gain` if it multiplies x."""

    x: fx.Node
    centred: bool
    size: int
    eps: float
    gain: fx.Node | None


def written_norm(m: Match) -> Norm | str:
    """What a match of WRITTEN_NORM computes, or why it is neither a layer norm nor an RMS norm."""
    shape = shape_of(m.x) or ()
    axes = [m.spread_axes] + ([m.mean_axes] if m.centred is not None else [])
    if not shape or any(not a or [i % len(shape) for i in a] != [len(shape) - 1] for a in axes):
        return "it does not normalise over the last axis alone"
    if m.gain is not None and tuple(shape_of(m.gain) or ()) != tuple(shape[-1:]):
        return "its scale is not one number per channel"
    size = _fixed(shape[-1])
    if size is None:
        return "the size of the axis it normalises over is not fixed"
    if m.outside is not None:
        return f"eps={m.eps} is added outside the root"
    correction = _correction(m.spread)
    if correction:
        return f"its variance divides by n-{correction:g}: {m.spread.target}"
    if is_op(m.spread, aten.std.correction, aten.std.dim):
        return "its deviation has no eps" if m.eps is None else "eps is added outside the root"
    return Norm(m.x, m.centred is not None, size, float(m.eps or 0.0), m.gain)


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size as a number; one that capture tied to a weight can still be spelled as a symbol."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def _correction(spread: fx.Node) -> float:
    if is_op(spread, aten.var.correction, aten.std.correction):
        given = argument(spread, "correction")
        return 1.0 if given is None else float(given)
    if is_op(spread, aten.var.dim, aten.std.dim):
        return 1.0 if argument(spread, "unbiased") else 0.0
    return 0.0
