"""Values and edits at the canonical names are those of an independent implementation of them.

The figures in tests/fixtures were made once, with a library that is not needed here; what each
name means there is written in fixtures/make.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import fixtures
import pytest
import torch
from fixtures.models import BUILDERS, EDITS, IDS
from safetensors.torch import load_file
from torch import Tensor

import lensfx

MODELS = tuple(BUILDERS)
# What float32 allows after two layers of random weights: logits are of the order of 10.
ATOL = 5e-5
# What the figures were made with.
FOLDED = lensfx.Pipeline.default(center_writing_weights=False, fold_value_biases=False).passes
# Folding moves a gain from the final norm into the head, and centring a number from the logits.
MOVED = ("unembed.hook_in", "unembed.hook_out")


@cache
def figures(name: str) -> dict[str, Tensor]:
    return load_file(Path(fixtures.__file__).with_name(f"{name}.safetensors"))


@cache
def lens(name: str, attention: str, folded: bool) -> lensfx.Lens:
    passes = FOLDED if folded else None
    model = BUILDERS[name](attention=attention)
    return lensfx.wrap(model, IDS, passes=passes, verify=False, use_cache=False)


def named(name: str, kind: str) -> list[str]:
    return [key.removeprefix(f"{kind}/") for key in figures(name) if key.startswith(f"{kind}/")]


def masked(value: Tensor) -> Tensor:
    """Where a score is masked: some models mask with the least number there is."""
    return value < -1e30


def far(got: Tensor, want: Tensor) -> float:
    """The largest difference, beside masked scores, which have to be masked in both."""
    if got.shape != want.shape or not torch.equal(masked(got), masked(want)):
        return float("inf")
    return float((got - want).masked_fill(masked(want), 0).abs().max())


@pytest.mark.parametrize("folded", [False, True], ids=["raw", "folded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_the_reference_one(name: str, attention: str, folded: bool) -> None:
    found = lens(name, attention, folded)
    with torch.no_grad():
        out, kept = found.run_with_cache(IDS)
    want, expected = figures(name), named(name, "value")
    canonical = [n for n in found.hook_names if "hook_" in n]
    assert sorted(canonical) == sorted(expected)
    compared = [n for n in expected if not folded or n not in MOVED]
    wrong = {n: far(kept[n], want[f"value/{n}"]) for n in compared}
    assert {n: d for n, d in wrong.items() if not d <= ATOL} == {}
    assert far(out.logits.log_softmax(-1), want["logits"].log_softmax(-1)) <= ATOL
    if folded:
        assert torch.equal(kept["unembed.hook_in"], kept["ln_final.hook_normalized"])
        logits = kept["unembed.hook_out"].log_softmax(-1)
        assert far(logits, want["value/unembed.hook_out"].log_softmax(-1)) <= ATOL
    else:
        assert far(out.logits, want["logits"]) <= ATOL


def edited(found: lensfx.Lens, name: str, kind: str) -> Tensor:
    """The logits after an edit, which leaves masked scores as they are."""

    def edit(value: Tensor, hook: lensfx.HookPoint) -> Tensor:
        if not name.endswith("hook_attn_scores"):
            return EDITS[kind](value)
        return torch.where(masked(value), value, EDITS[kind](value))

    with torch.no_grad():
        return found.run_with_hooks(IDS, fwd_hooks=[(name, edit)]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("name", MODELS)
def test_every_edit_does_what_it_does_in_the_reference(name: str, kind: str) -> None:
    found, want = lens(name, "sdpa", False), figures(name)
    wrong = {n: far(edited(found, n, kind), want[f"{kind}/{n}"]) for n in named(name, kind)}
    assert {n: d for n, d in wrong.items() if not d <= 2 * ATOL} == {}
    assert len(wrong) >= 45


@pytest.mark.parametrize("name", MODELS)
def test_edits_inside_attention_that_is_written_out(name: str) -> None:
    found, want = lens(name, "eager", False), figures(name)
    for kind in EDITS:
        inside = [n for n in named(name, kind) if ".attn." in n or "_input" in n or "attn_in" in n]
        wrong = {n: far(edited(found, n, kind), want[f"{kind}/{n}"]) for n in inside}
        assert {n: d for n, d in wrong.items() if not d <= 2 * ATOL} == {}
        assert len(wrong) >= 20


@pytest.mark.parametrize("name", MODELS)
def test_edits_of_a_folded_model(name: str) -> None:
    found, want = lens(name, "sdpa", True), figures(name)
    wrong = {}
    for site in set(named(name, "tilt")) - set(MOVED):
        got = edited(found, site, "tilt").log_softmax(-1)
        wrong[site] = far(got, want[f"tilt/{site}"].log_softmax(-1))
    assert {n: d for n, d in wrong.items() if not d <= 2 * ATOL} == {}


def test_the_figures_tell_names_apart() -> None:
    """A test of the test: no edit of one model may do nothing, nor the same as another's."""
    for name in MODELS:
        want = figures(name)
        tilted = {n: want[f"tilt/{n}"] for n in named(name, "tilt")}
        assert all(far(logits, want["logits"]) > 100 * ATOL for logits in tilted.values())
        # The stream after a block is the one before the next; without positions the embedding too.
        same = {"blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "hook_embed"}
        same |= {n for n in tilted if n.endswith(("hook_scale", "hook_in", "hook_attn_in"))}
        # A factor of a product is tilted as the product is.
        same |= {n for n in tilted if n.endswith("hook_pre_linear")}
        apart = [n for n in tilted if n not in same and "_normalized" not in n]
        close = [
            (a, b)
            for i, a in enumerate(apart)
            for b in apart[:i]
            if far(tilted[a], tilted[b]) <= 4 * ATOL
        ]
        assert close == [], name
