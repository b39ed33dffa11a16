"""Give the places users know a name in the graph: identity nodes that can be read and edited.

    blocks.i.hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out, hook_resid_post
    blocks.i.ln1.hook_normalized, ln2.hook_normalized, ln_final.hook_normalized
    hook_embed, hook_pos_embed, unembed.hook_in, unembed.hook_out             each [batch, pos, .]

On the stream everyone who reads the value reads the named one, so an edit at resid_mid reaches
the skip connection; attn_out and mlp_out are exactly what is added. The values are bitwise what
they were.

Leaves alone: a stream that is not plain pre-norm. Then only the embedding and the unembedding
get their names, and the refusal says where the search ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from lensfx.analysis import Stream, Unknown, residual_stream, token_tables, unembedding
from lensfx.graph import Program, argument, hook_point, is_hook, readers
from lensfx.rewrite import Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Observes

Point = tuple[str, fx.Node, fx.Node | None]  # name, value, the one reader it is for (None: all)


def points(stream: Stream) -> Iterator[Point]:
    """Every named place, from the output backwards: of two at one value the later comes first."""
    if stream.unembed is not None:
        yield from head_points(stream.unembed)
    if stream.ln_final is not None:
        yield "ln_final.hook_normalized", stream.ln_final, None
    for i, block in reversed(list(enumerate(stream.blocks))):
        at = f"blocks.{i}"
        last = block.writes[-1]
        yield f"{at}.hook_resid_post", last.add, None
        if block.mlp is not None:
            yield f"{at}.hook_mlp_out", block.mlp.branch, block.mlp.reader
            if block.attn is None or block.mlp.norm is not block.attn.norm:
                yield f"{at}.ln2.hook_normalized", block.mlp.norm, None
        if block.attn is not None:
            if block.mlp is not None and not block.parallel:
                yield f"{at}.hook_resid_mid", block.attn.add, None
            yield f"{at}.hook_attn_out", block.attn.branch, block.attn.reader
            yield f"{at}.ln1.hook_normalized", block.attn.norm, None
        yield f"{at}.hook_resid_pre", block.writes[0].carry, None
    if stream.pos_embed is not None:
        yield "hook_pos_embed", stream.pos_embed, None
    yield "hook_embed", stream.embed, None


def head_points(linear: fx.Node) -> Iterator[Point]:
    yield "unembed.hook_out", linear, None
    yield "unembed.hook_in", argument(linear, "input"), linear


def ends(program: Program) -> Iterator[Point]:
    """The places that need no stream: the first token table and the only head."""
    head = unembedding(program)
    if head is not None:
        yield from head_points(head)
    table = next(token_tables(program), None)
    if table is not None:
        yield "hook_embed", table, None


def find(program: Program) -> Iterator[Match | Miss]:
    named = {n.args[1] for n in program.graph.nodes if is_hook(n)}
    stream = residual_stream(program)
    if isinstance(stream, Unknown):
        blamed = stream.node or program.graph.output_node()
        yield Miss(f"no plain pre-norm stream: {stream.reason}", blamed, at_site=True)
    for name, value, reader in ends(program) if isinstance(stream, Unknown) else points(stream):
        if name not in named:
            yield Match({"root": value, "name": name, "reader": reader}, (), program)


def replace(m: Match, edit: Edit) -> None:
    told = [m.reader] if m.reader is not None else readers(m.root)
    at = edit.after(m.root)
    hook = at.call(hook_point, m.root, m.name)
    # A position table that is a parameter as it stands: a place to edit is no weight to be folded.
    hook.meta["weight"] = False
    for reader in told:
        at.redirect(reader, m.root, hook)
    edit.remark(m.name)


def unless(m: Match) -> str | None:
    return None


@dataclass(frozen=True)
class InsertHooks(Pass):
    """Put a named identity at every canonical place of a plain pre-norm stream."""

    rules = (Rule(Sites(find), unless, replace),)
    contract = Observes()
    needs = ("canonical-linear", "canonical-norm", "fold-norm", "center-unembed")
