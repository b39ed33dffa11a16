"""Move the numbers that a lookup is multiplied by into the table.

    embedding(W, ids) * c  =  embedding(W*c, ids)      c: a number or [d]   W: [vocab, d]

Also for `W[ids]`, and for several factors in a row, multiplied or divided by, behind views and
casts. A table that the unembedding is tied to stays what it was there. Exact in real arithmetic;
in a run's own dtype it moves one rounding from the activation to the table.

Leaves alone: a lookup whose bare rows somebody else reads, and a trained factor of a table with a
padding row, which stays that row: it passes on no gradient.

Source: Vaswani et al., Attention Is All You Need (2017), section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis import Scaled, is_learned, like, scaled
from lensfx.graph import Program, argument, is_op, is_weight, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    for node in program.graph.nodes:
        table = table_of(node)
        if table is None or is_weight(node) or len(shape_of(table) or ()) != 2:
            continue
        found = scaled(node)
        if isinstance(found, Scaled):
            learned = learns_from_padding(program, node, found)
            yield learned or Match({"root": node, "table": table, "scale": found}, (), program)
        elif found is not None:
            yield found


def learns_from_padding(program: Program, node: fx.Node, found: Scaled) -> Miss | None:
    """Why a factor that is a parameter must stay: no gradient comes back through a padding row."""
    lookup = is_op(node, aten.embedding.default)
    padded = lookup and (argument(node, "padding_idx") >= 0 or argument(node, "scale_grad_by_freq"))
    factors = [c for _, c in found.factors(node) if isinstance(c, fx.Node) and padded]
    learned = next((c for c in factors if is_learned(c, program)), None)
    if learned is None:
        return None
    words = f"{learned.name} is trained, and the table has gradients of its own: padding, frequency"
    return Miss(words, node, at_site=True)


def table_of(node: fx.Node) -> fx.Node | None:
    """The weight whose rows a node looks up, None if it looks up none."""
    if is_op(node, aten.embedding.default):
        table = argument(node, "weight")
    elif is_op(node, aten.index.Tensor) and len(argument(node, "indices")) == 1:
        table = argument(node, "self")
    else:
        return None
    return table if is_weight(table) else None


def times(at: At, target: Any, c: Any, W: fx.Node) -> fx.Node:
    """The table times c, or over it; `target` is the product or the quotient."""
    if isinstance(c, fx.Node) and shape_of(c):
        c = at.call(aten.reshape.default, c, [-1])  # [d]
    return like(at, at.call(target, W, c), W)


def replace(m: Match, edit: Edit) -> None:
    at, W = edit.before(m.scale.last), m.table
    for target, c in m.scale.factors(m.root):
        W = times(at, target, c, W)
    args = [W if a is m.table else a for a in m.root.args]
    made = at.call(m.root.target, *args, **m.root.kwargs)
    at.replace(m.scale.last, m.scale.views(at, made))


@dataclass(frozen=True)
class FoldEmbeddingScale(Pass):
    """Fold what the rows of a lookup are multiplied by into its table."""

    rules = (Rule(Sites(find), lambda m: None, replace),)
    contract = Exact()
    needs = ("untie",)
