"""The structure of a model as a tree of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from lensfx.analysis.structure.facts import MLP, AttentionBranch, Block, Embedding, Stream, Write
from lensfx.graph.node import module_path, shape_of
from lensfx.graph.ops import is_hook

if TYPE_CHECKING:
    from lensfx.analysis.structure.structure import Structure

__all__ = ["tree"]

Lines = list[tuple[int, str]]
MOST = 12


def tree(found: Structure) -> str:
    """A line for each finding, indented under what it is part of."""
    lines: Lines = [(0, "model" if found.complete else "model, not wholly understood")]
    for stream in found.streams:
        lines += _stream(stream)
    if found.unembed is not None:
        rows = (shape_of(found.unembed) or ("?",))[-1]
        lines.append((1, f"unembed: {rows} logits  {_at(found.unembed)}"))
    for note in found.notes[:MOST]:
        lines.append((1, f"note: {note}"))
    if len(found.notes) > MOST:
        lines.append((1, f"and {len(found.notes) - MOST} notes more"))
    return "\n".join(_drawn(lines))


def _drawn(lines: Lines) -> Iterator[str]:
    """The lines with branches drawn in front."""
    for i, (depth, text) in enumerate(lines):
        if depth == 0:
            yield text
            continue
        front = "".join("│  " if _goes_on(lines, i, level) else "   " for level in range(1, depth))
        yield front + ("├─ " if _goes_on(lines, i, depth) else "└─ ") + text


def _goes_on(lines: Lines, at: int, level: int) -> bool:
    """Whether a later line stands at this level before one stands above it."""
    for depth, _ in lines[at + 1 :]:
        if depth < level:
            return False
        if depth == level:
            return True
    return False


def _stream(stream: Stream) -> Lines:
    name = "residual stream" if stream.role == "main" else f"{stream.role} stream"
    width = stream.axes()[-1]
    kind = ", post-norm" if stream.post_norm else ""
    counts = f"{len(stream.writes)} writes, {len(stream.blocks)} blocks"
    lines: Lines = [(1, f"{name} of width {width}: {counts}{kind}")]
    lines += [(2, _embedding(e)) for e in stream.embeddings]
    lines.append((2, f"start  {_at(stream.start)}"))
    for block in stream.blocks:
        lines += _block(block)
    lines.append((2, f"end  {_at(stream.end)}"))
    if stream.final_norm is not None:
        lines.append((2, f"final {stream.final_norm.kind} norm  {_at(stream.final_norm.node)}"))
    return lines


def _embedding(found: Embedding) -> str:
    table = f" {_sizes(shape_of(found.table) or ())}" if found.table is not None else ""
    return f"{found.kind} embedding{table}  {_at(found.node)}"


def _block(block: Block) -> Lines:
    extra = ", parallel" if block.parallel else ""
    extra += f", the weights of block {block.shared_with}" if block.shared_with is not None else ""
    lines: Lines = [(2, f"block {block.index}{extra}")]
    for write in block.writes:
        lines.append((3, _write(write, block)))
    return lines


def _write(write: Write, block: Block) -> str:
    parts = [write.kind.replace("_", " ")]
    if write.attention:
        parts.append(_attention(write.attention[0]))
    elif write.mlp is not None:
        parts.append(_mlp(write.mlp))
    elif write.kind == "mixer":
        parts = [
            f"unknown mixer at blocks.{block.index}",
            f"mixes by {', '.join(write.branch.mixes)}",
        ]
    if write.norm is not None:
        parts.append(f"behind a {write.norm.kind} norm")
    if write.norm_out is not None:
        parts.append(f"through a {write.norm_out.kind} norm")
    if write.norm_after is not None:
        parts.append(f"then a {write.norm_after.kind} norm")
    if write.branch.crossing:
        parts.append("reads " + ", ".join(f"%{n.name}" for n in write.branch.crossing[:3]))
    return f"{', '.join(p for p in parts if p)}  {_at(write.value)}"


def _attention(found: AttentionBranch) -> str:
    heads = "heads unknown" if found.heads is None else f"{found.heads} heads"
    parts = [heads if found.head_width is None else f"{heads} of {found.head_width}"]
    if found.kv_heads not in (None, found.heads):
        parts.append(f"{found.kv_heads} key/value heads")
    if found.rot_q is not None:
        parts.append("rotary")
    if found.sinks is not None:
        parts.append("sinks")
    if found.softcap is not None:
        parts.append(f"cap {found.softcap:g}")
    return ", ".join(parts)


def _mlp(found: MLP) -> str:
    if found.router is not None:
        return f"{found.experts} experts"
    width = (shape_of(found.post.node) or ("?",))[-1] if found.post is not None else "?"
    return ", ".join(p for p in (f"width {width}", found.activation) if p)


def _sizes(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _at(node: fx.Node) -> str:
    name = str(node.args[1]) if is_hook(node) else f"%{node.name}"
    path = module_path(node)
    return f"{name}  {path}" if path else name
