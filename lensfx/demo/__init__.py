"""A small trained induction model, so that examples and tests need no download."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lensfx.demo.data import repeated_tokens
from lensfx.demo.model import InductionConfig, InductionTransformer

__all__ = ["InductionConfig", "InductionTransformer", "load", "repeated_tokens"]


def load(path: str | Path | None = None) -> InductionTransformer:
    """Return the trained induction model, in eval mode, in float32 on the CPU.

    `path` names another file that `examples/train_induction.py` has written; without it, the
    model that comes with the package is read.
    """
    if path is not None:
        return _read(Path(path))
    resource = resources.files(__name__).joinpath("induction.safetensors")
    with resources.as_file(resource) as packaged:
        return _read(packaged)


def _read(path: Path) -> InductionTransformer:
    with safe_open(str(path), framework="pt") as file:
        config = InductionConfig(**json.loads(file.metadata()["config"]))
    # The initial weights are thrown away, so drawing them must not move the caller's seed.
    with torch.random.fork_rng(devices=[]):
        model = InductionTransformer(config)
    model.load_state_dict(load_file(path))
    return model.eval()
