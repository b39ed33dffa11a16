"""Random models from a grammar of streams: what is found is what they were built with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.structures import MLP, WIDTH, Attention, Gated, Norm, squared_relu, tanh_gelu
from torch import Tensor, nn

import lensfx
from lensfx.analysis.structure import structure

NORMS = ("layer", "rms", "layer_hand", "rms_hand")
PLACES = ("before", "after", "both", "none")
ORDERS = ("in turn", "beside", "around", "attention")
BRACKETS = ("x+(a+m)", "(x+a)+m", "(a+m)+x", "a+(x+m)", "(m+x)+a")
CARRIES = ("plain", "plain", "scaled", "shared", "minus", "gate", "gated both")
KINDS = {"mlp": (MLP, lambda: MLP(tanh_gelu), lambda: MLP(squared_relu)), "gated_mlp": (Gated,)}


@dataclass(frozen=True)
class Layer:
    """One block: heads, spelling and noise are its own, its form is that of the model."""

    heads: int
    kv: int
    attention: dict[str, Any]
    mlp: str
    make: int
    bracket: str
    noise: int


@dataclass(frozen=True)
class Sentence:
    """One model of the grammar."""

    norm: str
    place: str
    order: str
    carry: str
    positions: str
    layers: tuple[Layer, ...]

    @property
    def blocks(self) -> list[str]:
        """What is to be found."""
        forms = {"around": "{0} attention {0}", "attention": "attention"}
        return [forms.get(self.order, "attention {0}").format(layer.mlp) for layer in self.layers]


def sentence(source: random.Random) -> Sentence:
    pick = source.choice
    layers = []
    for _ in range(pick((2, 3))):
        heads = pick((1, 2, 4))
        spelling = pick(("sdpa", "matmul", "einsum"))
        attention = {
            "spelling": spelling,
            "rotary": pick((True, False)),
            "qk_norm": pick((True, False, False)),
            "repeat": pick(("expand", "interleave")),
            "cap": pick((0.0, 5.0)) if spelling != "sdpa" else 0.0,
            "sinks": pick((True, False)) if spelling == "matmul" else False,
            "masked": pick((True, True, False)),
        }
        kv = pick([k for k in (1, 2, 4) if heads % k == 0])
        mlp = pick(("mlp", "gated_mlp"))
        noise = source.getrandbits(24)
        layers.append(Layer(heads, kv, attention, mlp, pick(range(9)), pick(BRACKETS), noise))
    carry, order = pick(CARRIES), pick(ORDERS)
    place = pick(PLACES)
    return Sentence(
        pick(NORMS),
        place,
        order,
        carry,
        pick(("learned", "sines", "none", "normed")),
        tuple(layers),
    )


class Block(nn.Module):
    def __init__(self, s: Sentence, layer: Layer) -> None:
        super().__init__()
        self.s, self.layer = s, layer
        self.attn = Attention(heads=layer.heads, kv=layer.kv, **layer.attention)
        makes = KINDS[layer.mlp]
        self.mlp, self.mlp0 = (makes[layer.make % len(makes)]() for _ in range(2))
        self.norms = nn.ModuleList(Norm(s.norm) for _ in range(6))
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.bits = iter(self.layer.noise >> i & 1 for i in range(99))
        order = self.s.order
        if order == "beside":
            return self.noise(self.beside(x))
        if order == "around":
            x = self.write(x, self.mlp0, 4)
        x = self.write(x, self.attn, 0)
        return x if order == "attention" else self.write(x, self.mlp, 2)

    def branch(self, x: Tensor, part: nn.Module, i: int) -> Tensor:
        place = self.s.place
        h = part(self.norms[i](x) if place in ("before", "both") else x)
        return self.noise(self.norms[i + 1](h) if place == "both" else h)

    def write(self, x: Tensor, part: nn.Module, i: int) -> Tensor:
        f, kept = self.branch(x, part, i), self.noise(x)
        if self.s.carry == "scaled":
            f = f * self.scale
        elif self.s.carry == "shared":
            kept, f = kept * 0.7, f * 0.3
        elif self.s.carry == "gate":
            f = f * torch.sigmoid(self.scale)
        elif self.s.carry == "gated both":
            g = torch.sigmoid(self.gate(x))
            kept, f = kept * (1 - g), g * f
        if self.s.carry == "minus":
            return self.after(kept - f, i)
        return self.after(f + kept if next(self.bits, 0) else kept + f, i)

    def after(self, x: Tensor, i: int) -> Tensor:
        return self.noise(self.norms[i](x) if self.s.place == "after" else x)

    def beside(self, x: Tensor) -> Tensor:
        a, m, b = self.branch(x, self.attn, 0), self.branch(x, self.mlp, 2), self.layer.bracket
        if b == "x+(a+m)":
            y = x + (a + m)
        elif b == "(x+a)+m":
            y = (x + a) + m
        elif b == "(a+m)+x":
            y = (a + m) + x
        else:
            y = a + (x + m) if b == "a+(x+m)" else (m + x) + a
        return self.norms[0](y) if self.s.place == "after" else y

    def noise(self, x: Tensor) -> Tensor:
        """What changes nothing: casts, views, a number."""
        if next(self.bits, 0):
            x = x.to(torch.float64).to(x.dtype)
        if next(self.bits, 0):
            x = x.reshape(-1, WIDTH).reshape(x.shape)
        if next(self.bits, 0):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return x.unsqueeze(1).squeeze(1) * 1.0 if next(self.bits, 0) else x


class Model(nn.Module):
    def __init__(self, s: Sentence) -> None:
        super().__init__()
        self.s, self.wte, self.wpe = s, nn.Embedding(WIDTH, WIDTH), nn.Embedding(16, WIDTH)
        self.h = nn.ModuleList(Block(s, layer) for layer in s.layers)
        self.ln_e, self.ln_f = Norm(s.norm), Norm(s.norm)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, at = self.wte(ids), torch.arange(ids.shape[1])
        if self.s.positions in ("learned", "normed"):
            x = x + self.wpe(at)
        elif self.s.positions == "sines":
            x = x * WIDTH**0.5 + torch.sin(at[:, None] / 10.0 ** torch.arange(WIDTH))
        if self.s.positions == "normed":
            x = self.ln_e(x)
        for block in self.h:
            x = block(x)
        return self.head(x if self.s.place == "after" else self.ln_f(x))


def built(s: Sentence) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(s)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p.dim() < 2) + torch.randn_like(p) * 0.3)
    return model.eval()


def assert_found(s: Sentence) -> None:
    ids = torch.randint(0, WIDTH, (3, 5), generator=torch.Generator().manual_seed(0))
    found = structure(lensfx.capture(built(s), ids))
    assert found.complete, s
    assert [" ".join(sorted(w.kind for w in b.writes)) for b in found.blocks] == [
        " ".join(sorted(b.split())) for b in s.blocks
    ], s
    attns = [a for b in found.blocks for w in b.writes for a in w.attention]
    assert [(a.heads, a.kv_heads) for a in attns] == [(x.heads, x.kv) for x in s.layers], s
    assert [a.rot_q is not None for a in attns] == [x.attention["rotary"] for x in s.layers], s
    assert {b.parallel for b in found.blocks} == {s.order == "beside"}, s
    wanted = [] if s.positions == "none" else ["position"]
    assert [e.kind for e in found.embeddings] == ["token", *wanted], s
    writes = [w for b in found.blocks for w in b.writes]
    # A norm behind a branch is not looked for behind a gate of what is written.
    gated = s.carry == "gated both" and s.order != "beside"
    norms = {
        "before": (True, False, False),
        "both": (True, not gated, False),
        "none": (False, False, False),
    }
    if s.place in norms:
        have = {tuple(n is not None for n in (w.norm, w.norm_out, w.norm_after)) for w in writes}
        assert have == {norms[s.place]}, s
    else:
        assert all(w.norm_after is not None for b in found.blocks for w in b.writes[-1:]), s
    sign = -1.0 if s.carry == "minus" and s.order != "beside" else 1.0
    assert {w.sign for w in writes} == {sign}, s


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_what_was_built_is_found(seed: int) -> None:
    assert_found(sentence(random.Random(seed)))
