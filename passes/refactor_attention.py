"""Write the two products of weights in each attention head in the form that their SVD gives.

    q @ k.T  =  x (W_Q W_K.T) y.T     W_Q W_K.T = U S V.T    W_Q' = U sqrt(S)   W_K' = V sqrt(S)
    z @ W_O  =  pattern x (W_V W_O)   W_V W_O   = U S V.T    W_V' = U sqrt(S)   W_O' = sqrt(S) V.T

    W_Q, W_K, W_V: [d, d_head], a bias as one more row      W_O: [d_head, d]      per head

The columns of q, k and v are then orthogonal and in the order of their weight in the product.
Where heads share keys or values, they are factored together, one above the other. Nothing is
divided: W = Q R, and only the small R R.T goes through the SVD, so that values are exact for heads
of every rank; gradients of the old weights are lost where a head lacks rank, for the SVD has none.

Leaves alone: queries and keys with rotary positions or a norm behind their projection, a gate
or a norm before the output projection, and whatever else reads q, k, v or z.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on QK and OV.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import Heads, circuits, declare
from lensfx.graph import Program, native_name, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def sites(program: Program) -> Iterator[Match | Miss]:
    """Each circuit that was not factored before."""
    done = {(e.root, e.note) for e in program.journal if e.pass_name == RefactorAttention().name}
    for found in circuits(program):
        if isinstance(found, Miss):
            yield found
        elif (found.core.name, found.kind) not in done:
            yield Match({"root": found.core, "circuit": found, "of": program}, (), program)


def factors(at: At, X: fx.Node, Y: fx.Node) -> tuple[fx.Node, fx.Node]:
    """X' and Y' with X' @ Y'.T = X @ Y.T and orthogonal columns; X, Y: [groups, n, width]."""
    (Q, R), (P, T) = (parts(at, at.call(aten.linalg_qr.default, M), 2) for M in (X, Y))
    M = at.call(aten.matmul.default, R, at.call(aten.mT.default, T))
    U, S, Vh = parts(at, at.call(aten.linalg_svd.default, M, False), 3)
    s = at.call(aten.unsqueeze.default, at.call(aten.sqrt.default, S), -2)  # [groups, 1, rank]
    V = at.call(aten.mT.default, Vh)
    return scaled(at, Q, U, s, X), scaled(at, P, V, s, Y)


def parts(at: At, found: fx.Node, count: int) -> list[fx.Node]:
    return [at.call(operator.getitem, found, i) for i in range(count)]


def scaled(at: At, Q: fx.Node, U: fx.Node, s: fx.Node, like: fx.Node) -> fx.Node:
    """Q @ U * s, with columns of zeros up to the width of a head."""
    made = at.call(aten.matmul.default, Q, at.call(aten.mul.Tensor, U, s))
    missing = shape_of(like)[-1] - shape_of(made)[-1]  # type: ignore[index]
    return at.call(aten.constant_pad_nd.default, made, [0, missing]) if missing else made


def replace(m: Match, edit: Edit) -> None:
    c, name = m.circuit, f"{native_name(m.root)}.{m.circuit.kind}"
    sides = [Heads(edit, side, f"{name}.{i}") for i, side in enumerate((c.left, c.right))]
    anchor = min(c.left.linear, c.right.linear)
    at = edit.before(anchor)
    old = [side.stacked(at, anchor, m.of) for side in sides]
    turned = []
    for side, was, now in zip(sides, old, factors(at, *old), strict=True):
        side.install(now)
        back = at.call(aten.matmul.default, at.call(aten.linalg_pinv.default, now, 1e-12), was)
        turned += [(side.side, back)] if not side.side.reads else []
    # What a head reads out of z is turned as what it wrote into v was.
    turned += [(c.left, back)] if c.left.reads else []
    declare(edit, at, name, turned)
    for value in c.kept:
        edit.keeps(value)
    edit.remark(c.kind)


@dataclass(frozen=True)
class RefactorAttention(Pass):
    """Factor W_Q W_K.T and W_V W_O of every head by their SVD."""

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear", "fold-norm", "center-writers", "fold-value-bias"),
        "fold-key-bias",
        "layer-norm-to-rms",
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(Sites(sites), lambda m: None, replace),)
