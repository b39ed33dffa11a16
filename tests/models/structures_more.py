"""The further half of the models whose structure is known by hand: unusual streams and blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .structures import BLOCKS, HEADS, WIDTH, Decoder, Gated, Norm, causal, known

DH = WIDTH // HEADS


@known("one flat module")
class Flat(nn.Module):
    """No submodule at all: raw parameters and functional code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(2))
        self.w = nn.ParameterList(nn.Parameter(torch.empty(6, WIDTH, WIDTH)) for _ in range(BLOCKS))
        self.g = nn.Parameter(torch.empty(2 * BLOCKS + 1, WIDTH))

    def norm(self, x: Tensor, i: int) -> Tensor:
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5) * self.g[i]

    def embed(self, ids: Tensor) -> Tensor:
        return self.a[ids] + self.b[torch.arange(ids.shape[1])]

    def forward(self, ids: Tensor) -> Tensor:
        x, n = self.embed(ids), ids.shape[1]
        for i, w in enumerate(self.w):
            h = self.norm(x, 2 * i)
            q, k, v = ((h @ w[j]).view(*h.shape[:2], HEADS, DH).transpose(1, 2) for j in range(3))
            scores = (q @ k.mT * DH**-0.5).masked_fill(causal(n) < 0, float("-inf"))
            z = (scores.softmax(-1) @ v).transpose(1, 2).reshape(h.shape)
            x = z @ w[3] + x
            x = F.gelu(self.norm(x, 2 * i + 1) @ w[4]) @ w[5] + x
        return self.norm(x, 2 * BLOCKS) @ self.a.T


@known("everything in einsum", embeddings=("token",))
class Einsum(nn.Module):
    """Per-head weights, hand-written softmax and norms, no reshape anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(WIDTH, WIDTH)
        self.qkv = nn.ParameterList(torch.empty(3, HEADS, WIDTH, DH) for _ in range(BLOCKS))
        self.o = nn.ParameterList(torch.empty(HEADS, DH, WIDTH) for _ in range(BLOCKS))
        self.up = nn.ParameterList(torch.empty(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.down = nn.ParameterList(torch.empty(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.n = nn.ModuleList(Norm("layer_hand") for _ in range(2 * BLOCKS + 1))
        self.unembed = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(BLOCKS):
            q, k, v = (torch.einsum("pbm,nmh->pbnh", self.n[2 * i](x), w) for w in self.qkv[i])
            scores = torch.einsum("pbnh,qbnh->bnpq", k, q).transpose(-1, -2) / DH**0.5
            e = torch.exp(scores + causal(ids.shape[0]))
            pattern = e / e.sum(-1, keepdim=True)
            z = torch.einsum("bnqp,pbnh->qbnh", pattern, v)
            x = x + torch.einsum("pbnh,nhm->pbm", z, self.o[i])
            h = torch.einsum("pbm,mf->pbf", self.n[2 * i + 1](x), self.up[i])
            x = x + torch.einsum("pbf,fm->pbm", F.relu(h), self.down[i])
        return torch.einsum("pbm,mv->pbv", self.n[-1](x), self.unembed)


class DenseExperts(nn.Module):
    """All experts on every token, weighed by a softmax, beside one that all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.shared = nn.Linear(WIDTH, 4), Gated()
        self.up, self.down = (nn.Parameter(torch.empty(4, WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,edf->btef", x, self.up))
        each = torch.einsum("btef,efd->bted", h, self.down)
        mixed = torch.einsum("bte,bted->btd", self.router(x).softmax(-1), each)
        return mixed + self.shared(x)


class TopExperts(nn.Module):
    """The best two of four experts, one after the other over all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, picks = self.router(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (picks == i)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


@known("dense experts beside a shared one", blocks=("attention gated_mlp",) * BLOCKS)
class Dense(Decoder):
    mlp = DenseExperts


@known("best experts in a loop", blocks=("attention moe",) * BLOCKS)
class Top(Decoder):
    mlp = TopExperts


class Recurrence(nn.Module):
    """A running mean of values under a gate, of tokens mixed with those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.empty(WIDTH))
        self.k, self.v, self.r, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        x = x * self.mu + before * (1 - self.mu)
        k = torch.exp(self.k(x))
        mean = (k * self.v(x)).cumsum(1) / k.cumsum(1)
        return self.o(torch.sigmoid(self.r(x)) * mean)


@known("recurrence and token shift", blocks=("mixer mlp",) * BLOCKS, heads=None)
class Recurrent(Decoder):
    def more(self) -> dict[str, nn.Module]:
        return {"attn": Recurrence()}


@known("attention only", blocks=("attention",) * BLOCKS)
class AttentionOnly(Decoder):
    def block(self, b: Any, x: Tensor) -> Tensor:
        return x + b["attn"](b["n1"](x))


@known("two mlps around attention", blocks=("mlp attention mlp",) * BLOCKS)
class Macaron(Decoder):
    def more(self) -> dict[str, nn.Module]:
        return {"mlp0": type(self).mlp()}

    def block(self, b: Any, x: Tensor) -> Tensor:
        x = x + 0.5 * b["mlp0"](b["n3"](x))
        x = x + b["attn"](b["n1"](x))
        return x + 0.5 * b["mlp"](b["n2"](x))


class LocalConvolution(nn.Module):
    """A convolution of the values with a residual of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.o(F.silu(h))


@known("a branch with a residual inside", blocks=("attention mixer mlp",) * BLOCKS)
class Conformer(Decoder):
    def more(self) -> dict[str, nn.Module]:
        return {"conv": LocalConvolution()}

    def block(self, b: Any, x: Tensor) -> Tensor:
        x = x + b["attn"](b["n1"](x))
        x = x + b["conv"](b["n3"](x))
        return x + b["mlp"](b["n2"](x))


@known("one block several times")
class Shared(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(BLOCKS):
            x = self.block(self.h[0], x)
        return self.head(self.ln_f(x))


class AddmmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.empty(WIDTH, WIDTH) for _ in range(4))

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        split = [(h @ w).view(*h.shape[:2], HEADS, DH).transpose(1, 2) for w in self.w[:3]]
        z = F.scaled_dot_product_attention(*split, is_causal=True)
        return torch.addmm(rows, z.transpose(1, 2).reshape(rows.shape), self.w[3])


@known("products fused with the residual add")
class Fused(Decoder):
    """torch.addmm(x, h, W): what is written has no value of its own."""

    def more(self) -> dict[str, nn.Module]:
        return {"attn": AddmmAttention()}

    def block(self, b: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        x = b["attn"](b["n1"](x), rows).view(x.shape)
        h = F.gelu(b["mlp"].up(b["n2"](x)))
        rows = torch.addmm(x.reshape(-1, WIDTH), h.reshape(-1, WIDTH), b["mlp"].down.weight)
        return rows.view(x.shape)


@known("highway gates")
class Highway(Decoder):
    """x*(1 - g) + h*g with g from x: the carry is scaled by a gate of its own."""

    def more(self) -> dict[str, nn.Module]:
        return {"g1": nn.Linear(WIDTH, WIDTH), "g2": nn.Linear(WIDTH, WIDTH)}

    def block(self, b: Any, x: Tensor) -> Tensor:
        g = torch.sigmoid(b["g1"](x))
        x = g * b["attn"](b["n1"](x)) + (1 - g) * x
        g = torch.sigmoid(b["g2"](x))
        return (1 - g) * x + g * b["mlp"](b["n2"](x))


class Connection(nn.Module):
    """How copies of the stream are read and written: static weights plus learned ones."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))
        self.mix, self.dynamic = nn.Parameter(torch.empty(3, 3)), nn.Linear(WIDTH, 1)


# What a branch reads is a mix of copies, so its norm is none of the stream.
@known("copies of the stream", norms="none")
class Hyper(Decoder):
    """Hyper-connections: three copies of the stream, mixed with each other at every write."""

    def more(self) -> dict[str, nn.Module]:
        return {"c1": Connection(), "c2": Connection()}

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for b in self.h:
            x = self.connect(b["c1"], x, lambda h, b=b: b["attn"](b["n1"](h)))
            x = self.connect(b["c2"], x, lambda h, b=b: b["mlp"](b["n2"](h)))
        return self.head(self.ln_f(x.sum(2)))

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids)[:, :, None].expand(-1, -1, 3, -1)

    def connect(self, c: Connection, x: Tensor, branch: Any) -> Tensor:
        h = torch.einsum("btnd,btn->btd", x, c.read + torch.tanh(c.dynamic(x)).squeeze(-1))
        kept = torch.einsum("btnd,nm->btmd", x, c.mix)
        return kept + branch(h)[:, :, None] * c.write[:, None]


@known("no residual", blocks=())
class Plain(Decoder):
    def block(self, b: Any, x: Tensor) -> Tensor:
        return b["mlp"](b["n2"](b["attn"](b["n1"](x))))


@known("copied embedding, projected", embeddings=("token", "position"))
class Projected(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Embedding(WIDTH, 8), nn.Linear(8, WIDTH)
        self.narrow_wpe = nn.Embedding(16, 8)

    def embed(self, ids: Tensor) -> Tensor:
        return self.wide(self.narrow(ids) + self.narrow_wpe(torch.arange(ids.shape[1])))


@known("a regression head", unembed=False)
class Regression(Decoder):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for b in self.h:
            x = self.block(b, x)
        return self.ln_f(x).mean(1)


@known("batch behind positions")
class PositionsFirst(Decoder):
    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[0]))[:, None]

    def block(self, b: Any, x: Tensor) -> Tensor:
        h = b["n1"](x)
        q, k, v = (
            f(h).view(h.shape[0], -1, DH).transpose(0, 1)
            for f in (b["attn"].q, b["attn"].k, b["attn"].v)
        )
        pattern = (torch.bmm(q, k.transpose(1, 2)) / DH**0.5 + causal(h.shape[0])).softmax(-1)
        z = torch.bmm(pattern, v).transpose(0, 1).reshape(x.shape)
        x = x + b["attn"].o(z)
        return x + b["mlp"](b["n2"](x))
