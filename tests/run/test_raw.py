"""Values of the rewritten model as the model itself has them, and directions the other way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from fixtures.models import BUILDERS, IDS
from models import CASES

import lensfx
from lensfx import LensError, UnknownNameError
from lensfx import passes as p

CANONICAL = (p.CanonicalLinear(), p.CanonicalNorm())
PIPELINES: dict[str, Any] = {
    "default": "default",
    "fold": (*CANONICAL, p.FoldNorm()),
    "writers": (*CANONICAL, p.FoldNorm(), p.CenterWriters()),
    "value bias": (*CANONICAL, p.FoldValueBias()),
    "key bias": (*CANONICAL, p.FoldKeyBias()),
    "rotated": (*CANONICAL, p.FoldNorm(), p.RotateStream(seed=0)),
    "refactored": (*CANONICAL, p.FoldNorm(), p.FoldValueBias(), p.RefactorAttention()),
}
MODELS = ("nanogpt", "llamalike", "llamalike_offset", "hf_gpt2", "hf_llama", "hf_bert")


@cache
def lens(name: str, passes: str = "default") -> lensfx.Lens:
    case = CASES[name]
    args, kwargs = case.inputs(2, 7, 0)
    return lensfx.wrap(case.build().double(), *args, passes=PIPELINES[passes], **kwargs)


def runs(name: str, passes: str) -> tuple[Any, Any, lensfx.Lens]:
    args, kwargs = CASES[name].inputs(3, 5, 1)
    found = lens(name, passes)
    _, now = found.run_with_cache(*args, **kwargs)
    _, was = found.raw.run_with_cache(*args, **kwargs)
    return now, was, found


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    # Some of the models normalise in float32, whatever their weights are.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("name", MODELS)
def test_every_raw_value_is_the_one_of_the_model(name: str, passes: str) -> None:
    now, was, found = runs(name, passes)
    names = [n for n in found.hook_names if "hook_" in n]
    assert len(names) > 20
    for hook in names:
        assert_close(now.raw(hook), was[hook])


@pytest.mark.parametrize("passes", PIPELINES)
def test_what_maps_back_maps_forth_again(passes: str) -> None:
    now, _, found = runs("nanogpt", passes)
    mapped, hints = 0, []
    for hook in (n for n in found.hook_names if "hook_" in n):
        try:
            back = found.from_raw(hook, found.to_raw(hook, now[hook]), kind="value")
        except LensError as error:
            hints.append(error.hint)
            continue
        mapped += 1
        assert_close(back, now[hook])
    assert mapped > 10
    assert all(hints)


def test_a_probe_reads_the_same_number() -> None:
    now, was, found = runs("nanogpt", "default")
    for hook in ("blocks.0.attn.hook_v", "blocks.1.ln1.hook_normalized", "unembed.hook_in"):
        probe = torch.randn(now[hook].shape[-1:], dtype=torch.float64)
        mapped = found.from_raw(hook, probe.expand(now[hook].shape[2:]), kind="probe")
        read = (was[hook] * probe).sum(-1)
        again = (now[hook] * mapped).sum(-1)
        # A shift of the value is a number the probe reads at every position alike.
        apart = read - again
        assert_close(apart, apart[:1, :1].expand_as(apart))


def test_a_direction_is_the_difference_of_two_values() -> None:
    now, was, found = runs("nanogpt", "default")
    for hook in ("blocks.0.hook_resid_post", "blocks.0.attn.hook_z", "unembed.hook_in"):
        direction = was[hook][:, 1:] - was[hook][:, :-1]
        if hook == "unembed.hook_in":
            # One of the gains that were folded away is 0.
            with pytest.raises(LensError, match="the gain that was folded away is 0"):
                found.from_raw(hook, direction)
            continue
        mapped = found.from_raw(hook, direction)
        assert_close(mapped, now[hook][:, 1:] - now[hook][:, :-1])


def test_a_slice_of_a_value_maps_as_well() -> None:
    args, _ = CASES["nanogpt"].inputs(1, 6, 2)
    found = lens("nanogpt")
    for options in ({"pos_slice": -1}, {"remove_batch_dim": True}, {"pos_slice": (1, 3)}):
        _, now = found.run_with_cache(*args, **options)
        _, was = found.raw.run_with_cache(*args, **options)
        for hook in ("hook_embed", "blocks.0.attn.hook_v", "blocks.1.hook_resid_mid"):
            assert_close(now.raw(hook), was[hook])


def test_a_lens_without_passes_is_its_own() -> None:
    case = CASES["nanogpt"]
    args, _ = case.inputs(2, 7, 0)
    plain = lensfx.wrap(case.build(), *args, passes=None)
    assert plain.raw is plain or plain.raw.hook_names == plain.hook_names
    _, cache = plain.run_with_cache(*args)
    value = cache["resid_post", 0]
    assert torch.equal(cache.raw("blocks.0.hook_resid_post"), value)
    assert torch.equal(plain.to_raw("blocks.0.hook_resid_post", value), value)


def test_what_cannot_be_told_is_said() -> None:
    found = lens("nanogpt")
    args, _ = CASES["nanogpt"].inputs(2, 7, 0)
    hook = "blocks.0.hook_resid_post"
    _, cache = found.run_with_cache(*args)
    with pytest.raises(LensError, match=r"was centred, and what was taken off cannot be told"):
        found.to_raw(hook, cache[hook])
    with found.hooks(fwd_hooks=[(hook, lambda value, hook: value * 2)]):
        _, edited = found.run_with_cache(*args)
    with pytest.raises(LensError, match="was centred") as caught:
        edited.raw(hook)
    assert "without hooks" in str(caught.value)
    ids = args[0].clone()
    _, cache = found.run_with_cache(ids)
    ids.zero_()
    with pytest.raises(LensError, match="the inputs were written to"):
        cache.raw(hook)


def test_bad_arguments() -> None:
    found = lens("nanogpt")
    hook = "blocks.0.attn.hook_v"
    with pytest.raises(UnknownNameError, match="there is no hook point 'resid'"):
        found.to_raw("resid", torch.zeros(3))
    with pytest.raises(LensError, match="kind='vector' is unknown"):
        found.from_raw(hook, torch.zeros(3), kind="vector")  # type: ignore[arg-type]
    with pytest.raises(LensError, match="ends in axes of sizes"):
        found.to_raw(hook, torch.zeros(2, 3))
    with pytest.raises(LensError, match="from a tensor of real numbers, not from list"):
        found.to_raw(hook, [1.0])  # type: ignore[arg-type]


def test_figures_of_the_rewritten_model_are_those_of_the_model() -> None:
    """What a dictionary trained on the model's own stream reads, out of the rewritten one."""
    model = BUILDERS["gpt2"](attention="sdpa").double()
    found = lensfx.wrap(model, IDS, use_cache=False)
    seen: list[torch.Tensor] = []
    model.transformer.h[0].register_forward_hook(
        lambda module, given, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(IDS)
        encoder = torch.randn(seen[0].shape[-1], 96, dtype=torch.float64)
        want = torch.relu(seen[0] @ encoder)
    _, cache = found.run_with_cache(IDS)
    assert not torch.allclose(torch.relu(cache["resid_post", 0] @ encoder), want)
    assert_close(torch.relu(cache.raw("resid_post", 0) @ encoder), want)
