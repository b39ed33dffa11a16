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
from lensfx.graph import dtype_of, is_op, is_weight, same_shape, same_size, shape_of
from lensfx.rewrite import Any, At, Const, Edit, Match, Maybe, Op, Param, Pass, Rule
from lensfx.verify import Exact

aten = torch.ops.aten

ONE = Const(value=1)
ADDMM = Op(
    "addmm",
    (aten.addmm.default,),
    {
        "self": Param("b", axes=1),
        "mat1": Any("x"),
        "mat2": Param("V", axes=2),
        "alpha": Const("alpha"),
        "beta": Const("beta"),
    },
)
MATMUL = Op("product", (aten.matmul.default,), {"self": Any("x"), "other": Param("V", axes=2)})
MM = Op("product", (aten.mm.default,), {"self": Any("x"), "mat2": Param("V", axes=2)})
EINSUM = Op("einsum", (aten.einsum.default,))
BARE = Op(
    "linear",
    (aten.linear.default,),
    {"input": Any("x"), "weight": Param("W"), "bias": Const(value=None)},
    readers=1,
)
BIASED = Op("add", (aten.add.Tensor,), {"self": BARE, "other": Param("b", axes=1), "alpha": ONE})
WRAPPED = Op(
    "outer",
    (aten.reshape.default,),
    {
        "self": Op(
            "linear",
            (aten.linear.default,),
            {
                "input": Op("inner", (aten.reshape.default,), {"self": Any("x")}),
                "weight": Param("W"),
                "bias": Maybe(Param("b")),
            },
            readers=1,
        )
    },
)


def transposed(at: At, V: fx.Node) -> fx.Node:
    return V.args[0] if is_op(V, aten.t.default) else at.call(aten.t.default, V)  # type: ignore[return-value]


def unless_addmm(m: Match) -> str | None:
    if is_weight(m.x):
        return ""
    if m.alpha != 1:
        return f"addmm scales its product by alpha={m.alpha}"
    return None if m.beta == 1 else f"addmm scales its bias by beta={m.beta}"


def replace_addmm(m: Match, edit: Edit) -> None:
    at = edit.before(m.addmm)
    at.replace(m.addmm, at.call(aten.linear.default, m.x, transposed(at, m.V), m.b))


def unless_product(m: Match) -> str | None:
    return "" if is_weight(m.x) else None


def replace_product(m: Match, edit: Edit) -> None:
    at = edit.before(m.product)
    at.replace(m.product, at.call(aten.linear.default, m.x, transposed(at, m.V)))


def unless_einsum(m: Match) -> str | None:
    plan = weight_einsum(m.einsum)
    return plan if isinstance(plan, str) else None


def replace_einsum(m: Match, edit: Edit) -> None:
    plan = weight_einsum(m.einsum)
    assert not isinstance(plan, str)
    at = edit.before(m.einsum)
    W = at.call(aten.permute.default, plan.weight, plan.order)  # [out axes, summed axes]
    W = at.call(aten.reshape.default, W, [plan.out, plan.summed])  # [out, d]
    x = plan.x
    if plan.summed_axes > 1:
        x = at.call(aten.flatten.using_ints, x, -plan.summed_axes, -1)
    y = at.call(aten.linear.default, x, W)
    if len(plan.out_shape) > 1:
        y = at.call(aten.unflatten.int, y, -1, list(plan.out_shape))
    at.replace(m.einsum, y)


def unless_biased(m: Match) -> str | None:
    fits = same_shape(shape_of(m.b) or (), (shape_of(m.W) or (0,))[:1])
    return None if fits and dtype_of(m.b) == dtype_of(m.W) else ""


def replace_biased(m: Match, edit: Edit) -> None:
    at = edit.before(m.add)
    at.replace(m.add, at.call(aten.linear.default, m.x, m.W, m.b))


def unless_wrapped(m: Match) -> str | None:
    x, outer = shape_of(m.x) or (), shape_of(m.outer) or ()
    whole = same_shape(x[:-1], outer[:-1]) and len(x) > 1
    ends = whole and same_size(x[-1], (shape_of(m.inner) or (0,))[-1])
    return None if ends and same_size(outer[-1], (shape_of(m.linear) or (0,))[-1]) else ""


def replace_wrapped(m: Match, edit: Edit) -> None:
    at = edit.before(m.outer)
    at.replace(m.outer, at.call(aten.linear.default, m.x, m.W, m.b))


@dataclass(frozen=True)
class CanonicalLinear(Pass):
    """Spell every product with a weight matrix over the last axis as `linear`."""

    rules = (
        Rule(ADDMM, unless_addmm, replace_addmm),
        Rule(MATMUL, unless_product, replace_product),
        Rule(MM, unless_product, replace_product),
        Rule(EINSUM, unless_einsum, replace_einsum),
        Rule(WRAPPED, unless_wrapped, replace_wrapped),
        Rule(BIASED, unless_biased, replace_biased),
    )
    contract = Exact()
