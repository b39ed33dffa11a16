"""The sizes and kinds of a model, found in its graph, under the names TransformerLens gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import fx

from lensfx.analysis.structure.facts import MLP, Block
from lensfx.analysis.structure.normalise import Norm
from lensfx.analysis.structure.structure import Structure
from lensfx.errors import LensError
from lensfx.graph.node import shape_of
from lensfx.graph.ops import data_inputs
from lensfx.graph.program import Program
from lensfx.run.affine import Maps
from lensfx.run.ends import is_capped, position_table

__all__ = ["Config", "config"]

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """What is known of a model; None for what is not, or differs from layer to layer.

    `normalization_type` is LN or RMS, with Pre behind it where the gain was folded away;
    `output_logits_soft_cap` is True where something that is not linear follows the unembedding.
    """

    model_name: str
    n_layers: int
    d_model: int
    n_heads: int | None
    n_key_value_heads: int | None
    d_head: int | None
    d_mlp: int | None
    d_vocab: int | None
    d_vocab_out: int | None
    n_ctx: int | None
    act_fn: str | None
    gated_mlp: bool | None
    attn_only: bool
    parallel_attn_mlp: bool
    normalization_type: str | None
    final_rms: bool
    use_normalization_before_and_after: bool
    positional_embedding_type: str | None
    num_experts: int | None
    tie_word_embeddings: bool
    output_logits_soft_cap: bool
    attn_scale: float | None
    device: torch.device
    dtype: torch.dtype
    default_prepend_bos: bool = True

    def __getattr__(self, name: str) -> NoReturn:
        known = ", ".join(f.name for f in fields(self))
        raise AttributeError(f"nothing in the graph says what cfg.{name} is; there are {known}")

    def to_dict(self) -> dict[str, Any]:
        """All of it as a dictionary."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def config(program: Program, structure: Structure) -> Config:
    """The sizes and kinds of a model.

    Raises: LensError if it has no residual stream.
    """
    stream = structure.stream
    if stream is None:
        raise LensError("this model has no residual stream, so it has no cfg", hint="lens.report")
    blocks = structure.blocks
    attns = [b.attn for b in blocks if b.attn is not None]
    mlps = [b.mlp for b in blocks if b.mlp is not None]
    table = structure.embed.table if structure.embed is not None else None
    kv = _agreed(a.kv_heads for a in attns)
    heads = _agreed(a.heads for a in attns)
    tensor = _main_tensor(program, table)
    return Config(
        model_name=program.source.model,
        n_layers=len(blocks),
        d_model=int((shape_of(stream.start) or (0,))[-1]),
        n_heads=heads,
        n_key_value_heads=None if kv == heads else kv,
        d_head=_agreed(a.head_width for a in attns),
        d_mlp=_agreed(_width(m) for m in mlps),
        d_vocab=_rows(table),
        d_vocab_out=_columns(structure.unembed),
        n_ctx=_positions(program, structure),
        act_fn=_agreed(_activation(program, m) for m in mlps),
        gated_mlp=_agreed(m.gated for m in mlps),
        attn_only=not mlps,
        parallel_attn_mlp=bool(blocks) and all(b.parallel for b in blocks),
        normalization_type=_norms(blocks),
        final_rms=stream.final_norm is not None and stream.final_norm.kind == "rms",
        use_normalization_before_and_after=any(
            w.norm is not None and w.norm_out is not None for w in stream.writes
        ),
        positional_embedding_type=_kind_of_positions(structure),
        num_experts=_agreed(m.experts for m in mlps),
        tie_word_embeddings=_tied(program, structure),
        output_logits_soft_cap=is_capped(program, structure),
        attn_scale=None if _agreed(a.scale for a in attns) is None else 1 / attns[0].scale,  # type: ignore[operator]
        device=tensor.device,
        dtype=tensor.dtype,
    )


def _agreed(values: Iterable[T | None]) -> T | None:
    """The one value that all have; None if they differ."""
    found = list(values)
    return found[0] if found and all(v == found[0] for v in found) else None


def _main_tensor(program: Program, table: fx.Node | None) -> torch.Tensor:
    if table is not None and table.op == "get_attr":
        return program.tensors[str(table.target)]
    floats = (t for t in program.tensors.values() if t.is_floating_point())
    return next(floats, torch.empty(0))


def _width(mlp: MLP) -> int | None:
    shape = shape_of(mlp.post.node) if mlp.post is not None else None
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else None


def _rows(table: fx.Node | None) -> int | None:
    shape = shape_of(table) if table is not None else None
    return int(shape[0]) if shape else None


def _columns(head: fx.Node | None) -> int | None:
    shape = shape_of(head) if head is not None else None
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else None


def _positions(program: Program, structure: Structure) -> int | None:
    try:
        return int(position_table(program, structure).shape[0])
    except LensError:
        return None


def _norms(blocks: tuple[Block, ...]) -> str | None:
    found = [n for b in blocks for n in (b.ln1, b.ln2) if n is not None]
    kind = _agreed(n.kind for n in found)
    folded = _agreed(_is_folded(n) for n in found)
    if kind is None or folded is None:
        return None
    return ("LN" if kind == "layer" else "RMS") + ("Pre" if folded else "")


def _is_folded(norm: Norm) -> bool:
    return norm.gain is None and norm.bias is None


def _kind_of_positions(structure: Structure) -> str | None:
    if structure.pos_embed is not None:
        return "standard"
    attns = [b.attn for b in structure.blocks if b.attn is not None]
    return "rotary" if any(a.rot_q is not None for a in attns) else None


def _tied(program: Program, structure: Structure) -> bool:
    """Whether the head reads the very tensor that tokens are looked up in."""
    embed = structure.embed
    if embed is None or embed.table is None or structure.unembed is None:
        return False
    return bool(_leaves(program, [embed.table]) & _leaves(program, data_inputs(structure.unembed)))


def _leaves(program: Program, roots: list[fx.Node]) -> set[int]:
    seen, stack = set(roots), list(roots)
    found: set[int] = set()
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            # A folded head is still tied to what it was folded from.
            formula = program.formulas.get(str(node.target))
            named = formula.sources if formula is not None else (str(node.target),)
            before = program.unfolded or program
            held = [before.tensors.get(n, program.tensors.get(n)) for n in named]
            found.update(id(t) for t in held if t is not None)
        elif node.meta.get("weight"):
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            stack.extend(new)
    return found


_CURVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
}


def _activation(program: Program, mlp: MLP) -> str | None:
    """The non-linearity by its values, whatever operators it is written with; else their names."""
    if mlp.pre is None or mlp.post is None:
        return None
    probe = torch.linspace(-6, 6, 97, dtype=torch.float32)
    curve = _curve(program, mlp, probe)
    if curve is not None:
        for name, known in _CURVES.items():
            if torch.allclose(curve, known(probe), atol=2e-5, rtol=1e-5):
                return name
    return mlp.activation or None


def _curve(program: Program, mlp: MLP, probe: torch.Tensor) -> torch.Tensor | None:
    """What the operators from pre to post make of a line of numbers; the other factor is one."""
    assert mlp.pre is not None
    assert mlp.post is not None
    maps = Maps(program)
    env: dict[fx.Node, Any] = {mlp.pre.node: probe}
    if mlp.pre_linear is not None:
        env[mlp.pre_linear.node] = torch.ones_like(probe)
    node = mlp.pre.node
    while node is not mlp.post.node and node.op != "output":
        node = node.next
        if any(n in env for n in data_inputs(node)) and node not in env:
            target: Any = node.target
            try:
                args, kwargs = fx.node.map_arg(
                    (node.args, node.kwargs), lambda n: env[n] if n in env else maps.operand(n)
                )
                env[node] = target(*args, **kwargs)
            except (LensError, RuntimeError, TypeError, IndexError):
                continue
    found = env.get(mlp.post.node)
    same = isinstance(found, torch.Tensor) and found.shape == probe.shape
    return found.detach().float() if same and found is not None else None
