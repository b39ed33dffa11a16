"""The parts that models of the grammar are made of; each reads its own options of the recipe."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lensfx.testing.grammar import Recipe

__all__ = ["WIDTH", "Attention", "Experts", "Feed", "Projection", "Residual", "norm_of"]

WIDTH = 8


class HandLayerNorm(nn.Module):
    """A layer norm written out."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Centred, divided, scaled and shifted."""
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.gain * normed if self.shift is None else self.gain * normed + self.shift


class HandRMSNorm(nn.Module):
    """An RMS norm written out, with the usual island of float32; `one` is added to its gain."""

    def __init__(self, size: int, one: float = 0.0) -> None:
        super().__init__()
        self.one = one
        self.weight = nn.Parameter(torch.full((size,), 1.0 - one))

    def forward(self, x: Tensor) -> Tensor:
        """Divided and scaled."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.one:
            return (wide * (self.one + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class BareRMSNorm(nn.Module):
    """An RMS norm without a gain, its eps left to torch."""

    def forward(self, x: Tensor) -> Tensor:
        """Divided."""
        return F.rms_norm(x, (x.size(-1),))


def norm_of(r: Recipe, size: int) -> nn.Module:
    """The norm of the recipe over the last axis."""
    made = {
        "layer": lambda: nn.LayerNorm(size, bias=r.bias),
        "layer_bare": lambda: nn.LayerNorm(size, elementwise_affine=False),
        "layer_hand": lambda: HandLayerNorm(size, r.bias),
        "rms": lambda: nn.RMSNorm(size),
        "rms_hand": lambda: HandRMSNorm(size),
        "rms_one": lambda: HandRMSNorm(size, one=1.0),
        "rms_bare": BareRMSNorm,
        "none": nn.Identity,
    }
    return made[r.norm]()


class Projection(nn.Module):
    """Queries, keys and values, each [batch, heads, length, head size]."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.sizes = [n * r.head_size for n in (r.heads, r.kv_heads, r.kv_heads)]
        if r.projection == "fused":
            self.qkv = nn.Linear(WIDTH, sum(self.sizes), bias=r.bias)
        elif r.projection == "separate":
            self.parts = nn.ModuleList(nn.Linear(WIDTH, n, bias=r.bias) for n in self.sizes)
        else:
            heads = (r.heads, r.kv_heads, r.kv_heads)
            self.weights = nn.ParameterList(torch.randn(n, WIDTH, r.head_size) / 3 for n in heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The three of them."""
        if self.r.projection == "einsum":
            return [torch.einsum("btd,hde->bhte", x, w) for w in self.weights]
        if self.r.projection == "fused":
            parts = list(self.qkv(x).split(self.sizes, dim=-1))
        else:
            parts = [part(x) for part in self.parts]
        return [p.view(*p.shape[:2], -1, self.r.head_size).transpose(1, 2) for p in parts]


class Attention(nn.Module):
    """Attention in the recipe's spelling, with its own output projection."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.project = Projection(r)
        self.out = nn.Linear(WIDTH, WIDTH, bias=r.bias)
        self.norms = nn.ModuleList(norm_of(r, r.head_size) for _ in range(2 * r.qk_norm))
        self.sinks = nn.Parameter(torch.zeros(r.heads)) if r.attention == "sinks" else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the heads write, [batch, length, width]."""
        q, k, v = self.project(x)
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.r.positions.startswith("rotary"):
            size = self.r.head_size // (2 if self.r.positions == "rotary_partial" else 1)
            q, k = rotated(q, size), rotated(k, size)
        if self.r.kv_heads < self.r.heads:
            repeat = self.r.heads // self.r.kv_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mixed = self.mix(q, k, v, mask)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The values, averaged by the scores."""
        if self.r.attention == "sdpa":
            if self.r.mask == "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.r.score_cap:
            scores = 3.0 * torch.tanh(scores / 3.0)
        if self.r.attention == "linear":
            weights = F.elu(scores) + 1
            weights = weights if mask is None else weights * mask
            return weights @ v / (weights.sum(-1, keepdim=True) + 1)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.pattern(scores, v.dtype) @ v

    def pattern(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """How much of each key: rows sum to one, or to less with sinks and off by one."""
        if self.sinks is not None:
            sink = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        if self.r.attention == "off_by_one":
            top = scores.amax(-1, keepdim=True).clamp(min=0)
            weights = torch.exp(scores - top)
            return weights / (weights.sum(-1, keepdim=True) + torch.exp(-top))
        if self.r.attention == "float_softmax":
            return scores.softmax(-1, dtype=torch.float32).to(dtype)
        return F.softmax(scores, dim=-1)


def rotated(x: Tensor, size: int) -> Tensor:
    """Rotary positions on pairs of the first `size` channels; an odd one out is left alone."""
    half = size // 2
    rates = 0.1 ** torch.arange(half, device=x.device)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]), dim=-1)


class Feed(nn.Module):
    """A feed-forward branch, plain or gated."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.kind = r.mlp
        wide = 2 * r.hidden if r.mlp == "geglu_fused" else r.hidden
        self.up = nn.Linear(WIDTH, wide, bias=r.bias)
        self.gate = nn.Linear(WIDTH, r.hidden, bias=r.bias) if r.mlp == "swiglu" else None
        self.down = nn.Linear(r.hidden, WIDTH, bias=r.bias)

    def forward(self, x: Tensor) -> Tensor:
        """What the branch writes."""
        h = self.up(x)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        elif self.kind == "geglu_fused":
            gate, h = h.chunk(2, dim=-1)
            h = h * F.gelu(gate, approximate="tanh")
        else:
            h = F.relu(h).square() if self.kind == "relu_squared" else F.gelu(h)
        return self.down(h)


class Experts(nn.Module):
    """A mixture of three experts whose weights are one tensor each, two of them chosen."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, WIDTH, r.hidden) / 3)
        self.up_bias = nn.Parameter(torch.zeros(3, 1, r.hidden)) if r.bias else None
        self.down = nn.Parameter(torch.randn(3, r.hidden, WIDTH) / 3)
        self.shared = Feed(r) if r.mlp == "experts_shared" else None

    def forward(self, x: Tensor) -> Tensor:
        """The chosen experts' outputs, weighted by the router."""
        flat = x.reshape(-1, WIDTH)
        scores = self.router(flat).softmax(-1)
        kept, chosen = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, kept)  # [tokens, experts]
        h = torch.bmm(flat.expand(3, -1, -1), self.up)
        h = F.silu(h if self.up_bias is None else h + self.up_bias)
        made = torch.bmm(h, self.down) * weights.t()[..., None]
        out = made.sum(0).view(x.shape)
        return out if self.shared is None else out + self.shared(x)


class Residual(nn.Module):
    """How a branch is added to the stream."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.kind = r.residual
        shape = {"scalar": (), "vector": (WIDTH,), "gated": (2,)}.get(r.residual)
        self.scale = None if shape is None else nn.Parameter(torch.full(shape, 0.7))

    def forward(self, x: Tensor, branch: Tensor) -> Any:
        """The stream afterwards."""
        if self.scale is None:
            return x + branch * 0.5 if self.kind == "constant" else x + branch
        if self.kind == "gated":
            return self.scale[0] * x + self.scale[1] * branch
        return torch.add(x, self.scale * branch)
