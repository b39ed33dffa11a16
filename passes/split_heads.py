"""Make what each head of an attention writes a value of the graph.

    linear(z; W, b)  =  sum over heads of result + b            z: [..., h*d]   W: [m, h*d]   b: [m]
    result = einsum("...hd,hdm->...hm", z, W_O)                 z: [..., h, d]  W_O: [h, d, m]

z is what the heads have collected, as the output projection reads it; `result` [..., h, m] is what
`hook_result` shows. Exact in real arithmetic: only the order of the sums is another. It takes h
times the memory of the projection's result.

Leaves alone: attention whose heads are not side by side where the projection reads them, or whose
heads or projection the structure of the model does not show.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on independent
heads.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import heads_of, structure
from lensfx.graph import Program, argument, is_op, op_name, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    streams = structure(program).streams
    found = [a for s in streams for w in s.writes for a in w.attention]
    for out, attention in {a.out: a for a in found if a.out is not None}.items():
        if out.meta.get("lensfx", ("",))[0] == SplitHeads().name:
            continue
        if not is_op(out, aten.linear.default):
            yield Miss(f"its heads are projected by {op_name(out)}, not linear", out, at_site=True)
            continue
        axes = heads_of(attention)
        if isinstance(axes, Miss):
            yield axes
        else:
            heads, width = axes
            yield Match({"root": out, "out": out, "heads": heads, "width": width}, (), program)


def projection(at: At, m: Match) -> fx.Node:
    """The output projection with an axis for the heads: [h, d, m]."""
    W = argument(m.out, "weight")  # [m, h*d]
    W = at.call(aten.unflatten.int, W, 1, [m.heads, m.width])  # [m, h, d]
    return at.call(aten.permute.default, W, [1, 2, 0])


def replace(m: Match, edit: Edit) -> None:
    at, b = edit.before(m.out), argument(m.out, "bias")
    z = at.call(aten.unflatten.int, argument(m.out, "input"), -1, [m.heads, m.width])
    rows = string.ascii_lowercase[: len(shape_of(z) or ()) - 2]
    equation = f"{rows}yz,yzx->{rows}yx"
    result = at.call(aten.einsum.default, equation, [z, projection(at, m)])
    total = at.call(aten.sum.dim_IntList, result, [-2])
    at.replace(m.out, total if b is None else at.call(aten.add.Tensor, total, b))


@dataclass(frozen=True)
class SplitHeads(Pass):
    """Give each attention head's write to the stream a value of its own."""

    rules = (Rule(Sites(find), lambda m: None, replace),)
    contract = Exact()
    needs = (
        *("canonical-linear", "untie", "split-fused", "fold-scale", "fold-batch-norm"),
        *("fold-linear", "fold-norm", "center-writers", "fold-value-bias"),
        *("refactor-attention", "rotate-stream"),
    )
