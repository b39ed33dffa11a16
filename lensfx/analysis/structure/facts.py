"""What the structure of a model is made of: plain values, each with the nodes it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from lensfx.analysis.structure.normalise import Norm
from lensfx.graph.layout import PLAIN, Layout

__all__ = [
    "MLP",
    "AttentionBranch",
    "Block",
    "Branch",
    "Embedding",
    "Layout",
    "Note",
    "Place",
    "Stream",
    "Write",
]


@dataclass(frozen=True)
class Place:
    """A value in the graph and its layout; `rows` if batch and positions are one axis of it."""

    node: fx.Node
    layout: Layout = PLAIN
    rows: bool = False


@dataclass(frozen=True)
class Note:
    """Something that is not understood, or that a reader should know, and where."""

    text: str
    node: fx.Node | None = None

    def __str__(self) -> str:
        return self.text if self.node is None else f"{self.text}: %{self.node.name}"


@dataclass(frozen=True)
class Embedding:
    """A table or other source of the stream: `node` its value, `table` the weight it reads.

    `kind` is `token`, `position`, `type` or `other`; `scaled` the value after its multiplier.
    """

    kind: str
    node: fx.Node
    table: fx.Node | None
    scaled: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes this rests on."""
        return (self.node, self.scaled)


@dataclass(frozen=True)
class Branch:
    """The part of the model that computes one write: its nodes, what it reads, what it is.

    `kind` is `attention`, `cross_attention`, `mixer`, `mlp`, `gated_mlp`, `moe`, `inject` or
    `gate`. `entries` pairs each stream value that is read with its reader; `crossing` are values
    of other branches that it reads. `mixes` is how it joins positions; empty if it does not.
    `whole` is False where it holds layers of its own, which nothing tells apart.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    entries: tuple[tuple[fx.Node, fx.Node], ...]
    norms: tuple[Norm, ...]
    crossing: tuple[fx.Node, ...] = ()
    mixes: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    whole: bool = True

    @property
    def is_mixer(self) -> bool:
        """Whether the branch joins positions."""
        return self.kind in ("attention", "cross_attention", "mixer")


@dataclass(frozen=True)
class AttentionBranch:
    """Attention inside one branch; places are None where the thing is absent.

    `q`, `k`, `v` are per head before rotary, `rot_q`, `rot_k` after it, `scores` scaled and
    masked, `pattern` after the softmax, `z` per head before the output projection. `core` is the
    fused operator that holds scores and pattern, None where they are nodes of the graph.
    """

    heads: int | None
    kv_heads: int | None
    head_width: int | None
    value_width: int | None
    q: Place | None
    k: Place | None
    v: Place | None
    rot_q: Place | None
    rot_k: Place | None
    scores: Place | None
    pattern: Place | None
    z: Place | None
    core: fx.Node | None
    q_linear: fx.Node | None
    k_linear: fx.Node | None
    v_linear: fx.Node | None
    out: fx.Node | None
    scale: float | None = None
    mask: fx.Node | None = None
    causal: bool | None = None
    sinks: fx.Node | None = None
    softcap: float | None = None
    cross: bool = False
    nodes: tuple[fx.Node, ...] = ()
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class MLP:
    """A channel mixer: `pre` before the non-linearity, `post` what the output projection reads.

    `pre_linear` is the other factor of a gated one. Of a mixture of experts `router` is the
    linear, `expert_weights` and `expert_indices` what it chose, `experts` their number.
    """

    pre: Place | None
    post: Place | None
    pre_linear: Place | None
    gate: fx.Node | None
    up: fx.Node | None
    down: fx.Node | None
    activation: str = ""
    router: fx.Node | None = None
    expert_weights: Place | None = None
    expert_indices: Place | None = None
    experts: int | None = None
    nodes: tuple[fx.Node, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether the non-linearity is multiplied by another projection."""
        return self.pre_linear is not None


@dataclass(frozen=True)
class Write:
    """One write to the stream: `add` = `carry` + `value`, `reader` the node that takes `value`.

    `carry` and `value` are the operands as they stand, so `value` is exactly what is added;
    `sign` is -1 where it is subtracted. `norm` is what the branch reads the stream by, `norm_out`
    a norm that its result goes through before the add, `norm_after` one on the stream behind it.
    """

    add: fx.Node
    carry: fx.Node
    value: fx.Node
    reader: fx.Node
    branch: Branch
    sign: float = 1.0
    norm: Norm | None = None
    norm_out: Norm | None = None
    norm_after: Norm | None = None
    attention: tuple[AttentionBranch, ...] = ()
    mlp: MLP | None = None

    @property
    def kind(self) -> str:
        """What the branch is."""
        return self.branch.kind

    @property
    def fused(self) -> bool:
        """Whether one operator computes and adds, so that what is added is no value of its own."""
        return self.value is self.add


@dataclass(frozen=True)
class Block:
    """The writes that make one layer, by convention; the writes themselves are facts.

    `pre` is the stream before it. `parallel` if attention and MLP read the same stream value.
    `shared_with` is the earliest block with the same weights.
    """

    index: int
    writes: tuple[Write, ...]
    pre: fx.Node
    attn_write: Write | None = None
    cross_write: Write | None = None
    mixer_write: Write | None = None
    mlp_write: Write | None = None
    parallel: bool = False
    shared_with: int | None = None

    @property
    def attn(self) -> AttentionBranch | None:
        """The attention that reads this stream."""
        return self.attn_write.attention[0] if self.attn_write is not None else None

    @property
    def cross_attn(self) -> AttentionBranch | None:
        """The attention that reads another stream."""
        return self.cross_write.attention[0] if self.cross_write is not None else None

    @property
    def mixer(self) -> Branch | None:
        """The token mixer that is no attention: a state space, a recurrence, a convolution."""
        return self.mixer_write.branch if self.mixer_write is not None else None

    @property
    def mlp(self) -> MLP | None:
        """The channel mixer."""
        return self.mlp_write.mlp if self.mlp_write is not None else None

    @property
    def ln1(self) -> Norm | None:
        """The norm by which attention, or the mixer, reads the stream; behind it if there is none.

        The norm behind it is that of a post-norm model.
        """
        return _norm(self.attn_write or self.mixer_write)

    @property
    def ln2(self) -> Norm | None:
        """The norm of the MLP, if it is one of its own."""
        found = _norm(self.mlp_write)
        return None if found is self.ln1 else found

    @property
    def post(self) -> fx.Node:
        """The stream after the block."""
        return self.writes[-1].add

    def label(self, write: Write) -> str | None:
        """What hook names call a write: `attn`, `mixer`, `cross_attn`, `mlp`; None for another."""
        known = {
            "attn": self.attn_write,
            "mixer": self.mixer_write,
            "cross_attn": self.cross_write,
            "mlp": self.mlp_write,
        }
        return next((label for label, own in known.items() if own is write), None)


def _norm(write: Write | None) -> Norm | None:
    if write is None:
        return None
    return write.norm or (None if write.norm_out else write.norm_after)


@dataclass(frozen=True)
class Stream:
    """A residual stream: where it starts, every write, the blocks they are grouped in, its end.

    `role` is `main`, `encoder`, or `tower` for one of several; `values` are all nodes that are
    the stream, `stages` the places where it was projected, joined or resized on its way,
    `layout` how it becomes `[batch, pos, d_model]`.
    """

    role: str
    start: fx.Node
    end: fx.Node
    writes: tuple[Write, ...]
    blocks: tuple[Block, ...]
    final_norm: Norm | None = None
    embeddings: tuple[Embedding, ...] = ()
    stages: tuple[fx.Node, ...] = ()
    values: frozenset[fx.Node] = frozenset()
    notes: tuple[Note, ...] = ()
    post_norm: bool = False
    layout: Layout = PLAIN

    def axes(self) -> Any:
        """The shape of the stream, `[batch, pos, d_model]` as the model lays it out."""
        return tuple(self.start.meta["val"].shape)
