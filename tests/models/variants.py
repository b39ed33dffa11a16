"""nanoGPT as people change it: everything but the attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import builder
from .stranger import VOCAB, WIDTH, Stranger, ids_only
from .trunk import GPT, HEADS, MLP, Attention, Block


class BareLayerNorm(nn.Module):
    """LayerNorm as PyTorch did not have it: with no bias."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class FunctionalRMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight=self.scale, eps=1e-6)


class HandRMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        norm_x = x.norm(2, dim=-1, keepdim=True) * (x.size(-1) ** -0.5)
        return self.g * (x / (norm_x + 1e-6))


class BareRMS(nn.Module):
    """No parameters at all."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


class SwiGLU(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, 24, bias=False)
        self.w2 = nn.Linear(24, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, 24, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class FusedGeGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Parameter(torch.randn(WIDTH, 48) / 4)
        self.wo = nn.Parameter(torch.randn(24, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.wi).chunk(2, -1)
        return (F.gelu(gate, approximate="tanh") * up) @ self.wo


class SquaredReLU(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class ParallelBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return x + self.attn(h) + self.mlp(h)


class PostNormBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class SandwichBlock(Block):
    def __init__(self, norm: Callable[[int], nn.Module], **parts: Any) -> None:
        super().__init__(norm, **parts)
        self.after_attn, self.after_mlp = norm(WIDTH), norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after_attn(self.attn(self.ln_1(x)))
        return x + self.after_mlp(self.mlp(self.ln_2(x)))


class LayerScaleBlock(Block):
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.gamma_1 = nn.Parameter(0.1 * torch.rand(WIDTH))
        self.gamma_2 = nn.Parameter(0.1 * torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.gamma_1, self.attn(self.ln_1(x)))
        return torch.addcmul(x, self.gamma_2, self.mlp(self.ln_2(x)))


class BiasedHead(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=True)


class Softcapped(GPT):
    def forward(self, idx: Tensor) -> Tensor:
        return 3.0 * torch.tanh(super().forward(idx) / 3.0)


class SigmoidCapped(GPT):
    def forward(self, idx: Tensor) -> Tensor:
        logits = super().forward(idx).float()
        return 30 * torch.sigmoid(logits / (7.5 * logits.size(-1) ** 0.5))


class ScaledEmbedding(GPT):
    def embed(self, idx: Tensor) -> Tensor:
        return super().embed(idx) * math.sqrt(WIDTH)


class X0Mixing(GPT):
    """A pair of scalars per layer weighs the stream against the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lambdas = nn.Parameter(torch.tensor([[1.0, 0.1], [0.9, -0.2]]))

    def forward(self, idx: Tensor) -> Tensor:
        x = x0 = F.rms_norm(self.embed(idx), (WIDTH,))
        for lam, block in zip(self.lambdas, self.h, strict=True):
            x = lam[0] * x + lam[1] * x0
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ValueAttention(nn.Module):
    """Attention whose values are mixed with somebody else's; the three weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_w = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)
        self.lamb = nn.Parameter(torch.tensor(0.5))
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
        B, T = x.size(0), x.size(1)
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1)).view(B, T, 3 * HEADS, -1)
        q, k, v = qkv.chunk(3, dim=-2)
        own = v
        if other is not None:
            v = (1 - self.lamb) * v + self.lamb * other.view_as(v)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.proj(y.transpose(1, 2).reshape(B, T, -1)), own


class ValueResidual(GPT):
    def __init__(self) -> None:
        super().__init__(attn=ValueAttention)

    def forward(self, idx: Tensor) -> Tensor:
        x, v1 = self.embed(idx), None
        for block in self.h:
            out, v = block.attn(block.ln_1(x), v1)
            v1 = v if v1 is None else v1
            x = x + out
            x = x + block.mlp(block.ln_2(x))
        return self.lm_head(self.ln_f(x))


class ValueEmbeddings(GPT):
    """Tables looked up by token and added into the values of some layers."""

    def __init__(self) -> None:
        super().__init__(attn=ValueAttention, layers=3)
        self.value_embeds = nn.ModuleList([nn.Embedding(VOCAB, WIDTH) for _ in range(2)])

    def forward(self, idx: Tensor) -> Tensor:
        ve = [table(idx) for table in self.value_embeds]
        ve = [ve[0], None, ve[1]]
        x = self.embed(idx)
        for i in range(len(self.h)):
            x = x + self.h[i].attn(self.h[i].ln_1(x), ve[i])[0]
            x = x + self.h[i].mlp(self.h[i].ln_2(x))
        return self.lm_head(self.ln_f(x))


class UNet(GPT):
    def __init__(self) -> None:
        super().__init__(layers=4)
        self.skip_weights = nn.Parameter(torch.ones(2))

    def forward(self, idx: Tensor) -> Tensor:
        x, skip_connections = self.embed(idx), []
        n = len(self.h) // 2
        for i in range(n):
            x = self.h[i](x)
            skip_connections.append(x)
        for i in range(n):
            x = x + self.skip_weights[i] * skip_connections.pop()
            x = self.h[n + i](x)
        return self.lm_head(self.ln_f(x))


class HyperConnections(GPT):
    """Four streams, mixed before and after each layer by small matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(2, 4, 4) / 2)
        self.reads = nn.Parameter(torch.ones(2, 4) / 4)

    def forward(self, idx: Tensor) -> Tensor:
        streams = self.embed(idx)[None].expand(4, -1, -1, -1)
        for i, block in enumerate(self.h):
            h = torch.einsum("s,sbtd->btd", self.reads[i], streams)
            streams = torch.einsum("rs,sbtd->rbtd", self.mixing[i], streams) + (block(h) - h)
        return self.lm_head(self.ln_f(streams.sum(0)))


class WithLoss(GPT):
    """The z-loss and label smoothing that big runs add."""

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(idx)
        flat = logits.view(-1, logits.size(-1))
        loss = F.cross_entropy(flat, targets.reshape(-1), ignore_index=-1, label_smoothing=0.1)
        return logits, loss + 1e-4 * torch.logsumexp(flat, -1).pow(2).mean()


def _with_targets(batch: int, length: int, seed: int) -> Any:
    (idx,), _ = ids_only(batch, length, seed)
    targets = idx.roll(-1, 1)
    targets[1:, 0] = -1
    return (idx, targets), {}


def _gpt(name: str, factory: Callable[[], nn.Module], **more: Any) -> Stranger:
    return Stranger(f"gpt_{name}", builder(factory), more.pop("inputs", ids_only), **more)


_no_bias = {
    "attn": functools.partial(Attention, bias=False),
    "mlp": functools.partial(MLP, bias=False),
}

STRANGERS = [
    _gpt("no_bias", lambda: GPT(norm=BareLayerNorm, **_no_bias)),
    _gpt("rms_functional", lambda: GPT(norm=FunctionalRMSNorm)),
    _gpt("rms_module", lambda: GPT(norm=nn.RMSNorm)),
    _gpt("rms_by_hand", lambda: GPT(norm=HandRMSNorm)),
    _gpt("rms_bare", lambda: GPT(norm=BareRMS)),
    _gpt("swiglu", lambda: GPT(mlp=SwiGLU)),
    _gpt("geglu", lambda: GPT(mlp=FusedGeGLU)),
    _gpt("relu_squared", lambda: GPT(mlp=SquaredReLU)),
    _gpt("parallel", lambda: GPT(ParallelBlock)),
    _gpt("post_norm", lambda: GPT(PostNormBlock)),
    _gpt("sandwich", lambda: GPT(SandwichBlock)),
    _gpt("layer_scale", lambda: GPT(LayerScaleBlock)),
    _gpt("head_bias", BiasedHead),
    _gpt("softcap_tanh", Softcapped),
    _gpt("softcap_sigmoid", SigmoidCapped),
    _gpt("scaled_embedding", ScaledEmbedding),
    _gpt("x0_mixing", X0Mixing),
    _gpt("value_residual", ValueResidual),
    _gpt("value_embeddings", ValueEmbeddings),
    _gpt("unet_skips", UNet),
    _gpt("hyper_connections", HyperConnections),
    _gpt("loss", WithLoss, inputs=_with_targets),
]
