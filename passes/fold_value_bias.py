"""Move the bias of a value projection through attention, into what reads the attended values.

    o(P @ (v + s)) = o(P @ v) + o(s)    rows of P sum to one      P: [queries, keys]   s: [d]

    linear(x; Wv, bv)   ->  linear(x; Wv)
    linear(z; Wo, bo)   ->  linear(z; Wo, bo + Wo@bv)             z = P @ v, its heads side by side

An attention then writes nothing but what it reads from the positions it attends to. Exact in real
arithmetic. `bv` may be a part of a fused bias, which keeps the rest, and a head may be read by
several groups of queries.

Leaves alone: a value whose weights need not sum to one, because a sink is cut off, a row may be
masked as a whole, or they are changed after the softmax; one that goes through a gate before it
is read by a linear op; and every channel that anything else reads.

Source: Elhage et al., A Mathematical Framework for Transformer Circuits (2021), on the value bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import Reach, Sink, attended, follow_all
from lensfx.graph import Program, argument, is_weight, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten

FILL = aten.index_fill.int_Scalar


def find(program: Program) -> Iterator[Match | Miss]:
    """Each linear op with a bias that attention mixes, in graph order."""
    gained: set[fx.Node] = set()
    for linear in attended(program.graph):
        b, W = argument(linear, "bias"), argument(linear, "weight")
        if (b is None and linear not in gained) or not is_weight(W) or len(shape_of(W) or ()) != 2:
            continue
        found = follow_all(linear, scale=False, shift=True)
        mixed = [r for r in found.sinks if r.mixed]
        seen = [r for r in found.refused if r.mixes or r.path[-1] in found.mixed]
        own = moving(found)
        if own:
            bound = {"root": linear, "linear": linear, "reach": found, "own": own}
            gained.update(r.node for r in mixed)
            yield Match(bound, (), program)
        elif seen:
            yield Miss(seen[0].reason, seen[0].node, True, linear)


def moving(found: Reach) -> list[int]:
    """The channels that are mixed by attention and then read by linear ops, and by nothing else."""
    read = [r.channels.numbers for r in found.sinks if r.mixed]
    kept = [r.channels.numbers for r in found.refused]
    return sorted(frozenset().union(*read) - frozenset().union(*kept))


def unless(m: Match) -> str | None:
    """None of its business is a bias of which this pass has taken its part already."""
    made, formulas = argument(m.linear, "bias"), m.program.formulas if m.program else {}
    if made is not None and made.op == "get_attr" and made.target in formulas:
        (made,) = formulas[made.target].graph.output_node().all_input_nodes
    by = "" if made is None else made.meta.get("lensfx", ("",))[0]
    return "" if by == FoldValueBias().name and made.target is FILL else None


def taken(m: Match, edit: Edit, at: At, b: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What moves, 0 at channels that stay, and what is left of the bias."""
    if len(m.own) == int(shape_of(b)[0]):  # type: ignore[index]
        return b, None
    own = edit.constant(f"{m.linear.name}_moved", torch.tensor(m.own))
    left = at.call(FILL, b, 0, own, 0.0)  # [out]
    return at.call(aten.sub.Tensor, b, left), left


def add_to(at: At, r: Sink, s: fx.Node) -> fx.Node:
    """What the reader makes of the moved bias alone."""
    return r.moved(at, s)


def replace(m: Match, edit: Edit) -> None:
    at = edit.before(m.linear)
    s, left = taken(m, edit, at, argument(m.linear, "bias"))
    for r in m.reach.sinks:
        if r.channels.numbers.intersection(m.own):
            r.install(edit, shift=add_to(edit.before(r.node), r, s))
    at.set(m.linear, bias=left)
    m.reach.changed(edit, shift=s, only=m.own)


@dataclass(frozen=True)
class FoldValueBias(Pass):
    """Fold biases of value projections, through attention, into the linear ops behind it."""

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear", "fold-norm", "center-writers"),
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(Sites(find, live=True), unless, replace),)
