"""Small models, each with one thing in it that a graph rewrite may get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Inputs, builder, padding_mask, token_ids

VOCAB = 61
POSITIONS = 32
WIDTH = 32
HEADS = 4
HIDDEN = 64
DEPTH = 2


class _Affine(nn.Module):
    """The parameters that the hand-written norms below have in common."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps


class PowLayerNorm(_Affine):
    def forward(self, x: Tensor) -> Tensor:
        mu = x.mean(dim=-1, keepdim=True)
        var = (x - mu).pow(2).mean(dim=-1, keepdim=True)
        return (x - mu) / (var + self.eps).sqrt() * self.gain + self.bias


class MulLayerNorm(_Affine):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.eps)
        return self.bias + self.gain * (centred * scale)


class MomentsLayerNorm(_Affine):
    """The variance as the mean of the squares less the square of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) * torch.rsqrt(var + self.eps) * self.gain + self.bias


class StdNorm(_Affine):
    """Not a layer norm: the unbiased standard deviation, with eps added outside the root."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.gain * (x - mean) / (std + self.eps) + self.bias


class UnbiasedNorm(_Affine):
    """Not a layer norm: it divides the sum of squares by d - 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True)
        return self.gain * (x - mean) / torch.sqrt(var + self.eps) + self.bias


class EpsOutsideNorm(_Affine):
    """Not a layer norm: eps is added to the root, and is large enough to tell."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, unbiased=False, keepdim=True)
        return self.gain * (x - mean) / (torch.sqrt(var) + self.eps) + self.bias


class EpsOutsideRMSNorm(_Affine):
    """Not an RMS norm, for the same reason; it has a bias as well."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        rms = x.pow(2).mean(-1, keepdim=True).sqrt()
        return self.gain * x / (rms + self.eps) + self.bias


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


class Block(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1 = norm(WIDTH)
        self.attn = Attention()
        self.norm2 = norm(WIDTH)
        self.mlp = MLP()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A plain pre-norm decoder, whose parts the models below replace."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        block: Callable[[Callable[[int], nn.Module]], nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.pos = nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList([block(norm) for _ in range(DEPTH)])
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EinsumAttention(nn.Module):
    """Weights with an axis per head, as in the interpretability libraries."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.W_Q = nn.Parameter(torch.empty(WIDTH, HEADS, size))
        self.W_K = nn.Parameter(torch.empty(WIDTH, HEADS, size))
        self.W_V = nn.Parameter(torch.empty(WIDTH, HEADS, size))
        self.W_O = nn.Parameter(torch.empty(HEADS, size, WIDTH))
        self.b_Q = nn.Parameter(torch.zeros(HEADS, size))
        self.b_K = nn.Parameter(torch.zeros(HEADS, size))
        self.b_V = nn.Parameter(torch.zeros(HEADS, size))
        self.b_O = nn.Parameter(torch.zeros(WIDTH))
        for weight in (self.W_Q, self.W_K, self.W_V, self.W_O):
            nn.init.normal_(weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btd,dhk->bthk", x, self.W_Q) + self.b_Q
        k = torch.einsum("btd,dhk->bthk", x, self.W_K) + self.b_K
        v = torch.einsum("btd,dhk->bthk", x, self.W_V) + self.b_V
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(q.shape[-1])
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        pattern = scores.masked_fill(~causal, float("-inf")).softmax(dim=-1)
        z = torch.einsum("bhqs,bshk->bqhk", pattern, v)
        return torch.einsum("bthk,hkd->btd", z, self.W_O) + self.b_O


class EinsumBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(WIDTH)
        self.attn = EinsumAttention()
        self.norm2 = norm(WIDTH)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FlatDecoder(nn.Module):
    """One module that holds every parameter itself, with weights as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embed = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(POSITIONS, WIDTH))
        for i in range(DEPTH):
            self._norm(f"ln1_{i}")
            self._linear(f"qkv_{i}", WIDTH, 3 * WIDTH)
            self._linear(f"proj_{i}", WIDTH, WIDTH)
            self._norm(f"ln2_{i}")
            self._linear(f"up_{i}", WIDTH, HIDDEN)
            self._linear(f"down_{i}", HIDDEN, WIDTH)
        self._norm("ln_f")
        self._linear("unembed", WIDTH, VOCAB)

    def _norm(self, name: str) -> None:
        self.register_parameter(f"{name}_g", nn.Parameter(torch.ones(WIDTH)))
        self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(WIDTH)))

    def _linear(self, name: str, n_in: int, n_out: int) -> None:
        self.register_parameter(f"{name}_w", nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5))
        self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(n_out)))

    def forward(self, ids: Tensor) -> Tensor:
        p = dict(self.named_parameters())
        b, t = ids.shape
        x = p["tok_embed"][ids] + p["pos_embed"][:t]
        for i in range(DEPTH):
            h = F.layer_norm(x, (WIDTH,), p[f"ln1_{i}_g"], p[f"ln1_{i}_b"])
            qkv = h @ p[f"qkv_{i}_w"] + p[f"qkv_{i}_b"]
            q, k, v = qkv.reshape(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            scores = q @ k.mT * (WIDTH // HEADS) ** -0.5
            future = torch.ones(t, t, dtype=torch.bool, device=ids.device).triu(1)
            weights = torch.softmax(scores.masked_fill(future, float("-inf")), -1)
            z = (weights @ v).permute(0, 2, 1, 3).reshape(b, t, WIDTH)
            x = x + (z @ p[f"proj_{i}_w"] + p[f"proj_{i}_b"])
            h = F.layer_norm(x, (WIDTH,), p[f"ln2_{i}_g"], p[f"ln2_{i}_b"])
            h = torch.relu(h @ p[f"up_{i}_w"] + p[f"up_{i}_b"])
            x = x + (h @ p[f"down_{i}_w"] + p[f"down_{i}_b"])
        x = F.layer_norm(x, (WIDTH,), p["ln_f_g"], p["ln_f_b"])
        return x @ p["unembed_w"] + p["unembed_b"]


class InPlaceAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = q @ k.transpose(-2, -1)
        scores /= math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu_(1)
        scores.masked_fill_(future, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class InPlaceBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(WIDTH)
        self.attn = InPlaceAttention()
        self.norm2 = norm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.norm1(x))
        h = self.up(self.norm2(x))
        h.relu_()
        x += self.down(h)
        return x


class InPlaceDecoder(Decoder):
    """The stream is one tensor that every layer writes to."""

    def __init__(self) -> None:
        super().__init__(block=InPlaceBlock)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x += self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            block(x)
        return self.head(self.norm(x))


class KeywordDecoder(Decoder):
    """Takes keywords only, and returns a dict."""

    def forward(  # type: ignore[override]
        self, *, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        x = self.embed(input_ids) + self.pos(torch.arange(length, device=input_ids.device))
        for block in self.blocks:
            x = block(x, mask)
        return {"logits": self.head(self.norm(x)), "hidden": x}


class FrozenDecoder(Decoder):
    """Embeds, and runs the first `frozen` blocks, in a region without gradients."""

    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.frozen = frozen

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks[: self.frozen]:
                x = block(x)
        for block in self.blocks[self.frozen :]:
            x = block(x)
        return self.head(self.norm(x))


class NormAddedBlock(Block):
    """What the norm gives is read by a branch, and added to the stream as well."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + h + self.attn(h, mask)
        h = self.norm2(x)
        return x + h + self.mlp(h)


class NormResidualBlock(Block):
    """The skip connection starts after the norm, an option that BLOOM has."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = h + self.attn(h, mask)
        h = self.norm2(x)
        return h + self.mlp(h)


class NormReturningDecoder(Decoder):
    """Returns what the last norm gives, next to the logits made of it."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.embed(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x), x


def ids_only(batch: int, length: int, seed: int) -> Inputs:
    return (token_ids(batch, length, seed, VOCAB),), {}


def keywords(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length, seed, VOCAB)
    return (), {"input_ids": ids, "attention_mask": padding_mask(batch, length)}


def _pre(name: str, factory: Callable[[], nn.Module]) -> Case:
    return Case(name, builder(factory), ids_only, "pre", True, POSITIONS)


def _none(name: str, norm: Callable[[int], nn.Module]) -> Case:
    return Case(name, builder(lambda: Decoder(norm)), ids_only, "none", True, POSITIONS)


CASES = [
    _pre("norm_pow", lambda: Decoder(PowLayerNorm)),
    _pre("norm_mul", lambda: Decoder(MulLayerNorm)),
    _pre("norm_moments", lambda: Decoder(MomentsLayerNorm)),
    _none("lookalike_std", StdNorm),
    _none("lookalike_unbiased", UnbiasedNorm),
    _none("lookalike_eps", EpsOutsideNorm),
    _none("lookalike_rms_eps", EpsOutsideRMSNorm),
    _none("no_norm", lambda dim: nn.Identity()),
    _pre("einsum", lambda: Decoder(block=EinsumBlock)),
    _pre("flat", FlatDecoder),
    _pre("in_place", InPlaceDecoder),
    Case("keyword", builder(KeywordDecoder), keywords, "pre", True, POSITIONS),
    _pre("no_grad_embedding", lambda: FrozenDecoder(0)),
    _pre("no_grad_block", lambda: FrozenDecoder(1)),
    _pre("norm_added", lambda: Decoder(block=NormAddedBlock)),
    _pre("norm_residual", lambda: Decoder(block=NormResidualBlock)),
    _pre("norm_returned", NormReturningDecoder),
]
