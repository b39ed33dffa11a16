"""Write every product with a weight matrix over the last axis as `linear`.

    addmm(b, x, V)           =  linear(x, V.T, b)                  x: [rows, d]   V: [d, out]
    matmul(x, V) + b         =  linear(x, V.T, b)                  x: [..., d]
    einsum("bpd,dhk->bphk")  =  unflatten(linear(x, V.T))          V: [d, h, k]
    reshape(linear(reshape(x)))  =  linear(x)                      where x has the result's axes

After this pass the later ones need to know one spelling of a weight. Exact in real arithmetic;
adding the bias inside the product saves one rounding.

Leaves alone: a product of two computed values, `addmm` with alpha or beta, and an `einsum` that
sums over anything but whole trailing axes of the computed operand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import weight_einsum
from lensfx.graph import argument, dtype_of, is_op, is_weight, same_shape, same_size, shape_of
from lensfx.rewrite import Any, At, Const, Edit, Match, Maybe, Op, Param, Pass, Rule
from lensfx.verify import Exact

aten = torch.ops.aten

ONE = Const(value=1)
RESHAPE = (aten.reshape.default,)


def linear_of(x: Any | Op, b: Const | Maybe) -> Op:
    """A product with a weight that nobody else reads."""
    args = {"input": x, "weight": Param("W"), "bias": b}
    return Op("linear", (aten.linear.default,), args, readers=1)


ADDMM = Op(
    "old",
    (aten.addmm.default,),
    {"self": Param("b", axes=1), "mat1": Any("x"), "mat2": Param("V", axes=2)},
)
MATMUL = Op("old", (aten.matmul.default,), {"self": Any("x"), "other": Param("V", axes=2)})
MM = Op("old", (aten.mm.default,), {"self": Any("x"), "mat2": Param("V", axes=2)})
EINSUM = Op("old", (aten.einsum.default,))
BARE = linear_of(Any("x"), Const(value=None))
BIASED = Op("old", (aten.add.Tensor,), {"self": BARE, "other": Param("b", axes=1), "alpha": ONE})
INNER = linear_of(Op("inner", RESHAPE, {"self": Any("x")}), Maybe(Param("b")))
WRAPPED = Op("old", RESHAPE, {"self": INNER})


def replace(m: Match, edit: Edit) -> None:
    at = edit.before(m.old)
    W = m.bindings.get("W") or transposed(at, m.V)
    at.replace(m.old, at.call(aten.linear.default, m.x, W, m.bindings.get("b")))


def transposed(at: At, V: fx.Node) -> fx.Node:
    return V.args[0] if is_op(V, aten.t.default) else at.call(aten.t.default, V)  # type: ignore[return-value]


def unless_addmm(m: Match) -> str | None:
    if is_weight(m.x):
        return ""
    alpha, beta = argument(m.old, "alpha"), argument(m.old, "beta")
    if alpha != 1:
        return f"addmm scales its product by alpha={alpha}"
    return None if beta == 1 else f"addmm scales its bias by beta={beta}"


def unless_product(m: Match) -> str | None:
    return "" if is_weight(m.x) else None


def unless_einsum(m: Match) -> str | None:
    plan = weight_einsum(m.old)
    return plan if isinstance(plan, str) else None


def replace_einsum(m: Match, edit: Edit) -> None:
    plan = weight_einsum(m.old)
    assert not isinstance(plan, str)
    at = edit.before(m.old)
    W = at.call(aten.permute.default, plan.weight, plan.order)  # [out axes, summed axes]
    W = at.call(aten.reshape.default, W, [plan.out, plan.summed])  # [out, d]
    x = plan.x
    if plan.summed_axes > 1:
        x = at.call(aten.flatten.using_ints, x, -plan.summed_axes, -1)
    y = at.call(aten.linear.default, x, W)
    if len(plan.out_shape) > 1:
        y = at.call(aten.unflatten.int, y, -1, list(plan.out_shape))
    at.replace(m.old, y)


def unless_biased(m: Match) -> str | None:
    fits = same_shape(shape_of(m.b) or (), (shape_of(m.W) or (0,))[:1])
    return None if fits and dtype_of(m.b) == dtype_of(m.W) else ""


def unless_wrapped(m: Match) -> str | None:
    x, outer = shape_of(m.x) or (), shape_of(m.old) or ()
    whole = same_shape(x[:-1], outer[:-1]) and len(x) > 1
    ends = whole and same_size(x[-1], (shape_of(m.inner) or (0,))[-1])
    return None if ends and same_size(outer[-1], (shape_of(m.linear) or (0,))[-1]) else ""


@dataclass(frozen=True)
class CanonicalLinear(Pass):
    """Spell every product with a weight matrix over the last axis as `linear`."""

    rules = (
        Rule(ADDMM, unless_addmm, replace),
        Rule(MATMUL, unless_product, replace),
        Rule(MM, unless_product, replace),
        Rule(EINSUM, unless_einsum, replace_einsum),
        Rule(WRAPPED, unless_wrapped, replace),
        Rule(BIASED, unless_biased, replace),
    )
    contract = Exact()
