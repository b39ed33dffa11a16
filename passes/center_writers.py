"""Take the mean over the model axis out of every weight that writes to a stream.

    W' = W - mean over rows of W       b' = b - mean of b        linear:     W: [d, in]   b: [d]
    E' = E - mean over columns of E                              tables:     E: [rows, d]
    W' = W - mean over the last axis of W                        experts:    W: [.., in, d]

Every value of the stream moves by one number a position, which the layer norms that read it take
out again. A source is centred only where nothing else can see the shift: on every way to an output
there is a norm that removes the mean. Exact in real arithmetic.

Leaves alone: what a root-mean-square norm, a non-linear reader, a scale for each channel or an
output of the model would see. Whether the mean of the stream is zero afterwards depends on every
source of it: the remark of a rewrite names those left, as a norm with a scale.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on layer norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import Proof, Seen, Writer, mean_parts, mean_sources, recheck, writers
from lensfx.graph import Program, is_weight
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    found = writers(program)
    refused = {w.node for w in found if isinstance(w.found, Seen)}
    known = {w.node for w in found}
    for w in found:
        if isinstance(w.found, Seen):
            yield Miss(w.found.reason, w.node, at_site=True)
            continue
        recheck(w.found)
        yield Match({"root": w.node, "writer": w}, (), program)
    for node in dict.fromkeys(n for w in found for n in w.left if n not in known | refused):
        words = "its mean goes into the stream, and no weight that it adds could take it out"
        yield Miss(words, node, at_site=True)


def unless(m: Match) -> str | None:
    """Nothing where every weight of the site is centred already, in the graph or before a fold."""
    formulas = m.program.formulas if m.program is not None else {}
    means = (mean_sources(o, a, formulas=formulas) for o, a in m.writer.operands)
    return None if any(means) else ""


def centred(at: At, value: fx.Node, axis: int) -> fx.Node:
    """A weight without its mean along the axis, or the same rows of such a weight."""
    if is_weight(value):
        return at.call(aten.sub.Tensor, value, at.call(aten.mean.dim, value, [axis], True))
    inner = centred(at, *source(value, axis))
    return at.call(value.target, inner, *value.args[1:], **value.kwargs)


def source(value: fx.Node, axis: int) -> tuple[fx.Node, int]:
    """What rows are taken from, and where their axis lies there."""
    parts = mean_parts(value, axis)
    assert parts is not None
    return parts[0]


def replace(m: Match, edit: Edit) -> None:
    w: Writer = m.writer
    at = edit.before(w.node)
    if w.operands[0][0] is w.node:
        value, axis = source(w.node, w.axis)
        at.redirect(w.node, value, centred(at, value, axis))
    else:
        for operand, axis in w.operands:
            at.redirect(w.node, operand, centred(at, operand, axis))
    claim(edit, w)


def claim(edit: Edit, w: Writer) -> None:
    """What the mean moves on its way is changed, and where it ends nothing is."""
    edit.keeps(w.node, up_to=w.axis, centred=w.centred)
    edit.changes(w.node, free=[w.axis])
    assert isinstance(w.found, Proof)
    for node, axes in w.found.moved.items():
        edit.changes(node, free=axes)
    for node in w.found.kept:
        edit.keeps(node)
    names = ", ".join(f"%{n.name}" for n in w.left)
    edit.remark(f"its norms see a mean of {names} still" if w.left else "no mean is left")


@dataclass(frozen=True)
class CenterWriters(Pass):
    """Centre what writes to streams that only layer norms read."""

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-embedding-scale"),
        *("fold-scale", "fold-batch-norm", "fold-linear", "fold-norm"),
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(Sites(find), unless, replace),)
