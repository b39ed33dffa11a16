"""Models whose structure is known by hand, and in which no size tells one axis from another.

Width, hidden width, vocabulary and heads times head width are all WIDTH, every parameter is
random, and each model has BLOCKS blocks. Next to each stands what is to be found in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BLOCKS", "HEADS", "MODELS", "WIDTH", "Attention", "Decoder", "Known", "Norm", "known"]

WIDTH = 32
HEADS = 4
BLOCKS = 4
LENGTH = 6


@dataclass(frozen=True)
class Known:
    """What is to be found in a model: the kinds of each block as words, heads, and the rest.

    `norms` says where those of a write are: `before` it, `after` it on the stream, or `both`
    before it and behind the branch; `beside` is what there is in the blocks of a second stream.
    """

    build: Callable[[], nn.Module]
    blocks: tuple[str, ...] = ("attention mlp",) * BLOCKS
    heads: int | None = HEADS
    kv_heads: int | None = HEADS
    norms: str = "before"
    parallel: bool = False
    beside: tuple[str, ...] = ()
    final_norm: bool = True
    embeddings: tuple[str, ...] = ("token", "position")
    unembed: bool = True
    inputs: Callable[[], tuple[Tensor, ...]] = field(default=lambda: (ids(),))

    def model(self) -> nn.Module:
        """The model in eval mode, no parameter where an initialiser would leave it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_((p.dim() < 2) + torch.randn_like(p) * 0.3)
        return model.eval()


def ids(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids."""
    return torch.randint(0, WIDTH, (batch, length), generator=torch.Generator().manual_seed(seed))


MODELS: dict[str, Known] = {}


def known(name: str, **facts: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a class of models, with what is to be found in them."""

    def enter(model: type[nn.Module]) -> type[nn.Module]:
        MODELS[name] = Known(model, **facts)
        return model

    return enter


def variant(name: str, like: str, **facts: Any) -> None:
    """Enter a model that is another one with other options."""
    MODELS[name] = replace(MODELS[like], **facts)


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


class Norm(nn.Module):
    """A layer norm, or an RMS norm, as one operator or written out."""

    def __init__(self, kind: str = "layer", width: int = WIDTH) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.g, self.b)
        if self.kind == "rms":
            return F.rms_norm(x, (self.width,), self.g)
        if self.kind == "layer_hand":
            x = x - x.mean(-1, keepdim=True)
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.g + self.b
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.g * wide.to(x.dtype)


class Attention(nn.Module):
    """Attention in one of several spellings; reads `memory` if it is given one."""

    def __init__(
        self,
        spelling: str = "sdpa",
        heads: int = HEADS,
        kv: int = HEADS,
        qk_norm: bool = False,
        rotary: bool = False,
        cap: float = 0.0,
        sinks: bool = False,
        masked: bool = True,
        repeat: str = "expand",
    ) -> None:
        super().__init__()
        self.spelling, self.heads, self.kv, self.masked = spelling, heads, kv, masked
        self.rotary, self.cap, self.repeat, self.dh = rotary, cap, repeat, WIDTH // heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv * self.dh), nn.Linear(WIDTH, kv * self.dh)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(Norm("rms_hand", self.dh) for _ in range(2 * qk_norm))
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def forward(self, x: Tensor, memory: Tensor | None = None, extra: Any = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.rotary:
            q, k = turned(q), turned(k)
        if extra is not None:
            v = v + extra
        z = self.mix(q, self.repeated(k), self.repeated(v))
        return self.o(z.transpose(1, 2).reshape(x.shape))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.dh).transpose(1, 2)

    def repeated(self, x: Tensor) -> Tensor:
        times = self.heads // self.kv
        if times == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(times, dim=1)
        many = x[:, :, None].expand(-1, -1, times, -1, -1)
        return many.reshape(x.shape[0], self.heads, *x.shape[2:])

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.masked)
        if self.spelling == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.dh**-0.5
        else:
            scores = q @ k.transpose(-1, -2) / self.dh**0.5
        if self.cap:
            scores = torch.tanh(scores / self.cap) * self.cap
        if self.masked:
            scores = scores + causal(q.shape[2])
        pattern = self.softmax(scores)
        if self.spelling == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", pattern, v)
        return pattern @ v

    def softmax(self, scores: Tensor) -> Tensor:
        if self.sinks is not None:
            sink = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        if self.spelling == "einsum":
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            return e / e.sum(-1, keepdim=True)
        return scores.float().softmax(-1).to(scores.dtype)


def turned(x: Tensor) -> Tensor:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 10.0 ** torch.arange(half)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class MLP(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.act, self.up, self.down = act, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Gated(MLP):
    def __init__(self) -> None:
        super().__init__(F.silu)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


def squared_relu(x: Tensor) -> Tensor:
    r = F.relu(x)
    return r * r


class Decoder(nn.Module):
    """A decoder of blocks; what a block does to the stream is for subclasses to say."""

    norm = "layer"
    mlp: Callable[[], nn.Module] = MLP
    attention: dict[str, Any] = {}  # noqa: RUF012 - options of all of a class, never changed

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WIDTH, WIDTH), nn.Embedding(16, WIDTH)
        self.h = nn.ModuleList(self.parts() for _ in range(BLOCKS))
        self.ln_f, self.head = Norm(self.norm), nn.Linear(WIDTH, WIDTH, bias=False)

    def parts(self) -> nn.Module:
        parts = {"attn": Attention(**self.attention), "mlp": type(self).mlp(), **self.more()}
        parts |= {f"n{i}": Norm(self.norm) for i in range(1, 5)}
        return nn.ModuleDict(parts)

    def more(self) -> dict[str, nn.Module]:
        return {}

    def embed(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for b in self.h:
            x = self.block(b, x)
        return self.head(self.ln_f(x))

    def block(self, b: Any, x: Tensor) -> Tensor:
        x = x + b["attn"](b["n1"](x))
        return x + b["mlp"](b["n2"](x))


known("pre-norm")(Decoder)


@known("names that lie")
class Lying(Decoder):
    """The attention is called mlp, and the MLP attn."""

    def parts(self) -> nn.Module:
        parts = super().parts()
        parts["attn"], parts["mlp"] = parts["mlp"], parts["attn"]
        return parts

    def block(self, b: Any, x: Tensor) -> Tensor:
        x = x + b["mlp"](b["n1"](x))
        return x + b["attn"](b["n2"](x))


def with_attention(name: str, kv: int = HEADS, heads: int = HEADS, **options: Any) -> None:
    options = {"kv": kv, "heads": heads, **options}
    made = type("Decoder", (Decoder,), {"attention": options})
    known(name, heads=heads, kv_heads=kv)(made)


with_attention("attention written out", spelling="matmul")
with_attention("attention in einsum", spelling="einsum")
with_attention("grouped keys, expanded", kv=2)
with_attention("grouped keys, interleaved", kv=2, repeat="interleave")
with_attention("grouped keys, written out", kv=2, spelling="matmul")
with_attention("one key head", kv=1)
with_attention("one key head, written out", kv=1, spelling="matmul", rotary=True)
with_attention("query and key norms", qk_norm=True)
with_attention("query and key norms, rotary, grouped", kv=2, qk_norm=True, rotary=True)
with_attention("sinks", spelling="matmul", sinks=True)
with_attention("soft cap", spelling="matmul", cap=5.0)
with_attention("one head", heads=1, kv=1, spelling="matmul")
with_attention("no mask", masked=False)


def with_mlp(name: str, kind: str, mlp: Callable[[], nn.Module], norm: str = "layer") -> None:
    made = type("Decoder", (Decoder,), {"mlp": staticmethod(mlp), "norm": norm})
    known(name, blocks=(f"attention {kind}",) * BLOCKS)(made)


with_mlp("gated", "gated_mlp", Gated, "rms")
with_mlp("tanh gelu written out", "mlp", lambda: MLP(tanh_gelu), "rms_hand")
with_mlp("squared relu", "mlp", lambda: MLP(squared_relu), "layer_hand")


@known("post-norm", norms="after", final_norm=False)
class PostNorm(Decoder):
    def block(self, b: Any, x: Tensor) -> Tensor:
        x = b["n1"](x + b["attn"](x))
        return b["n2"](x + b["mlp"](x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for b in self.h:
            x = self.block(b, x)
        return self.head(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.g


@known("sandwich with scales", norms="both")
class Sandwich(Decoder):
    norm = "rms_hand"

    def more(self) -> dict[str, nn.Module]:
        return {"s1": Scale(), "s2": Scale()}

    def block(self, b: Any, x: Tensor) -> Tensor:
        x = x * 0.9 + b["s1"](b["n3"](b["attn"](b["n1"](x)))) * 0.22
        return 0.5 * b["s2"](b["n4"](b["mlp"](b["n2"](x)))) + x


@known("parallel", parallel=True)
class Parallel(Decoder):
    def block(self, b: Any, x: Tensor) -> Tensor:
        h = b["n1"](x)
        return x + b["attn"](h) + b["mlp"](h)


@known("parallel in brackets", parallel=True)
class ParallelBrackets(Decoder):
    def block(self, b: Any, x: Tensor) -> Tensor:
        return x + (b["attn"](b["n1"](x)) + b["mlp"](b["n2"](x)))


@known("parallel, the stream in the middle", parallel=True)
class ParallelMiddle(Decoder):
    norm = "rms"

    def block(self, b: Any, x: Tensor) -> Tensor:
        h = b["n1"](x)
        return (b["attn"](h) + x) + b["mlp"](h)


@known("x0 and value mixing, additive skips")
class Speedrun(Decoder):
    """As in speed runs: first stream and first values mixed in, and skips by addition."""

    norm = "rms"

    def __init__(self) -> None:
        super().__init__()
        self.lambdas = nn.Parameter(torch.ones(BLOCKS, 2))
        self.skip = nn.Parameter(torch.ones(BLOCKS))

    def embed(self, ids: Tensor) -> Tensor:
        return self.ln_f(super().embed(ids))

    def forward(self, ids: Tensor) -> Tensor:
        x = x0 = self.embed(ids)
        skips: list[Tensor] = []
        v1 = None
        for i, b in enumerate(self.h):
            if i >= BLOCKS // 2:
                x = x + self.skip[i] * skips.pop()
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0
            h = b["n1"](x)
            v = b["attn"].split(b["attn"].v(h))
            v1 = v if v1 is None else v1
            x = x + b["attn"](h, extra=None if i == 0 else v1)
            x = x + b["mlp"](b["n2"](x))
            if i < BLOCKS // 2:
                skips.append(x)
        return self.head(self.ln_f(x))


@known("skips by concatenation")
class Concatenated(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.join = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(BLOCKS // 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        skips = []
        for i, b in enumerate(self.h):
            if i >= BLOCKS // 2:
                x = self.join[i - BLOCKS // 2](torch.cat([x, skips.pop()], -1))
            x = self.block(b, x)
            if i < BLOCKS // 2:
                skips.append(x)
        return self.head(self.ln_f(x))
