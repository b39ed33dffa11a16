"""Weights after each step of processing are those of an independent implementation of it.

The figures in tests/fixtures were made once, with a library that is not needed here; what each
step is there is written in fixtures/make_processed.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import fixtures
import pytest
import torch
from fixtures.models import BUILDERS, IDS
from safetensors.torch import load_file
from torch import Tensor

import lensfx
from lensfx import passes as p

ATOL = 1e-6
FOLD = (p.CanonicalLinear(), p.CanonicalNorm(), p.FoldNorm())
STEPS = {
    "fold": FOLD,
    "writers": (*FOLD, p.CenterWriters()),
    "unembed": (*FOLD, p.CenterWriters(), p.CenterUnembed()),
    "values": (*FOLD, p.CenterWriters(), p.CenterUnembed(), p.FoldValueBias()),
}
NORMS = (".ln1.", ".ln2.", "ln_final.")


@cache
def figures(name: str) -> dict[str, Tensor]:
    return load_file(Path(fixtures.__file__).with_name(f"processed_{name}.safetensors"))


@cache
def lens(name: str, step: str) -> lensfx.Lens:
    model = BUILDERS[name](attention="sdpa")
    return lensfx.wrap(model, IDS, passes=STEPS[step], verify=False, use_cache=False)


def changed(name: str) -> dict[str, str]:
    """The last step that changed each weight, by the reference's name of the weight."""
    found = {}
    for step in STEPS:
        for key in figures(name):
            label, _, weight = key.partition("/")
            if label == step and not any(norm in weight for norm in NORMS):
                found[f"{step}/{weight}"] = step
    return found


def ours(name: str, key: str) -> Tensor:
    step, _, weight = key.partition("/")
    parts = weight.split(".")
    stacked = getattr(lens(name, step), parts[-1].lstrip("_"))
    value: Tensor = stacked[int(parts[1])] if parts[0] == "blocks" else stacked
    return value


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in BUILDERS for key in changed(name)]
)
def test_a_processed_weight_is_the_reference_one(name: str, key: str) -> None:
    want = figures(name)[key]
    # A bias that is none is all zeros there.
    got = ours(name, key) if want.any() else torch.zeros_like(want)
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_step_the_reference_takes_was_compared(name: str) -> None:
    steps = {key.partition("/")[0] for key in changed(name)}
    assert steps == ({"fold", "unembed"} if name == "llama" else set(STEPS))
