"""Move the scale and shift of a norm into the linear ops that read it.

    linear(n*g + s; W, b)  =  linear(n; W*g, b + W@s)        g, s: [d]   W: [out, d]   b: [out]

After this pass the norm only centres and divides, so a direction in its output means the same
thing to every reader. A reader may take a slice, a head or a copy of the channels, go through
sums over positions, or be a product with the weights of many experts; a scale without a shift
also passes gates. Exact in real arithmetic; in a run's own dtype it moves one rounding from the
activation to the weight.

Leaves alone: a norm with any reader that no linear op follows, because that reader would see the
bare value. With `split=True` such a norm is kept as it is for that reader, and the linear ops
read a bare one beside it. Norms of queries and keys, and norms added to the stream, stay.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on handling
layer normalization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lensfx.analysis import Refused, Sink, follow_all, reach
from lensfx.graph import Program, argument, is_op, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def parts(norm: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The scale and the shift of a norm."""
    rms = is_op(norm, aten.rms_norm.default)
    return argument(norm, "weight"), None if rms else argument(norm, "bias")


def norms(program: Program, split: bool) -> Iterator[Match | Miss]:
    """Each norm with a scale or a shift and where that goes, the last first."""
    for node in [n for n in reversed(program.graph.nodes) if is_op(n, *NORMS)]:
        g, s = parts(node)
        vector = s if g is None else g
        if vector is None:
            continue
        axes = len(shape_of(vector) or ())
        if axes != 1:
            words = f"the scale has {axes} axes; the fold is written for one"
            yield Miss(words, node, at_site=True)
            continue
        needed = {"scale": g is not None, "shift": s is not None}
        found = reach(node, **needed)
        if split and isinstance(found, Refused) and (both := follow_all(node, **needed)).sinks:
            found = both
        if isinstance(found, Refused):
            yield Miss(found.reason, found.node, True, node)
        else:
            yield Match({"root": node, "norm": node, "g": g, "s": s, "reach": found}, (), program)


def unless(m: Match) -> str | None:
    return None


def fold_into(at: At, r: Sink, g: fx.Node | None, s: fx.Node | None) -> dict[str, fx.Node]:
    """The reader's new weight, and what is added to its result; both read the old weight."""
    changed = {}
    if g is not None:
        changed["weight"] = r.scaled(at, g)  # [out, d]
    if s is not None:
        changed["shift"] = r.moved(at, s)  # [out]
    return changed


def replace(m: Match, edit: Edit) -> None:
    for r in m.reach.sinks:
        r.install(edit, **fold_into(edit.before(r.node), r, m.g, m.s))
    gone = {} if is_op(m.norm, aten.rms_norm.default) else {"bias": None}
    edit.before(m.norm).set(m.norm, weight=None, **gone)
    m.reach.changed(edit, m.g, m.s)


def replace_split(m: Match, edit: Edit) -> None:
    if not m.reach.refused:
        return replace(m, edit)
    x, shape, eps = (argument(m.norm, k) for k in ("input", "normalized_shape", "eps"))
    rest = (eps,) if is_op(m.norm, aten.rms_norm.default) else (None, eps)
    bare = edit.before(m.norm).call(m.norm.target, x, shape, None, *rest)
    twins = m.reach.copied(edit, bare)
    for r in m.reach.sinks:
        edit.before(r.node).redirect(r.node, r.value, twins[r.value])
        r.install(edit, **fold_into(edit.before(r.node), r, m.g, m.s))
    others = dict.fromkeys(r.node.name for r in m.reach.refused)
    edit.remark(f"kept affine for {', '.join(others)}")


WHOLE = Rule(Sites(partial(norms, split=False), live=True), unless, replace)
SPLIT = Rule(Sites(partial(norms, split=True), live=True), unless, replace_split)


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold norm scales and shifts into their linear readers; `split` keeps other readers' value."""

    split: bool = False

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear"),
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (SPLIT,) if self.split else (WHOLE,)
