"""What a test model is, and how its parameters are moved off their initial values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_GAIN_LEAF = re.compile(r"(^|_)(g|gain|gamma)(_|\d|$)")
_NORM_PATH = re.compile(r"norm|(^|[._])ln", re.IGNORECASE)
_EMBEDDING_NAME = re.compile(r"emb|wte|wpe", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """A tiny model: how to build it, how a user of it would call it, and what is in it.

    `build()` is seeded and leaves the global generator alone; `inputs(batch, length, seed)` gives
    the positional and keyword arguments of one call.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    norm: Literal["pre", "post", "none"]
    has_head: bool
    max_length: int


def builder(factory: Callable[[], nn.Module], seed: int = 0) -> Callable[[], nn.Module]:
    """A `Case.build` that calls `factory` and randomises what it returns."""

    def build() -> nn.Module:
        # `randomise` keeps the scale that an initialiser drew, so that draw has to be seeded too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = factory()
        return randomise(model, seed).eval()

    return build


def token_ids(batch: int, length: int, seed: int, vocab: int, low: int = 0) -> Tensor:
    """Ids in `low..vocab - 1`, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, vocab, (batch, length), generator=generator)


def padding_mask(batch: int, length: int) -> Tensor:
    """Ones, and zeros over the last third of every second row; position 0 is never padded."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1::2, length - length // 3 :] = 0
    return mask


@torch.no_grad()
def randomise(model: Model, seed: int) -> Model:
    """Redraw every floating parameter in place, so that no gain is 1 and no bias is 0.

    A rewrite that forgets a gain or a bias goes unnoticed on a freshly initialised model. Gains
    are drawn around 1, with a negative and an exactly zero entry, which a rewrite that divides by
    a gain must survive. Buffers keep their values, except for BatchNorm's running statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    owners = {
        id(parameter): module
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }
    # A tied parameter is listed once and written in place, which keeps it tied.
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            drawn = _redraw(name, parameter, owners[id(parameter)], generator)
            parameter.copy_(drawn.reshape(parameter.shape))
    for module in model.modules():
        statistics = dict(module.named_buffers(recurse=False))
        if {"running_mean", "running_var"} <= statistics.keys():
            mean, variance = statistics["running_mean"], statistics["running_var"]
            mean.copy_(0.2 * torch.randn(mean.shape, generator=generator))
            variance.copy_(0.5 + torch.rand(variance.shape, generator=generator))
    return model


def _redraw(
    name: str, parameter: nn.Parameter, owner: nn.Module, generator: torch.Generator
) -> Tensor:
    size = parameter.numel()
    normal = torch.randn(size, generator=generator)
    if _is_gain(name, parameter, owner):
        # A norm that scales by 1 + weight keeps weights around 0: it is the sum that has to be
        # around 1. The mean tells which of the two this is, also on a second call.
        centre = 0.0 if float(parameter.float().mean()) < 0.5 else 1.0
        gain = 1.0 + 0.3 * normal
        if size >= 8:
            zero, negative = torch.randperm(size, generator=generator)[:2].tolist()
            gain[zero] = 0.0
            gain[negative] = -0.3 - gain[negative].abs()
        return gain + (centre - 1.0)
    if parameter.dim() < 2:
        return 0.15 * normal
    std = float(parameter.float().std())
    if isinstance(owner, nn.Embedding) or _EMBEDDING_NAME.search(name):
        low, high = 0.3, 1.0
    else:
        # The geometric mean of fan in and fan out, because a raw parameter does not say which of
        # its axes is which.
        fan = math.sqrt(size)
        low, high = 0.5 / math.sqrt(fan), 4.0 / math.sqrt(fan)
    return min(max(std, low), high) * normal


def _is_gain(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    if bool((parameter == 1).all()):
        return True
    leaf = name.rpartition(".")[2]
    if _GAIN_LEAF.search(leaf):
        return True
    in_norm = "norm" in type(owner).__name__.lower() or _NORM_PATH.search(name) is not None
    return parameter.dim() == 1 and in_norm and leaf in ("weight", "scale")
