"""Drop what no output can see of a bias: above all the bias of the keys.

    softmax(q @ (k + b).T) = softmax(q @ k.T + q @ b)  =  softmax(q @ k.T)       k: [keys, d]

What a key's bias adds to the scores of a query is one number for all keys, and softmax takes that
out again. The same holds of any bias that is constant along what a softmax or a norm takes out. In
a fused projection only the entries that are dead go. Exact.

Leaves alone: keys that are rotated, scores behind a soft cap, a softmax with a sink or with one
more row than keys: each sees the bias. Of what is partly rotated, the rest goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import DeadBias, dead_biases, recheck, replay
from lensfx.graph import Program, argument, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def find(program: Program) -> Iterator[Match | Miss]:
    for found in dead_biases(program):
        if found.seen is not None:
            yield Miss(found.seen.reason, found.node, at_site=True)
            continue
        for proof, by in found.proofs:
            recheck(proof, by)
        bound = {"root": found.node, "b": argument(found.node, "bias"), "found": found}
        yield Match(bound, (), program)


def unless(m: Match) -> str | None:
    """Nothing where this pass made the bias, in the graph or before a fold."""
    made, formulas = m.b, m.program.formulas if m.program is not None else {}
    if made.op == "get_attr" and made.target in formulas:
        (made,) = formulas[made.target].graph.output_node().all_input_nodes
    return "" if made.meta.get("lensfx", ("",))[0] == FoldKeyBias().name else None


def without(at: At, b: fx.Node, entries: tuple[int, ...]) -> fx.Node | None:
    """The bias with these entries 0, or None if there is no other."""
    if len(entries) == int((shape_of(b) or (0,))[0]):
        return None
    for start, end in runs(entries):
        zeros = at.call(aten.zeros_like.default, at.call(aten.slice.Tensor, b, 0, start, end))
        b = at.call(aten.slice_scatter.default, b, zeros, 0, start, end)
    return b


def runs(entries: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The entries as ranges."""
    start = last = entries[0]
    for entry in entries[1:]:
        if entry != last + 1:
            yield start, last + 1
            start = entry
        last = entry
    yield start, last + 1


def replace(m: Match, edit: Edit) -> None:
    found: DeadBias = m.found
    at = edit.before(m.root)
    b = without(at, m.b, found.entries)
    at.set(m.root, bias=b)
    lost = m.b if b is None else at.call(aten.sub.Tensor, m.b, b)  # [out]
    for node, channels, free in found.moved:
        if channels is None:
            edit.changes(node, free=free)
        else:
            edit.changes(node, shift=replay(at, lost, channels, scaled=True))
    for node in found.kept:
        edit.keeps(node)
    count = int((shape_of(m.b) or (0,))[0])
    edit.remark(f"{len(found.entries)} of {count} entries")


@dataclass(frozen=True)
class FoldKeyBias(Pass):
    """Drop the entries of biases that no output can see."""

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear", "fold-norm", "fold-value-bias"),
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(Sites(find), unless, replace),)
