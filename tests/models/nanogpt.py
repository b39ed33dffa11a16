"""A decoder in the shape of nanoGPT, and the settings of it that trip a graph rewrite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Inputs, builder, token_ids


@dataclass
class GPTConfig:
    block_size: int = 32
    vocab_size: int = 61
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    d_mlp: int = 128
    dropout: float = 0.0
    bias: bool = True
    tied: bool = True
    n_loops: int = 1
    embedding_scale: float | None = None


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.d_mlp, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(config.d_mlp, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    transformer: Any

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        device = idx.device
        _, t = idx.size()
        assert t <= self.config.block_size, (
            f"Cannot forward sequence of length {t}, block size is only {self.config.block_size}"
        )
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        tok_emb = self.transformer.wte(idx)
        if self.config.embedding_scale is not None:
            tok_emb = tok_emb * self.config.embedding_scale
        pos_emb = self.transformer.wpe(pos)
        x = self.transformer.drop(tok_emb + pos_emb)
        for _ in range(self.config.n_loops):
            for block in self.transformer.h:
                x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(
                logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1
            )
        else:
            # The list keeps the time dimension.
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss


def _case(
    name: str,
    config: GPTConfig,
    inputs: Callable[[int, int, int], Inputs] | None = None,
) -> Case:
    def ids_only(batch: int, length: int, seed: int) -> Inputs:
        return (token_ids(batch, length, seed, config.vocab_size),), {}

    return Case(
        name, builder(lambda: GPT(config)), inputs or ids_only, "pre", True, config.block_size
    )


def ids_and_targets(batch: int, length: int, seed: int) -> Inputs:
    """A window of a longer text and the same window one token later."""
    text = token_ids(batch, length + 1, seed, 61)
    return (text[:, :-1].contiguous(), text[:, 1:].contiguous()), {}


CASES = [
    _case("nanogpt", GPTConfig()),
    _case("nanogpt_untied", GPTConfig(bias=False, tied=False)),
    # Square matrices: a transposed weight still has the right shape.
    _case("nanogpt_vocab_is_width", GPTConfig(vocab_size=32, tied=False)),
    _case("nanogpt_mlp_is_width", GPTConfig(d_mlp=32)),
    _case("nanogpt_targets", GPTConfig(), ids_and_targets),
    _case("nanogpt_shared_block", GPTConfig(n_layer=1, n_loops=3)),
    _case("nanogpt_scaled_embedding", GPTConfig(embedding_scale=math.sqrt(32))),
]
