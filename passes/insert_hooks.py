"""Give the places users know a name in the graph: identity nodes that can be read and edited.

    hook_embed, hook_pos_embed, unembed.hook_in                               [batch, pos, d_model]
    blocks.i.hook_resid_pre, hook_resid_mid, hook_resid_post, hook_mlp_in     [batch, pos, d_model]
    blocks.i.hook_attn_out, hook_mlp_out, ln1.hook_normalized                 [batch, pos, d_model]
    blocks.i.attn.hook_q, hook_k, hook_v, hook_rot_q, hook_rot_k, hook_z      [batch, pos, head, d]
    blocks.i.attn.hook_attn_scores, hook_pattern                              [batch, head, q, k]
    blocks.i.mlp.hook_pre, hook_pre_linear, hook_post                         [batch, pos, d_mlp]

On the stream everyone who reads the value reads the named one, so an edit at resid_mid reaches
the skip connection; attn_out and mlp_out are exactly what is added. The values are bitwise what
they were. What is no value of the graph as it stands (the pattern inside a fused attention, a
norm before its gain) has no node either: a run computes it where it is asked for.

Leaves alone: a model whose structure is not wholly understood. Then only the embedding and the
unembedding get their names, and the refusal says where the search ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lensfx.analysis import Point, Structure, structure, token_tables, unembedding
from lensfx.graph import Program, argument, arguments, hook_point, is_hook, readers
from lensfx.rewrite import Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Observes

aten = torch.ops.aten

# A name stands between a value and its readers, where the patterns of other passes do not look.
EVERY = (
    *("canonical-linear", "canonical-norm", "fold-embedding-scale", "fold-scale", "fold-norm"),
    *("center-writers", "center-unembed", "fold-value-bias", "fold-key-bias", "fold-linear"),
    *("fold-batch-norm", "split-fused", "split-heads", "merge-fused", "refactor-attention"),
    *("layer-norm-to-rms", "rotate-stream", "freeze-norm", "untie"),
)


def ends(program: Program) -> Iterator[Point]:
    """The places that need no stream: the first token table and the only head."""
    head = unembedding(program)
    if head is not None:
        yield Point("unembed.hook_out", head)
        yield Point("unembed.hook_in", argument(head, "input"), only=(head,))
    table = next(token_tables(program), None)
    if table is not None:
        yield Point("hook_embed", table)


def find(program: Program) -> Iterator[Match | Miss]:
    named = {n.args[1] for n in program.graph.nodes if is_hook(n)}
    found = structure(program)
    if not found.complete:
        note = reason(found)
        at = found.unclaimed[0] if found.unclaimed else program.graph.output_node()
        yield Miss(f"no hook points on blocks: {note}", at, at_site=True)
    for point in found.points if found.complete else ends(program):
        if point.name not in named and not point.part:
            yield Match({"root": point.node, "point": point}, (), program)


def reason(found: Structure) -> str:
    """Why the blocks of a structure are not to be trusted, in words."""
    if not found.streams:
        return "no residual stream leads to an output"
    return f"{len(found.unclaimed)} products with a weight belong to nothing that was found"


def replace(m: Match, edit: Edit) -> None:
    point: Point = m.point
    told = list(point.only) if point.only is not None else readers(m.root)
    at = edit.after(m.root) if point.like is None else edit.before(told[0])
    value = m.root
    if point.like is not None:
        value = at.call(aten.expand_as.default, value, point.like)
    layout = None
    if not point.layout.is_plain:
        layout = (point.layout.splits, point.layout.order)
    given = (value, point.name) if layout is None else (value, point.name, layout)
    hook = at.call(hook_point, *given)
    # A position table that is a parameter as it stands: a place to edit is no weight to be folded.
    hook.meta["weight"] = False
    for reader in told:
        if point.like is None:
            at.redirect(reader, m.root, hook)
        else:
            at.set(reader, **{n: hook for n, v in arguments(reader).items() if v is m.root})
    edit.remark(point.name)


def unless(m: Match) -> str | None:
    return None


@dataclass(frozen=True)
class InsertHooks(Pass):
    """Put a named identity at every canonical place of a model."""

    rules = (Rule(Sites(find), unless, replace),)
    contract = Observes()
    needs = EVERY
