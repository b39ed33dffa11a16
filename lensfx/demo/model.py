"""A small attention-and-MLP transformer in plain PyTorch, in the style of nanoGPT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class InductionConfig:
    """Sizes of an `InductionTransformer`; the defaults are those of the embedded model."""

    vocab: int = 64
    n_ctx: int = 64
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention with one fused projection for queries, keys and values."""

    future: Tensor

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        if config.d_model % config.n_head:
            raise ValueError(
                f"d_model ({config.d_model}) must be a multiple of n_head ({config.n_head})"
            )
        self.n_head = config.n_head
        self.d_head = config.d_head
        self.d_model = config.d_model
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)
        # One wider than any input: a slice that may turn out to be the whole buffer makes
        # torch.export guard on exactly that length, and the program then refuses it.
        width = config.n_ctx + 1
        future = torch.ones(width, width, dtype=torch.bool).triu(diagonal=1)
        # It follows from n_ctx alone, so a checkpoint has no reason to carry it.
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the heads write to the residual stream, `[batch, pos, d_model]`."""
        batch, pos, _ = x.shape
        q, k, v = self.qkv(x).split(self.d_model, dim=2)
        q = q.view(batch, pos, self.n_head, self.d_head).transpose(1, 2)
        k = k.view(batch, pos, self.n_head, self.d_head).transpose(1, 2)
        v = v.view(batch, pos, self.n_head, self.d_head).transpose(1, 2)

        # Written out because a fused kernel would leave no scores or pattern to look at.
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(self.d_head)
        scores = scores.masked_fill(self.future[:pos, :pos], float("-inf"))
        pattern = F.softmax(scores, dim=-1)
        z = pattern @ v

        z = z.transpose(1, 2).contiguous().view(batch, pos, self.d_model)
        out: Tensor = self.proj(z)
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.gelu = nn.GELU()
        self.proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the MLP writes to the residual stream, `[batch, pos, d_model]`."""
        out: Tensor = self.proj(self.gelu(self.fc(x)))
        return out


class Block(nn.Module):
    """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: InductionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this layer, `[batch, pos, d_model]`."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class InductionTransformer(nn.Module):
    """A decoder-only transformer with learned positions and an untied unembedding."""

    def __init__(self, config: InductionConfig | None = None) -> None:
        super().__init__()
        config = config or InductionConfig()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)

        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                # Every layer adds twice to the stream; this keeps its variance flat in depth.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits, `[batch, pos, vocab]`, and the loss.

        `idx` holds token ids, `[batch, pos]`, with at most `n_ctx` positions. `targets`, of the
        same shape, holds the token that follows each position, or -1 where nothing is to be
        predicted. The loss is the mean cross entropy in nats, `[]`, or None without targets.
        """
        _, pos = idx.shape
        # No check of pos against n_ctx: under torch.export it would become a guard on the size,
        # and the position embedding refuses longer inputs by itself.
        x = self.wte(idx) + self.wpe(torch.arange(pos, device=idx.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        # Ten times the usual spread: from faint positions a previous-token head is slow to form,
        # and without one there is nothing for an induction head to match against.
        nn.init.normal_(module.weight, std=0.2)
