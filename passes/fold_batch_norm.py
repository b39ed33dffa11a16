"""Move a batch norm that uses stored statistics into the linear op before it, or those behind.

    batch_norm(y) = y*c + s                c = g / sqrt(var + eps)   s = beta - mean*c     c, s: [C]
    batch_norm(op(x; W, b))  =  op(x; W*c, b*c + s)               c along the output channels of W
    op(batch_norm(x); W, b)  =  op(x; W*c, b + sum(W*s))          c, s along the input channels of W

op is a linear op, a convolution or, before it, a transposed one, in any number of groups. Exact.

Leaves alone: statistics of the batch; an un-normed value that somebody else reads; behind it, a
convolution with padding, as the zeros put there carry no shift.

Source: Ioffe & Szegedy, Batch Normalization (2015), section 3.1 on inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import (
    CONVS,
    LINEARS,
    again,
    channel_axis,
    like,
    maker,
    taken_by,
    times_channels,
    weight_of,
)
from lensfx.graph import Program, argument, arguments, is_op, op_name, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    folded: tuple[fx.Node, ...] = ()
    for norm in program.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        found = op_before(norm, folded)
        if isinstance(found, Miss):
            behind = ops_behind(norm, program)
            words = f"{found.reason}, and {getattr(behind, 'reason', '')}"
            found = Miss(words, found.node, at_site=True) if isinstance(behind, Miss) else behind
        if argument(norm, "training"):
            found = Miss("it norms by the statistics of the batch", norm, at_site=True)
        elif isinstance(found, Match) and not found.readers:
            folded = (*folded, norm)
        yield found


def op_before(norm: fx.Node, folded: tuple[fx.Node, ...] = ()) -> Match | Miss:
    op, path, other = maker(argument(norm, "input"), norm)
    if op not in folded and weight_of(op) is None:
        return Miss(f"{op.name} before {norm.name} is {op_name(op)}, no linear op", op)
    if other is not None:
        return Miss(f"{other.name} also reads the value before it is normed", other)
    if channel_axis(op, path) != 1:
        return Miss(f"the channels of {op.name} are not the axis that is normed", op)
    return Match({"root": norm, "op": op, "path": path})


def ops_behind(norm: fx.Node, program: Program) -> Match | Miss:
    found = taken_by(norm, (*LINEARS, *CONVS), program, keeps=1)
    for r in found.readers if isinstance(found, Match) else ():
        axes = len(shape_of(argument(r.op, "input")) or ())
        if is_op(r.op, *LINEARS) and axes != 2:
            return Miss(f"{r.op.name} reads it along another axis than the channels", r.op)
        if is_op(r.op, *CONVS) and argument(r.op, "padding") not in ([0] * (axes - 2), "valid"):
            return Miss(f"{r.op.name} pads it with zeros, which carry no shift", r.op)
    return found


def affine(at: At, norm: fx.Node) -> tuple[fx.Node, fx.Node]:
    keys = ("weight", "bias", "running_mean", "running_var", "eps")
    g, beta, mean, var, eps = (argument(norm, k) for k in keys)
    c = at.call(aten.rsqrt.default, at.call(aten.add.Tensor, var, eps))  # [C]
    c = c if g is None else at.call(aten.mul.Tensor, g, c)
    s = at.call(aten.neg.default, at.call(aten.mul.Tensor, mean, c))  # [C]
    return c, s if beta is None else at.call(aten.add.Tensor, beta, s)


def into_output(at: At, op: fx.Node, c: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    W, b = argument(op, "weight"), argument(op, "bias")
    b = s if b is None else at.call(aten.add.Tensor, at.call(aten.mul.Tensor, b, c), s)
    return {"weight": times_channels(at, op, c, inputs=False), "bias": like(at, b, W)}


def into_input(at: At, op: fx.Node, c: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    W, b = argument(op, "weight"), argument(op, "bias")
    Ws = times_channels(at, op, s, inputs=True)
    Ws = at.call(aten.sum.dim_IntList, Ws, list(range(1, len(shape_of(W) or ()))))  # [out]
    b = Ws if b is None else at.call(aten.add.Tensor, b, Ws)
    return {"weight": times_channels(at, op, c, inputs=True), "bias": like(at, b, W)}


def replace(m: Match, edit: Edit) -> None:
    for r in m.readers:
        at = edit.before(r.op)
        x = again(at, r.path, argument(m.root, "input"))
        at.set(r.op, input=x, **into_input(at, r.op, *affine(at, m.root)))
    if not m.readers:
        # The op may be the one that a norm before this one has just been folded into.
        at, now = edit.before(m.root), op_before(m.root)
        assert isinstance(now, Match)
        given = {**arguments(now.op), **into_output(at, now.op, *affine(at, m.root))}
        at.replace(m.root, again(at, now.path, at.call(now.op.target, *given.values())))


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch norms with stored statistics into the linear ops next to them."""

    rules = (Rule(Sites(find), lambda m: None, replace),)
    contract = Exact()
    needs = ("canonical-linear", "untie", "split-fused", "fold-scale")
