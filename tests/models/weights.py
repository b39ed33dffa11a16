"""Weights that are not simply there: parametrised, low-rank, generated, shared, hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .case import builder
from .stranger import VOCAB, WIDTH, Stranger, ids_only, vectors
from .trunk import GPT, MLP, Attention, Block


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).transpose(-1, -2)


class Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.b = nn.Linear(WIDTH, WIDTH)
        parametrize.register_parametrization(self.b, "weight", Symmetric())
        self.c = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x))))


class SpectralNorm(nn.Module):
    """In eval mode the power iteration stands still, and the quotient is computed all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(WIDTH, 12))
        self.second = nn.utils.spectral_norm(nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.softplus(self.first(x)))


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, r: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / 4)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling, self.merged = alpha / r, False

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.merged:
            out = out + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling
        return out


def with_lora() -> nn.Module:
    model = GPT()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("c_attn", "c_fc"):
                setattr(module, name, LoRALinear(child))
    return model


class HyperNetwork(nn.Module):
    """The first token's vector says what the weights of the layer are, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(WIDTH, WIDTH * 4 + 4 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.make(self.norm(x[:, 0])).split(WIDTH * 4, dim=-1)
        h = torch.bmm(x, down.view(-1, WIDTH, 4)).tanh()
        return x + torch.matmul(h, up.reshape(-1, 4, WIDTH))


class GeneratedWeights(nn.Module):
    """Layers whose weights are made, in forward, of one small bank; nothing of it is input."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)
        self.mix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("lb,bio->lio", self.mix.softmax(-1), self.bank)
        for W in weights:
            x = x + torch.relu(x @ W) @ W.T
        return x


class Universal(GPT):
    """One block, applied as often as it says, with a vector that tells it which time it is."""

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.step = nn.Embedding(3, WIDTH)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        for i in range(3):
            x = self.h[0](x + self.step.weight[i])
        return self.lm_head(self.ln_f(x))


class SharedBranches(nn.Module):
    """One module, owned under three names, read by two branches."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.left = nn.Sequential(shared, nn.Tanh())
        self.right = nn.Sequential(nn.LayerNorm(WIDTH), shared)
        self.alias = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x) + self.alias(x.flip(1))


class StackedWeights(nn.Module):
    """All layers of a kind in one parameter, looped over by index."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 2, WIDTH, WIDTH) / 4)
        self.b = nn.Parameter(torch.zeros(3, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.W.shape[0]):
            w1, w2 = self.W[i]
            x = x + F.linear(torch.addmm(self.b[i], x.flatten(0, 1), w1).relu(), w2).view_as(x)
        return x


class Quantised(nn.Module):
    """Weights kept as int8 with a scale, made floating point in forward; straight-through acts."""

    def __init__(self) -> None:
        super().__init__()
        w = torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8)
        self.register_buffer("qweight", w)
        self.scales = nn.Parameter(torch.rand(WIDTH, 1) / 300)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.qweight.to(x.dtype) * self.scales)
        return y + (torch.round(y * 8) / 8 - y).detach()


class Ensemble(nn.Module):
    """Four copies run as one by vmap over their stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, WIDTH, WIDTH) / 4)
        self.g = nn.Parameter(torch.ones(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        def one(w: Tensor, g: Tensor) -> Tensor:
            return torch.tanh(x @ w) * g

        return torch.vmap(one)(self.w, self.g).mean(0)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


def with_hooks() -> nn.Module:
    """Somebody else steers this model already."""
    model = GPT()

    def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.1 * output.mean(-1, keepdim=True)

    def swap(module: nn.Module, args: tuple[Tensor], kwargs: Any) -> Any:
        return (args[0] * 1.5,), kwargs

    model.h[0].mlp.register_forward_hook(steer)
    model.h[1].register_forward_pre_hook(swap, with_kwargs=True)
    model.register_forward_hook(lambda m, a, out: {"logits": out})
    return model


class AutocastInside(nn.Module):
    """An island of bfloat16 that the code itself asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.head = Attention(), MLP(), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + self.mlp(x)
        return self.head(x.float() + self.attn(x.float()))


def _one(name: str, factory: Callable[[], nn.Module], **more: Any) -> Stranger:
    return Stranger(name, builder(factory), more.pop("inputs", vectors), **more)


STRANGERS = [
    _one("parametrised", Parametrised),
    _one("spectral_norm", SpectralNorm),
    _one("lora", with_lora, inputs=ids_only),
    _one("hypernetwork", HyperNetwork),
    _one("generated_weights", GeneratedWeights),
    _one("universal", Universal, inputs=ids_only),
    _one("shared_branches", SharedBranches),
    _one("stacked_weights", StackedWeights),
    _one("quantised", Quantised),
    _one("vmap_ensemble", Ensemble, expect="refused", refused_by="vmap hides an axis"),
    _one("checkpointed", Checkpointed),
    _one("hooked", with_hooks, inputs=ids_only),
    _one("autocast_inside", AutocastInside),
]
