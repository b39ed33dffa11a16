"""What a stranger's model is: somebody's own code, and what capturing it has to come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .case import Inputs, token_ids

__all__ = ["ANY", "ONE_LENGTH", "VOCAB", "Shapes", "Stranger", "floats", "ids_only", "vectors"]

Shapes = tuple[tuple[int, int], ...]
ANY: Shapes = ((2, 7), (3, 11), (1, 1))
ONE_LENGTH: Shapes = ((2, 7), (3, 7), (1, 7))
VOCAB = 31
WIDTH = 16


@dataclass(frozen=True)
class Stranger:
    """A model, calls of it, and whether it is captured, branches, needs an opaque op, is refused.

    `shapes` are the sizes (batch, length) at which the capture is compared; the first is the
    example. The calls of a branching model may take different paths.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    expect: Literal["captured", "branch", "opaque", "refused"] = "captured"
    refused_by: str = ""
    note: str = ""
    shapes: Shapes = ANY


def floats(*shape: int, seed: int) -> Tensor:
    """Normal noise, the same for the same arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids_only(batch: int, length: int, seed: int) -> Inputs:
    """One argument: token ids."""
    return (token_ids(batch, length, seed, VOCAB),), {}


def vectors(batch: int, length: int, seed: int) -> Inputs:
    """One argument: a batch of sequences of vectors."""
    return (floats(batch, length, WIDTH, seed=seed),), {}
