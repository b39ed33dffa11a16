"""Two-layer transformers that differ in one thing each, and what each gauge pass finds in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lensfx import Program, capture

LAYERS = 2


class HandNorm(nn.Module):
    """A layer norm, or a root-mean-square norm, written out; `kind` says how."""

    def __init__(self, d: int, kind: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "hand rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        y = x - x.mean(-1, keepdim=True)
        square = y.pow(2).mean(-1, keepdim=True) if self.kind == "hand" else None
        var = x.var(-1, unbiased=False, keepdim=True) if square is None else square
        return y / torch.sqrt(var + 1e-5) * self.weight + self.bias


def norm_of(kind: str, d: int) -> nn.Module:
    plain: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    return plain[kind](d) if kind in plain else HandNorm(d, kind)


class Attention(nn.Module):
    """Causal attention over a fused projection, written out where `what` needs the scores."""

    def __init__(self, d: int, heads: int, what: str) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.gate, self.heads, self.what = nn.Linear(d, d), heads, what
        self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1)
        )
        if self.what == "gated":
            v = v * self.gate(x).sigmoid().view(b, t, self.heads, -1).transpose(1, 2)
        if self.what in ("rope", "partial rope"):
            q, k = (self.turned(p) for p in (q, k))
        if self.what in ("", "gated", "rope", "partial rope"):
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            z = self.weights(q, k, t) @ v
        return self.proj(z.transpose(1, 2).reshape(b, t, d))

    def turned(self, x: Tensor) -> Tensor:
        part = x.shape[-1] if self.what == "rope" else x.shape[-1] // 2
        angle = torch.arange(x.shape[2])[:, None] / (1.0 + torch.arange(part // 2))
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        y, rest = x[..., :part], x[..., part:]
        half = torch.cat((-y[..., part // 2 :], y[..., : part // 2]), -1)
        return torch.cat((y * cos + half * sin, rest), -1)

    def weights(self, q: Tensor, k: Tensor, t: int) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.what == "capped":
            scores = 5 * torch.tanh(scores / 5)
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, -torch.inf)
        if self.what in ("sinks", "off by one"):
            sink = self.sink[None, :, None, None].expand(*scores.shape[:-1], 1)
            sink = sink if self.what == "sinks" else torch.zeros_like(sink)
            return torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        a = scores.softmax(-1)
        return a * k[..., 0].sigmoid()[:, :, None, :] if self.what == "reweighted" else a


class MLP(nn.Module):
    def __init__(self, d: int, inner: int, what: str) -> None:
        super().__init__()
        self.up, self.down, self.gate = (
            nn.Linear(d, inner),
            nn.Linear(inner, d),
            nn.Linear(d, inner),
        )
        self.what, self.router = what, nn.Linear(d, 3)
        self.ups, self.downs = (nn.Parameter(torch.zeros(3, *n)) for n in ((d, inner), (inner, d)))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "glu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.what == "experts":
            w, ids = self.router(x).softmax(-1).topk(2, -1)
            y = F.gelu(torch.matmul(x[:, :, None, None, :], self.ups[ids]))
            return (torch.matmul(y, self.downs[ids])[..., 0, :] * w[..., None]).sum(2)
        return self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class Options:
    norm: str = "layer"
    last: str = ""
    place: str = "pre"
    attention: str = ""
    mlp: str = ""
    stream: str = ""
    returns: str = "logits"
    sizes: tuple[int, int, int] = (24, 31, 48)
    tied: bool = False


class Custom(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        d, vocab, inner = o.sizes
        self.o, blocks = o, 1 if o.stream == "shared" else LAYERS
        kinds = [o.norm] * (2 * LAYERS + 1)
        kinds[2 * LAYERS - 1] = o.last or o.norm
        self.norms = nn.ModuleList(norm_of(k, d) for k in kinds)
        self.wte, self.wpe, self.first = (
            nn.Embedding(vocab, d),
            nn.Embedding(16, d),
            norm_of("layer", d),
        )
        self.attn = nn.ModuleList(Attention(d, 3, o.attention) for _ in range(blocks))
        self.mlp = nn.ModuleList(MLP(d, inner, o.mlp) for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(LAYERS, d))
        self.lambdas = nn.Parameter(torch.ones(LAYERS, 2))
        self.head = nn.Linear(d, vocab)
        if o.tied:
            self.head.weight = self.wte.weight
        for p in self.parameters():
            nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.3, 0.4)

    def forward(self, ids: Tensor) -> Any:
        stream = self.o.stream
        x, p = self.wte(ids), self.wpe(torch.arange(ids.shape[1]))
        x = self.first(x) + p if stream == "positions after a norm" else x + p
        x = self.first(x) if stream == "embedding norm" else x
        start = x
        for i in range(3 if stream == "shared" else LAYERS):
            j = 0 if stream == "shared" else i
            x = self.mixed(x, start, i)
            x = self.joined(x, self.attn[j], 2 * j, i)
            x = self.joined(x, self.mlp[j], 2 * j + 1, i)
        n = x if self.o.place == "post" else self.norms[-1](x)
        y = self.head(n)
        y = 30 * torch.tanh(y / 30) if self.o.returns == "capped" else y
        kinds = {
            "probabilities": y.softmax(-1),
            "with softmax": (y, y.softmax(-1)),
            "with maximum": (y, y.amax(-1)),
            "with norm": (y, n),
            "with stream": (y, x),
        }
        return kinds.get(self.o.returns, y)

    def mixed(self, x: Tensor, start: Tensor, i: int) -> Tensor:
        if self.o.stream != "lambdas":
            return x
        return self.lambdas[i, 0] * x + self.lambdas[i, 1] * start

    def joined(self, x: Tensor, part: nn.Module, k: int, i: int) -> Tensor:
        norm = self.norms[k]
        if self.o.place == "post":
            return norm(x + part(x))
        y = part(norm(x))
        if self.o.stream == "layer scale" and k % 2 == 0:
            y = y * self.scale[i]
        return x + (0.5 * y if self.o.stream == "multiplier" else y)


@dataclass(frozen=True)
class Expected:
    """A model, the writers that are centred in it, and its dead bias entries (sites, entries)."""

    options: Options
    writers: int = 6
    dead: tuple[int, int] = (2, 24)


TABLE: dict[str, Expected] = {
    "base": Expected(Options()),
    "all sizes equal": Expected(Options(sizes=(24, 24, 24))),
    "all sizes equal, tied": Expected(Options(sizes=(24, 24, 24), tied=True)),
    "hand-written norm": Expected(Options("hand")),
    "hand-written norm over var": Expected(Options("hand var")),
    "hand-written rms norm": Expected(Options("hand rms"), 0),
    "rms norm": Expected(Options("rms"), 0),
    "one rms norm in the last block": Expected(Options(last="rms"), 1),
    "post-norm": Expected(Options(place="post"), 4),
    "gated attention": Expected(Options(attention="gated")),
    "sinks": Expected(Options(attention="sinks"), 6, (0, 0)),
    "off by one": Expected(Options(attention="off by one"), 6, (0, 0)),
    "reweighted rows": Expected(Options(attention="reweighted"), 6, (2, 21)),
    "score cap": Expected(Options(attention="capped"), 6, (0, 0)),
    "rope": Expected(Options(attention="rope"), 6, (0, 0)),
    "partial rope": Expected(Options(attention="partial rope"), 6, (2, 12)),
    "layer scale": Expected(Options(stream="layer scale"), 4),
    "multiplier": Expected(Options(stream="multiplier")),
    "lambdas": Expected(Options(stream="lambdas")),
    "logits cap": Expected(Options(returns="capped")),
    "logits and softmax": Expected(Options(returns="with softmax")),
    "probabilities": Expected(Options(returns="probabilities")),
    "logits and maximum": Expected(Options(returns="with maximum")),
    "norm returned": Expected(Options(returns="with norm")),
    "stream returned": Expected(Options(returns="with stream"), 0),
    "block three times": Expected(Options(stream="shared"), 8, (3, 24)),
    "embedding norm": Expected(Options(stream="embedding norm")),
    # Only the norm reads the table: what it writes to is no stream.
    "positions after a norm": Expected(Options(stream="positions after a norm"), 5),
    "glu": Expected(Options(mlp="glu")),
    "experts": Expected(Options(mlp="experts")),
    "experts behind rms norms": Expected(Options("rms", mlp="experts"), 0),
}


@cache
def custom(name: str) -> Program:
    """The captured model of one row of the table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Custom(TABLE[name].options).eval()
        ids = torch.randint(0, 20, (2, 5))
    return capture(model, ids)
