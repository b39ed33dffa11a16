"""A small decoder written twice over: with fused operators, and with every named value in hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from models import randomise
from torch import Tensor, nn

import lensfx

WIDTH, HEADS, HEAD, HIDDEN, VOCAB = 12, 4, 3, 20, 17
Tap = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """How attention is masked, how its heads are grouped, and which norm the decoder has."""

    mask: str = "causal"
    kv: int = HEADS
    expand: bool = False
    norm: str = "layer"

    def __str__(self) -> str:
        groups = "" if self.kv == HEADS else "-expand" if self.expand else "-gqa"
        return f"{self.mask}{groups}-{self.norm}"


class HandNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "hand": HandNorm,
}


class Block(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.ln1, self.ln2 = NORMS[kind.norm](), NORMS[kind.norm]()
        self.q = nn.Linear(WIDTH, HEADS * HEAD)
        self.k, self.v = (nn.Linear(WIDTH, kind.kv * HEAD) for _ in range(2))
        self.o = nn.Linear(HEADS * HEAD, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.ln1(x), mask)
        return x + self.down(F.gelu(self.up(self.ln2(x))))

    def attention(self, h: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            f(h).view(*h.shape[:2], -1, HEAD).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        groups = HEADS // self.kind.kv
        if self.kind.expand:
            k, v = (
                t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(*q.shape[:2], *t.shape[-2:])
                for t in (k, v)
            )
        z = F.scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=mask,
            is_causal=self.kind.mask == "causal",
            enable_gqa=groups > 1 and not self.kind.expand,
        )
        return self.o(z.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, kind: Kind, layers: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(layers))
        self.norm, self.head = NORMS[kind.norm](), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        mask = self.mask(keep, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))

    def mask(self, keep: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What every query may see: keys that are kept, and none behind it."""
        if self.kind.mask in ("causal", "none"):
            return None
        length = keep.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & keep[:, None, None, :].bool()
        if self.kind.mask == "bool":
            return seen
        low = -torch.inf if self.kind.mask == "float" else torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)


def decoder(kind: Kind, dtype: torch.dtype = torch.float64, layers: int = 2) -> Decoder:
    """The model with parameters that are all different, in eval mode."""
    torch.manual_seed(0)
    return randomise(Decoder(kind, layers), 0).to(dtype).eval()


def inputs(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and what to keep of them: the second row begins with padding, so sees nothing there."""
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(batch, length, dtype=torch.int64)
    keep[1:, : length // 3] = 0
    return ids, keep


def written_out(model: Decoder, ids: Tensor, keep: Tensor, tap: Tap) -> Tensor:
    """What the model computes, with every named value passing through `tap(name, value)`."""
    x = model.embed(ids) + model.places(torch.arange(ids.shape[1]))
    mask = model.mask(keep, x.dtype)
    if model.kind.mask == "causal":
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    for i, block in enumerate(model.blocks):
        x = _block(block, x, mask, lambda name, value, i=i: tap(f"blocks.{i}.{name}", value))
    return tap("unembed.hook_out", model.head(_norm(model.norm, x, "ln_final", tap)))


def _norm(norm: Any, x: Tensor, name: str, tap: Tap) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    scale = tap(f"{name}.hook_scale", (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
    bare = tap(f"{name}.hook_normalized", centred / scale)
    bias = getattr(norm, "bias", None)
    return bare * norm.weight + (0 if bias is None else bias)


def _block(block: Block, x: Tensor, mask: Tensor | None, tap: Tap) -> Tensor:
    x = tap("hook_resid_pre", x)
    out = tap("hook_attn_out", _attention(block, x, mask, tap))
    x = tap("hook_resid_mid", x + out)
    pre = tap("mlp.hook_pre", block.up(_norm(block.ln2, tap("hook_mlp_in", x), "ln2", tap)))
    out = tap("hook_mlp_out", block.down(tap("mlp.hook_post", F.gelu(pre))))
    return tap("hook_resid_post", x + out)


def _attention(block: Block, x: Tensor, mask: Tensor | None, tap: Tap) -> Tensor:
    kv = block.kind.kv
    h = _norm(block.ln1, x, "ln1", tap)
    copies = x.unsqueeze(-2).expand(-1, -1, HEADS, -1)
    shared = tap("hook_attn_in", copies) if kv == HEADS else copies
    q, k, v = (
        tap(f"attn.hook_{n}", _heads(block, n, h, x, tap(f"hook_{n}_input", shared[:, :, :heads])))
        for n, heads in (("q", HEADS), ("k", kv), ("v", kv))
    )
    k, v = (t.repeat_interleave(HEADS // kv, -2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    scores = tap("attn.hook_attn_scores", scores)
    # A row without a key is 0; its gradient too, which the quotient of two zeros has not.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    pattern = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    z = torch.einsum("bhqk,bkhd->bqhd", tap("attn.hook_pattern", pattern), v)
    weight = block.o.weight.view(WIDTH, HEADS, HEAD)
    result = torch.einsum("bqhd,ehd->bqhe", tap("attn.hook_z", z), weight)
    return tap("attn.hook_result", result).sum(-2) + block.o.bias


def _heads(block: Block, name: str, h: Tensor, x: Tensor, copies: Tensor) -> Tensor:
    """The q, k or v of each head from the head's own copy of the stream `x`, whose norm is `h`."""
    linear, heads = getattr(block, name), copies.shape[-2]
    weight, bias = linear.weight.view(heads, HEAD, WIDTH), linear.bias.view(heads, HEAD)
    # The norm itself has hooks of its own: copies are told by how they differ from the stream.
    own = h.unsqueeze(-2) + block.ln1(copies) - block.ln1(x).unsqueeze(-2)
    return torch.einsum("bphe,hde->bphd", own, weight) + bias


KINDS = [
    Kind("causal"),
    Kind("none"),
    Kind("bool"),
    Kind("float"),
    Kind("least"),
    Kind("causal", kv=2),
    Kind("bool", kv=1),
    Kind("float", kv=2, expand=True),
    Kind("causal", norm="rms"),
    Kind("bool", kv=2, norm="hand"),
]
PARTS = (
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "hook_attn_in",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_result",
)


@cache
def model(kind: Kind) -> Decoder:
    return decoder(kind)


@cache
def lens(kind: Kind) -> lensfx.Lens:
    return lensfx.wrap(model(kind), *inputs(2, 6), passes=None, verify=False)


def parts(kind: Kind) -> list[str]:
    found = [f"blocks.{i}.{n}" for i in range(2) for n in PARTS]
    found += ["ln_final.hook_scale", "ln_final.hook_normalized"]
    return [n for n in found if kind.kv == HEADS or "attn_in" not in n]


def sites(value: Tensor, hook: lensfx.HookPoint) -> Tensor:
    """A change that differs from entry to entry; what is masked stays so."""
    steps = 7 * torch.arange(value[0].numel(), dtype=value.dtype) % 17
    return value * (0.4 + steps / 10).reshape(value.shape[1:]).to(value.dtype)
