"""The canonical hook names of a model, each at the value it names.

A point with a `part` is no value of the graph as it stands: it is computed from the node only
where somebody asks for it, as the pattern inside a fused attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from lensfx.analysis.structure.facts import MLP, AttentionBranch, Block, Place, Stream, Write
from lensfx.analysis.structure.normalise import Norm
from lensfx.graph.layout import PLAIN, Layout
from lensfx.graph.node import argument, is_op, is_weight, schema_names, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, VIEWS, data_inputs, is_hook

__all__ = ["Point", "block_prefix", "points"]

aten = torch.ops.aten

_LINEAR = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.neg.default,
    aten.sum.dim_IntList,
)


@dataclass(frozen=True)
class Point:
    """One canonical name: the node it is at, how it shows its value, and who reads it.

    `only` are the readers that the name is for, None for all of them. Where batch and positions are
    one axis of the node, `rows_of` is a value that has them apart. `within` is the attention that
    a part belongs to. Of per-head copies of the stream `source` is the stream value, `rows` how it
    is shown, `heads` their number, and `also` the other places that are made from them.
    What is added to `like` is shown as large as that is.
    """

    name: str
    node: fx.Node
    layout: Layout = PLAIN
    only: tuple[fx.Node, ...] | None = None
    rows_of: fx.Node | None = None
    part: str = ""
    within: AttentionBranch | None = None
    source: fx.Node | None = None
    rows: Layout = PLAIN
    heads: int = 0
    also: tuple[Place, ...] = ()
    like: fx.Node | None = None


Layouts = Callable[[fx.Node], Layout | None]
Weights = Callable[[AttentionBranch], Layout | None]


def block_prefix(streams: tuple[Stream, ...], at: int) -> str:
    """What the names of a stream's blocks begin with."""
    stream = streams[at]
    encoded = any(s.role == "encoder" for s in streams)
    if stream.role == "encoder":
        return "encoder_blocks"
    if stream.role == "tower":
        return f"towers.{at}.blocks"
    return "decoder_blocks" if encoded else "blocks"


def points(
    streams: tuple[Stream, ...], head: fx.Node | None, layouts: Layouts, weights: Weights
) -> list[Point]:
    """Every point of a model, from the output backwards: of two at one value the later is first."""
    found = list(_head(head)) if head is not None else []
    for at in reversed(range(len(streams))):
        found += _stream(streams[at], block_prefix(streams, at), at == len(streams) - 1)
    return [p for p in (_laid_out(p, layouts, weights) for p in found) if p is not None]


def _laid_out(point: Point, layouts: Layouts, weights: Weights) -> Point | None:
    """The point with the axes its name promises; None for weights whose axes are not known."""
    if point.source is not None:
        rows = layouts(point.source)
        return None if rows is None else replace(point, rows=rows)
    if point.part == "result":
        rows = layouts(point.node)
        return None if rows is None or len(rows.order) > 3 else replace(point, layout=rows)
    if point.part in ("scores", "pattern") and point.within is not None:
        order = weights(point.within)
        return None if order is None else replace(point, layout=order)
    if point.layout.order or point.part:
        return point
    layout = layouts(point.node)
    return point if layout is None else replace(point, layout=layout)


def _head(linear: fx.Node) -> Iterator[Point]:
    yield Point("unembed.hook_out", linear)
    slot = next((n for n in ("input", "mat1", "self") if n in schema_names(linear.target)), None)
    source = argument(linear, slot) if slot is not None else None
    if isinstance(source, fx.Node):
        yield Point("unembed.hook_in", source, only=(linear,))


def _stream(stream: Stream, prefix: str, main: bool) -> Iterator[Point]:
    front = "" if main else prefix.removesuffix("blocks").rstrip("_.") + "."
    if stream.final_norm is not None:
        yield from _norm(stream.final_norm, f"{front}ln_final")
    for block in reversed(stream.blocks):
        for point in _block(block, f"{prefix}.{block.index}"):
            if point.rows_of is not point.node and not _is_flat(point, stream):
                yield point
            elif point.part:
                # Computed from such a node it would not have the axes that its name promises.
                continue
            elif point.only is None or set(point.node.users) == set(point.only):
                yield replace(point, part="rows", rows_of=stream.start)
    known = [e for e in stream.embeddings if e.kind == "position"]
    if len(known) == 1:
        yield _positions(known[0].node, f"{front}hook_pos_embed")
    for embedding in stream.embeddings:
        if embedding.kind == "token":
            yield Point(f"{front}hook_embed", embedding.scaled)


def _is_flat(point: Point, stream: Stream) -> bool:
    """Whether a value has the rows of the stream in one axis where the stream has two."""
    shape, whole = shape_of(point.node) or (), shape_of(stream.start) or ()
    return len(shape) == 2 and len(whole) == 3 and not point.layout.order


def _positions(node: fx.Node, name: str) -> Point:
    """Positions as they are added: one copy for each row of the batch."""
    adds = [n for n in node.users if is_op(n, aten.add.Tensor)]
    if len(adds) != 1 or len(node.users) != 1:
        return Point(name, node)
    like = next((n for n in adds[0].args[:2] if isinstance(n, fx.Node) and n is not node), None)
    wider = like is not None and str(shape_of(like)) != str(shape_of(node))
    return Point(name, node, only=(adds[0],), like=like if wider else None)


def _block(block: Block, at: str) -> Iterator[Point]:
    writes = [w for w in block.writes if w.kind != "inject"]
    yield Point(f"{at}.hook_resid_post", block.post)
    norms = _norm_names(block)
    for write in reversed(writes):
        name = block.label(write)
        if name is not None:
            yield from _branch(block, write, name, at, norms.get(id(write), []))
            before = _middle(block, writes, write)
            if before is not None:
                yield Point(f"{at}.hook_resid_{before[0]}", before[1])
    yield Point(f"{at}.hook_resid_pre", block.pre)


def _branch(
    block: Block, write: Write, name: str, at: str, norms: list[tuple[Norm, str]]
) -> Iterator[Point]:
    """The points of one branch, from what it adds back to what it reads."""
    for norm, label in norms:
        if norm is not write.norm:
            yield from _norm(norm, f"{at}.{label}")
    out = "mixer.hook_out" if name == "mixer" else f"hook_{name}_out"
    if not write.fused:
        yield Point(f"{at}.{out}", write.value, only=(write.reader,))
    if name == "mlp" and block.mlp is not None:
        yield from _mlp(block.mlp, f"{at}.mlp")
    elif write.attention:
        yield from _attention(write, f"{at}.{'cross_attn' if name == 'cross_attn' else 'attn'}")
    for norm, label in norms:
        if norm is write.norm:
            yield from _norm(norm, f"{at}.{label}")
    yield from _input(block, write, name, at)


def _middle(block: Block, writes: list[Write], write: Write) -> tuple[str, fx.Node] | None:
    """The name of the stream between the write before this one and this one."""
    at = writes.index(write)
    if not at or block.parallel or writes[at - 1].add is write.add:
        return None
    before = writes[at - 1]
    if before is block.cross_write:
        return "mid_cross", before.add
    whole = {"attention", "mixer", "cross_attention", "mlp", "gated_mlp", "moe"}
    plain = before.kind in whole and sum(w is not block.cross_write for w in writes) == 2
    return ("mid", before.add) if plain else None


def _norm_names(block: Block) -> dict[int, list[tuple[Norm, str]]]:
    """The norms of each write by label: ln1, ln2 by position, the same with _post behind it."""
    found: dict[int, list[tuple[Norm, str]]] = {}
    seen: set[int] = set()
    # By role and not by the order of the adds, which says nothing where branches are parallel.
    mixer = block.attn_write or block.mixer_write
    known = [w for w in (mixer, block.cross_write, block.mlp_write) if w is not None]
    for number, write in enumerate(known, start=1):
        named = found.setdefault(id(write), [])
        reading = write.norm or (None if write.norm_out else write.norm_after)
        if reading is not None and id(reading.bare) not in seen:
            seen.add(id(reading.bare))
            named.append((reading, f"ln{number}"))
        if write.norm_out is not None:
            named.append((write.norm_out, f"ln{number}_post"))
    return found


def _norm(norm: Norm, at: str) -> Iterator[Point]:
    """hook_normalized is what was centred and divided, before gain and bias; hook_scale divides."""
    if is_op(norm.bare, aten.layer_norm.default, aten.rms_norm.default):
        affine = norm.gain is not None or norm.bias is not None
        yield Point(f"{at}.hook_normalized", norm.bare, part="normalized" if affine else "")
        yield Point(f"{at}.hook_scale", norm.bare, part="scale")
        return
    yield Point(f"{at}.hook_normalized", norm.bare)
    scale = norm.scale
    while scale is not None and is_op(scale, aten.expand.default, aten.expand_as.default):
        scale = argument(scale, "self")
    if scale is not None:
        divides = is_op(norm.bare, aten.div.Tensor)
        yield Point(f"{at}.hook_scale", scale, part="" if divides else "reciprocal")


def _input(block: Block, write: Write, name: str, at: str) -> Iterator[Point]:
    """The branch's own copy of the stream: an edit there does not touch the skip."""
    entries = {entry for entry, _ in write.branch.entries}
    if len(entries) != 1:
        return
    source = next(iter(entries))
    if name == "attn" and len(write.attention) == 1:
        yield from _copies(write.attention[0], source, at)
    others = {n for w in block.writes if w is not write for n in w.branch.nodes}
    readers = tuple(dict.fromkeys(reader for _, reader in write.branch.entries))
    if any(r in others or source not in r.all_input_nodes for r in readers):
        return
    if name == "mlp":
        yield Point(f"{at}.hook_mlp_in", source, only=readers)
    elif name == "mixer":
        yield Point(f"{at}.mixer.hook_in", source, only=readers)


def _copies(found: AttentionBranch, source: fx.Node, at: str) -> Iterator[Point]:
    """A copy of the stream for each head, before the norm: what its q, k or v is made from."""
    places = {"q": found.q, "k": found.k, "v": found.v}
    known: dict[str, Place] = {}
    for name, place in places.items():
        # Keys that are the values too have one input, not two.
        if place is not None and all(place.node is not p.node for p in known.values()):
            known[name] = place
    heads = {"q": found.heads, "k": found.kv_heads, "v": found.kv_heads}
    for name, place in known.items():
        number = heads[name]
        if number is not None:
            yield Point(
                f"{at}.hook_{name}_input",
                *(place.node, place.layout),
                part="input",
                source=source,
                heads=number,
            )
    if len(known) == 3 and found.heads is not None and found.heads == found.kv_heads:
        q, *others = known.values()
        yield Point(
            f"{at}.hook_attn_in",
            *(q.node, q.layout),
            part="shared",
            source=source,
            heads=found.heads,
            also=tuple(others),
        )


def _mlp(found: MLP, at: str) -> Iterator[Point]:
    for place, name in (
        (found.post, "hook_post"),
        (found.pre_linear, "hook_pre_linear"),
        (found.pre, "hook_pre"),
        (found.expert_indices, "hook_expert_indices"),
        (found.expert_weights, "hook_expert_weights"),
    ):
        if place is not None:
            yield _placed(place, f"{at}.{name}")


def _attention(write: Write, at: str) -> Iterator[Point]:
    if len(write.attention) != 1:
        return
    found = write.attention[0]
    summed = write.norm_out is None and not write.fused
    if found.z is not None and found.out is not None and summed:
        # Behind a norm of its own the branch is no sum of what its heads add.
        yield Point(
            f"{at}.hook_result", _result(write.value, found.out), part="result", within=found
        )
    if found.z is not None:
        yield _placed(found.z, f"{at}.hook_z")
    for place, name in ((found.pattern, "pattern"), (found.scores, "attn_scores")):
        if place is not None:
            yield _placed(place, f"{at}.hook_{name}")
        elif found.core is not None:
            part = "pattern" if name == "pattern" else "scores"
            yield Point(f"{at}.hook_{name}", found.core, part=part, within=found)
    for place, name in (
        (found.v, "v"),
        (found.rot_k, "rot_k"),
        (found.k, "k"),
        (found.rot_q, "rot_q"),
        (found.q, "q"),
    ):
        if place is not None:
            yield _placed(place, f"{at}.hook_{name}")


def _result(value: fx.Node, linear: fx.Node) -> fx.Node:
    """Where the heads' results are what they add: behind scales, but before a norm."""
    node = value
    while node is not linear:
        inputs = [n for n in data_inputs(node) if not is_weight(n)]
        scaled = is_op(node, *_LINEAR)
        plain = is_hook(node) or node.target in VIEWS | CASTS | DROPOUTS
        if len(inputs) != 1 or not (scaled or plain):
            return _rows_again(linear)
        node = inputs[0]
    return value


def _rows_again(linear: fx.Node) -> fx.Node:
    """A projection of flattened rows with batch and positions in two axes again."""
    users = [u for u in linear.users if u.target in VIEWS]
    return users[0] if len(linear.users) == len(users) == 1 else linear


def _placed(place: Place, name: str) -> Point:
    # Which value has the rows apart is known to the stream.
    return Point(name, place.node, place.layout, rows_of=place.node if place.rows else None)
