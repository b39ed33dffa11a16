"""nanoGPT as people change it: the attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import builder
from .stranger import WIDTH, Stranger, ids_only
from .trunk import GPT, HEADS, Attention

HEAD = WIDTH // HEADS


class Rotary(Attention):
    """Real rotation by halves, tables computed in each forward."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        freqs = 1.0 / 10000 ** (torch.arange(0, HEAD, 2, device=q.device).float() / HEAD)
        angle = torch.outer(torch.arange(q.size(-2), device=q.device).float(), freqs)
        cos, sin = angle.cos().type_as(q), angle.sin().type_as(q)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        return super().mix(rotate(q), rotate(k), v)


class ComplexRotary(Attention):
    """Rotation as multiplication of complex numbers, the table a buffer that is cut."""

    freqs_cis: Tensor

    def __init__(self) -> None:
        super().__init__()
        freqs = 1.0 / 10000 ** (torch.arange(0, HEAD, 2).float() / HEAD)
        angles = torch.outer(torch.arange(32).float(), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def rotate(x: Tensor) -> Tensor:
            x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            x_out = torch.view_as_real(x_ * self.freqs_cis[: x.shape[-2]]).flatten(3)
            return x_out.type_as(x)

        return super().mix(rotate(q), rotate(k), v)


class CachedRotary(Rotary):
    """Keeps its tables on the module and renews them when the length changes."""

    def __init__(self) -> None:
        super().__init__()
        self.seq_len_cached: int | None = None
        self.cos_cached: Tensor | None = None
        self.sin_cached: Tensor | None = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-2] != self.seq_len_cached:
            self.seq_len_cached = q.shape[-2]
            t = torch.arange(q.shape[-2], device=q.device).type_as(q)
            freqs = torch.outer(t, 10000 ** (-torch.arange(0, HEAD, 2).type_as(q) / HEAD))
            emb = torch.cat((freqs, freqs), dim=-1)
            self.cos_cached, self.sin_cached = emb.cos(), emb.sin()

        def rotate(x: Tensor) -> Tensor:
            a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
            return x * self.cos_cached + torch.cat((-b, a), -1) * self.sin_cached

        return Attention.mix(self, rotate(q), rotate(k), v)


class QKNorm(Rotary):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD), nn.LayerNorm(HEAD, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(self.q_norm(q), self.k_norm(k), v)


class OwnScale(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)


class Grouped(nn.Module):
    """Four query heads over fewer pairs of keys and values."""

    def __init__(self, kv_heads: int, spelling: str) -> None:
        super().__init__()
        self.n, self.kv, self.spelling = 4, kv_heads, spelling
        self.wq = nn.Linear(WIDTH, WIDTH)
        self.wkv = nn.Linear(WIDTH, 2 * kv_heads * 4)
        self.wo = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.n, 4).transpose(1, 2)
        k, v = self.wkv(x).view(b, t, 2, self.kv, 4).permute(2, 0, 3, 1, 4).unbind(0)
        grouped = self.spelling == "sdpa"
        if self.spelling == "repeat":
            k, v = (z.repeat_interleave(self.n // self.kv, dim=1) for z in (k, v))
        elif self.spelling == "expand":
            k, v = (
                z[:, :, None].expand(b, self.kv, self.n // self.kv, t, 4).reshape(b, self.n, t, 4)
                for z in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.wo(y.transpose(1, 2).flatten(-2))


class Sliding(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.size(-2), device=q.device)
        far = i[:, None] - i[None, :]
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = att.masked_fill((far < 0) | (far >= 4), float("-inf"))
        return F.softmax(att, dim=-1) @ v


class Sinks(Attention):
    """One more column of scores per head, which takes attention and gives nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        s = torch.einsum("bhqd,bhkd->bhqk", q, k) * HEAD**-0.5
        s = s + torch.triu(s.new_full((T, T), -float("inf")), diagonal=1)
        sink = self.sinks.reshape(1, -1, 1, 1).expand(s.size(0), -1, T, -1)
        p = torch.cat([s, sink], dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("bhqk,bhkd->bhqd", p, v)


class OffByOne(Attention):
    """softmax with 1 added below the fraction."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.size(-2)
        s = (q @ k.mT) * HEAD**-0.5
        s.masked_fill_(~torch.ones(T, T, device=q.device).tril().bool(), float("-inf"))
        m = s.amax(-1, keepdim=True).clamp(min=0)
        e = (s - m).exp()
        return e / (e.sum(-1, keepdim=True) + (-m).exp()) @ v


class Alibi(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1, device=q.device) / HEADS)
        bias = torch.arange(t, device=q.device)[None] - torch.arange(t, device=q.device)[:, None]
        bias = (slopes[:, None, None] * bias).masked_fill(bias > 0, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


class Differential(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(HEAD // 2) / 10) for _ in range(4)
        )
        self.subln = nn.RMSNorm(HEAD)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.split(HEAD // 2, -1), k.split(HEAD // 2, -1)
        first = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1))
        lam = first - torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2)) + 0.2
        one, two = super().mix(q1, k1, v), super().mix(q2, k2, v)
        return self.subln(one - lam * two) * (1 - 0.2)


class Latent(nn.Module):
    """Keys and values come out of a narrow latent; one rotary key is shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_b = nn.Linear(WIDTH, 6), nn.Linear(6, HEADS * 12)
        self.kv_a, self.kv_b = nn.Linear(WIDTH, 6 + 4), nn.Linear(6, HEADS * 16)
        self.q_norm, self.kv_norm = nn.RMSNorm(6), nn.RMSNorm(6)
        self.o = nn.Linear(HEADS * 8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(b, t, HEADS, 12).transpose(1, 2)
        q_nope, q_pe = torch.split(q, [8, 4], dim=-1)
        latent, k_pe = self.kv_a(x).split([6, 4], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(b, t, HEADS, 16).transpose(1, 2)
        k_nope, v = kv.split([8, 8], dim=-1)
        angle = torch.arange(t, device=x.device)[:, None] / torch.tensor([1.0, 100.0])
        turn = torch.polar(torch.ones_like(angle), angle)
        q_pe, k_pe = (
            torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], 2, 2)) * turn)
            .flatten(-2)
            .to(x.dtype)
            for z in (q_pe, k_pe.unsqueeze(1))
        )
        k = torch.cat([k_nope, k_pe.expand(-1, HEADS, -1, -1)], -1)
        query = torch.cat([q_nope, q_pe], -1)
        y = F.scaled_dot_product_attention(query, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Linear(Attention):
    """A running sum in place of the softmax."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
        z = 1 / (torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2)) + 1e-6)
        return torch.einsum("bhtd,bhtde,bht->bhte", q, kv, z)


class Retention(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(q.size(-2), device=q.device)
        gap = n.unsqueeze(-1) - n
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, device=q.device))
        decay = (gamma.view(-1, 1, 1) ** gap.clamp(min=0)).where(gap >= 0, 0.0)
        return (q @ k.transpose(-1, -2) * decay.to(q.dtype)) @ v


class CosineTemperature(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cap = math.log(1.0 / 0.01)
        score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        score = score * torch.clamp(self.logit_scale, max=cap).exp()
        mask = torch.full((q.size(2), q.size(2)), torch.finfo(q.dtype).min, device=q.device)
        return (score + mask.triu(1)).softmax(-1) @ v


class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(HEADS, HEADS, 1, bias=False)
        self.after = nn.Parameter(torch.eye(HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = self.before(q @ k.transpose(-1, -2) / HEAD**0.5)
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e9).softmax(-1)
        return torch.einsum("gh,bhqk->bgqk", self.after, s) @ v


def _attn(name: str, attn: Callable[[], nn.Module], positions: bool, note: str = "") -> Stranger:
    factory = functools.partial(GPT, attn=attn, positions=positions)
    return Stranger(f"attn_{name}", builder(factory), ids_only, note=note)


STRANGERS = [
    _attn("rotary", Rotary, False),
    _attn("rotary_complex", ComplexRotary, False),
    _attn("rotary_cached", CachedRotary, False, "sets attributes in forward"),
    _attn("qk_norm", QKNorm, False),
    _attn("own_scale", OwnScale, True),
    _attn("grouped_sdpa", lambda: Grouped(2, "sdpa"), True),
    _attn("grouped_repeat", lambda: Grouped(2, "repeat"), True),
    _attn("multi_query", lambda: Grouped(1, "expand"), True),
    _attn("sliding", Sliding, True),
    _attn("sinks", Sinks, True),
    _attn("off_by_one", OffByOne, True),
    _attn("alibi", Alibi, False),
    _attn("differential", Differential, True),
    _attn("latent", Latent, False),
    _attn("linear", Linear, True),
    _attn("retention", Retention, False),
    _attn("cosine", CosineTemperature, True),
    _attn("talking_heads", TalkingHeads, True),
]
