"""The small decoder that most of the variants are a change of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stranger import VOCAB, WIDTH

HEADS = 2
BLOCK_SIZE = 24


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, HEADS, C // HEADS).transpose(1, 2) for t in (q, k, v))
        y = self.mix(q, k, v)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.c_proj = nn.Linear(2 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        attn: Callable[[], nn.Module] = Attention,
        mlp: Callable[[], nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.ln_1, self.attn = norm(WIDTH), attn()
        self.ln_2, self.mlp = norm(WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(
        self,
        block: Callable[..., nn.Module] = Block,
        layers: int = 2,
        positions: bool = True,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(BLOCK_SIZE, WIDTH) if positions else None
        self.h = nn.ModuleList([block(norm=norm, **parts) for _ in range(layers)])
        self.ln_f = norm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def embed(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(idx.size(1), device=idx.device))
        return x

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))
