"""A small grammar of transformers: a Recipe is one of its sentences, `build` the model of it.

    recipe = random_recipe(random.Random(0))
    model = build(recipe)
    model(*inputs(recipe, batch=2, length=5, seed=0))

Every combination of the options is a model that runs at every batch and every length up to
POSITIONS, and none looks at values, so a capture of it has to be dynamic in both.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OPTIONS", "POSITIONS", "Recipe", "build", "inputs", "random_recipe"]

WIDTH = 8
VOCAB = 13
POSITIONS = 12

# What is listed twice is drawn twice as often: small models, because a capture costs by the node.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "norm": ("layer", "rms", "layer_bare", "layer_hand", "rms_hand", "rms_bare", "none", "none"),
    "order": ("pre", "pre", "post", "parallel", "sandwich"),
    "bias": (True, False),
    "heads": (2, 1, 4),
    "groups": (1, 2),
    "projection": ("fused", "separate", "einsum"),
    "attention": ("sdpa", "sdpa", "matmul", "float_softmax", "linear", "none", "none", "none"),
    "mask": ("causal", "causal_padding", "padding", "none"),
    "qk_norm": (False, False, True),
    "positions": ("learned", "rotary", "sinusoidal", "none", "none"),
    "mlp": ("gelu", "relu_squared", "swiglu", "geglu_fused", "none", "none", "none"),
    "residual": ("plain", "constant", "scalar", "vector", "gated"),
    "embedding_scale": (False, True),
    "head": ("tied", "untied", "biased", "none"),
    "softcap": ("none", "tanh", "sigmoid"),
    "island": ("none", "head", "stream"),
    "layers": (*(1,) * 10, 2, "shared"),
    "output": ("tensor", "tuple", "dict"),
    "dtype": (torch.float32, torch.float64, torch.bfloat16),
}


@dataclass(frozen=True)
class Recipe:
    """One choice per option; the defaults are the plainest model."""

    norm: str = "layer"
    order: str = "pre"
    bias: bool = True
    heads: int = 2
    groups: int = 1
    projection: str = "fused"
    attention: str = "sdpa"
    mask: str = "causal"
    qk_norm: bool = False
    positions: str = "learned"
    mlp: str = "gelu"
    residual: str = "plain"
    embedding_scale: bool = False
    head: str = "tied"
    softcap: str = "none"
    island: str = "none"
    layers: int | str = 1
    output: str = "tensor"
    dtype: torch.dtype = torch.float32

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values there are; queries share them in groups."""
        return max(1, self.heads // self.groups)

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return WIDTH // self.heads

    def __str__(self) -> str:
        plain = Recipe()
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        named = [f"{k}={v!r}" for k, v in changed.items() if v != getattr(plain, k)]
        return f"Recipe({', '.join(named)})"


def random_recipe(source: random.Random) -> Recipe:
    """A recipe with every option drawn evenly."""
    return Recipe(**{name: source.choice(options) for name, options in OPTIONS.items()})


def build(recipe: Recipe, seed: int = 0) -> nn.Module:
    """The model in eval mode, no parameter where an initialiser would leave it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(recipe)
        with torch.no_grad():
            for parameter in model.parameters():
                # Gains come out around their value, weights with their scale.
                noise = torch.randn_like(parameter)
                parameter.add_(0.3 * noise if parameter.dim() < 2 else 0.1 * noise)
    return model.to(recipe.dtype).eval()


def inputs(recipe: Recipe, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    """Ids, and a padding mask if the recipe has one; no row is padded throughout."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    if "padding" not in recipe.mask:
        return (ids,)
    kept = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return ids, torch.arange(length)[None] < kept


class HandLayerNorm(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.gain * normed if self.shift is None else self.gain * normed + self.shift


class HandRMSNorm(nn.Module):
    """With the usual island of float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class BareRMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


def norm_of(r: Recipe, size: int) -> nn.Module:
    made = {
        "layer": lambda: nn.LayerNorm(size, bias=r.bias),
        "layer_bare": lambda: nn.LayerNorm(size, elementwise_affine=False),
        "layer_hand": lambda: HandLayerNorm(size, r.bias),
        "rms": lambda: nn.RMSNorm(size),
        "rms_hand": lambda: HandRMSNorm(size),
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
        if self.r.projection == "einsum":
            return [torch.einsum("btd,hde->bhte", x, w) for w in self.weights]
        if self.r.projection == "fused":
            parts = list(self.qkv(x).split(self.sizes, dim=-1))
        else:
            parts = [part(x) for part in self.parts]
        return [p.view(*p.shape[:2], -1, self.r.head_size).transpose(1, 2) for p in parts]


class Attention(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.project = Projection(r)
        self.out = nn.Linear(WIDTH, WIDTH, bias=r.bias)
        self.norms = nn.ModuleList(norm_of(r, r.head_size) for _ in range(2 * r.qk_norm))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.project(x)
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.r.positions == "rotary":
            q, k = rotated(q), rotated(k)
        if self.r.kv_heads < self.r.heads:
            repeat = self.r.heads // self.r.kv_heads
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        mixed = self.mix(q, k, v, mask)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.r.attention == "sdpa":
            if self.r.mask == "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.r.attention == "linear":
            weights = F.elu(scores) + 1
            weights = weights if mask is None else weights * mask
            return weights @ v / (weights.sum(-1, keepdim=True) + 1)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.r.attention == "float_softmax":
            return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return F.softmax(scores, dim=-1) @ v


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on pairs of channels; of an odd channel count the last is left alone."""
    half = x.shape[-1] // 2
    rates = 0.1 ** torch.arange(half, device=x.device)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]), dim=-1)


class MLP(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.kind = r.mlp
        hidden = 12
        wide = 2 * hidden if r.mlp == "geglu_fused" else hidden
        self.up = nn.Linear(WIDTH, wide, bias=r.bias)
        self.gate = nn.Linear(WIDTH, hidden, bias=r.bias) if r.mlp == "swiglu" else None
        self.down = nn.Linear(hidden, WIDTH, bias=r.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gate is not None:
            h = h * F.silu(self.gate(x))
        elif self.kind == "geglu_fused":
            gate, h = h.chunk(2, dim=-1)
            h = h * F.gelu(gate, approximate="tanh")
        else:
            h = F.relu(h).square() if self.kind == "relu_squared" else F.gelu(h)
        return self.down(h)


class Residual(nn.Module):
    """How a branch is added to the stream."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.kind = r.residual
        shape = {"scalar": (), "vector": (WIDTH,), "gated": (2,)}.get(r.residual)
        self.scale = None if shape is None else nn.Parameter(torch.full(shape, 0.7))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.scale is None:
            return x + branch * 0.5 if self.kind == "constant" else x + branch
        if self.kind == "gated":
            return self.scale[0] * x + self.scale[1] * branch
        return torch.add(x, self.scale * branch)


class Block(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.order = r.order
        branches: list[nn.Module] = [Attention(r)] if r.attention != "none" else []
        if r.mlp != "none" or not branches:
            branches.append(MLP(r))
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(norm_of(r, WIDTH) for _ in branches)
        self.after = nn.ModuleList(norm_of(r, WIDTH) for _ in branches if r.order == "sandwich")
        self.residuals = nn.ModuleList(Residual(r) for _ in branches)

    def run(self, i: int, x: Tensor, mask: Tensor | None) -> Tensor:
        branch = self.branches[i]
        return branch(x, mask) if isinstance(branch, Attention) else branch(x)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shared = self.norms[0](x) if self.order == "parallel" else None
        for i, residual in enumerate(self.residuals):
            if shared is not None:
                x = residual(x, self.run(i, shared, mask))
            elif self.order == "post":
                x = self.norms[i](residual(x, self.run(i, x, mask)))
            else:
                h = self.run(i, self.norms[i](x), mask)
                x = residual(x, self.after[i](h) if self.after else h)
        return x


class Decoder(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.r = r
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.pos = nn.Embedding(POSITIONS, WIDTH) if r.positions == "learned" else None
        made = [Block(r) for _ in range(2 if r.layers == 2 else 1)]
        self.blocks = nn.ModuleList(made * 2 if r.layers == "shared" else made)
        self.norm = norm_of(r, WIDTH)
        self.head = None
        if r.head != "none":
            self.head = nn.Linear(WIDTH, VOCAB, bias=r.head == "biased")
        if r.head == "tied" and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Any:
        x = self.embedded(ids)
        mask = self.mask(ids, keep)
        for block in self.blocks:
            x = block(x, mask)
        hidden = self.norm(x)
        logits = hidden if self.head is None else self.head(hidden)
        logits = logits.float() if self.r.island == "head" else logits
        if self.r.softcap == "tanh":
            logits = 2.0 * torch.tanh(logits / 2.0)
        elif self.r.softcap == "sigmoid":
            logits = 4 * torch.sigmoid(logits / 1.5)
        if self.r.output == "tensor":
            return logits
        return (logits, [x]) if self.r.output == "tuple" else {"logits": logits, "hidden": hidden}

    def embedded(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.r.embedding_scale:
            x = x * math.sqrt(WIDTH)
        places = torch.arange(ids.shape[1], device=ids.device)
        if self.pos is not None:
            x = x + self.pos(places)
        elif self.r.positions == "sinusoidal":
            angle = places[:, None] * 0.3 ** torch.arange(WIDTH // 2, device=ids.device)
            x = x + torch.cat((angle.sin(), angle.cos()), dim=-1).to(x)
        return x.float().mul(1.5).to(x.dtype) if self.r.island == "stream" else x

    def mask(self, ids: Tensor, keep: Tensor | None) -> Tensor | None:
        mask = None
        if "causal" in self.r.mask:
            size = ids.shape[1]
            mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
        if keep is not None:
            columns = keep[:, None, None, :]
            mask = columns if mask is None else mask & columns
        return mask
