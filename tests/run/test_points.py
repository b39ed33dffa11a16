"""Over models of many kinds: names are where the architecture says, and every one acts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from models import CASES, STRANGERS
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lensfx

# Some library modules are scripted where they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

# What may be absent: positions, rotary, the middle of a block, one copy for q, k and v.
NO_POS, NO_ROT, NO_MID, NO_SHARED = "hook_pos_embed", "hook_rot_", "hook_resid_mid", "hook_attn_in"
MODELS: dict[str, tuple[str, ...]] = {
    "hf_gpt2": (NO_ROT,),
    "hf_llama": (NO_POS, NO_SHARED),
    "hf_bert": (NO_ROT, "ln_final"),
    "nanogpt_targets": (NO_ROT,),
    "nanogpt_shared_block": (NO_ROT,),
    "nanogpt_scaled_embedding": (NO_ROT,),
    "llamalike": (NO_POS, NO_SHARED),
    "encdec": (NO_ROT, "ln_final"),
    "xt_decoder": (NO_ROT,),
    "xt_rotary": (NO_POS,),
    "norm_mul": (NO_ROT,),
    "no_norm": (NO_ROT, ".ln"),
    "einsum": (NO_ROT,),
    "in_place": (NO_ROT,),
    "gpt_x0_mixing": (NO_ROT,),
    "gpt_unet_skips": (NO_ROT,),
    "attn_rotary": (NO_POS,),
    "attn_qk_norm": (NO_POS,),
    "attn_grouped_sdpa": (NO_ROT, NO_SHARED),
    "attn_grouped_repeat": (NO_ROT, NO_SHARED),
    "attn_multi_query": (NO_ROT, NO_SHARED),
    "attn_sinks": (NO_ROT,),
    "attn_alibi": (NO_POS, NO_ROT),
    "attn_linear": (NO_ROT, ".attn."),
}
# These mix in something between two writes, so that the sums below are not theirs.
MIXED = ("gpt_x0_mixing", "gpt_unet_skips")
# These compute logits at the last position only.
SHORT = ("unembed.hook_in", "unembed.hook_out")


def case(name: str) -> Any:
    return CASES[name] if name in CASES else STRANGERS[name]


@cache
def model(name: str) -> Any:
    return case(name).build().eval()


@cache
def lens(name: str) -> lensfx.Lens:
    args, kwargs = case(name).inputs(2, 7, 0)
    return lensfx.wrap(model(name), *args, passes=None, verify=False, **kwargs)


@cache
def run(name: str, seed: int = 0, batch: int = 2) -> tuple[Any, Any]:
    args, kwargs = case(name).inputs(batch, 7, seed)
    with torch.no_grad():
        return lens(name).run_with_cache(*args, **kwargs)


def canonical(name: str) -> list[str]:
    return [n for n in lens(name).hook_names if ".hook_" in f".{n}"]


def floats(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(floats(a), floats(b), strict=True))


def change(value: Tensor, hook: lensfx.HookPoint) -> Tensor:
    """Differs from entry to entry, so that no norm undoes it; indices are put in another order."""
    if not value.is_floating_point():
        return value.flip(-1)
    steps = 7 * torch.arange(value[0].numel()) % 17
    return value * (0.2 + steps.to(value.dtype) / 10).reshape(value.shape[1:])


def prefixes(name: str) -> list[str]:
    found = [n.removesuffix(".hook_resid_pre") for n in canonical(name) if "resid_pre" in n]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_has_not_has_no_name(name: str) -> None:
    names = canonical(name)
    for absent in MODELS[name]:
        assert not [n for n in names if absent in n], absent
    assert "unembed.hook_out" in names
    for kind in (NO_POS, NO_ROT, NO_SHARED, NO_MID, ".attn.hook_pattern", ".attn.hook_result"):
        without = any(absent in kind or kind in absent for absent in MODELS[name])
        known = (name == "attn_linear" and "attn" in kind) or (
            name == "llamalike" and "rot" in kind
        )
        assert known or without != any(kind in n for n in names), kind
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in MIXED])
def test_the_stream_adds_up_bit_for_bit(name: str) -> None:
    _, kept = run(name)
    for at in prefixes(name):
        post_norm = name in ("hf_bert", "encdec")
        now, added = kept[f"{at}.hook_resid_pre"], 0
        for out, then in (
            ("hook_attn_out", "hook_resid_mid"),
            ("mixer.hook_out", "hook_resid_mid"),
            ("hook_cross_attn_out", "hook_resid_mid_cross"),
            ("hook_mlp_out", "hook_resid_post"),
        ):
            if f"{at}.{out}" not in kept:
                continue
            now, added = now + kept[f"{at}.{out}"], added + 1
            if f"{at}.{then}" in kept:
                assert torch.equal(now, kept[f"{at}.{then}"]), (at, then)
            if post_norm:
                break
        assert added, at


@pytest.mark.parametrize("name", MODELS)
def test_patching_the_whole_stream_recovers_the_clean_run(name: str) -> None:
    clean, kept = run(name)
    args, kwargs = case(name).inputs(2, 7, 0)
    other = next(i for i, a in enumerate(args) if not a.is_floating_point()) if args else None
    if other is None:
        key = next(k for k, v in kwargs.items() if "id" in k)
        kwargs = {**kwargs, key: kwargs[key].roll(1, -1)}
    else:
        args = (*args[:other], args[other].roll(1, -1), *args[other + 1 :])
    with torch.no_grad():
        corrupted = lens(name)(*args, **kwargs)
        assert not same(corrupted, clean)
        for site in canonical(name):
            if "encoder_blocks" in site or not site.startswith(("blocks", "decoder_blocks")):
                continue
            if not site.endswith(("resid_pre", "resid_mid", "resid_post")):
                continue
            if name in MIXED or name == "encdec":
                continue
            patch = [(site, lambda value, hook: kept[hook.name])]
            got = lens(name).run_with_hooks(*args, fwd_hooks=patch, **kwargs)
            assert same(got, clean), site


@pytest.mark.parametrize("name", MODELS)
def test_every_name_fires_once_and_an_edit_there_acts(name: str) -> None:
    args, kwargs = case(name).inputs(2, 7, 0)
    clean, _ = run(name)
    seen: list[str] = []

    def count(value: Tensor, hook: lensfx.HookPoint) -> None:
        seen.append(hook.name)

    with torch.no_grad():
        looked = lens(name).run_with_hooks(*args, fwd_hooks=[(canonical(name), count)], **kwargs)
        assert sorted(seen) == sorted(canonical(name))
        assert same(looked, clean)
        idle = [
            site
            for site in canonical(name)
            if same(lens(name).run_with_hooks(*args, fwd_hooks=[(site, change)], **kwargs), clean)
        ]
    assert idle == []


SHAPES = {
    "hook_embed": "bpd", "hook_pos_embed": "bpd", "hook_resid_pre": "bpd",
    "hook_resid_mid": "bpd", "hook_resid_post": "bpd", "hook_attn_out": "bpd",
    "hook_mlp_out": "bpd", "hook_mlp_in": "bpd", "hook_attn_in": "bphd", "hook_q_input": "bphd",
    "hook_k_input": "bpkd", "hook_v_input": "bpkd", "hook_scale": "bp1", "hook_normalized": "bpd",
    "hook_q": "bphe", "hook_rot_q": "bphe", "hook_k": "bpke", "hook_rot_k": "bpke",
    "hook_v": "bpke", "hook_z": "bphe", "hook_attn_scores": "bhps", "hook_pattern": "bhpp",
    "hook_result": "bphd", "hook_pre": "bpm", "hook_post": "bpm", "hook_pre_linear": "bpm",
    "hook_in": "bpd", "hook_out": "bp?",
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MODELS if n != "encdec"])
def test_shapes_are_those_of_the_table(name: str) -> None:
    _, kept = run(name)
    axes: dict[str, int] = {"b": 2, "p": 7, "1": 1, "s": 7}
    for site in canonical(name):
        letters = SHAPES[site.rpartition(".")[2]]
        shape = kept[site].shape
        assert len(shape) == len(letters), (site, shape)
        for letter, size in zip(letters, shape, strict=True):
            if letter != "?" and not (letter == "p" and site in SHORT and size == 1):
                assert axes.setdefault(letter, size) == size, (site, tuple(shape), axes)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "encdec"])
def test_positions_and_the_batch_are_cut_where_they_are(name: str) -> None:
    args, kwargs = case(name).inputs(1, 7, 0)
    with torch.no_grad():
        _, whole = lens(name).run_with_cache(*args, **kwargs)
        _, cut = lens(name).run_with_cache(*args, pos_slice=(1, 4), **kwargs)
        _, flat = lens(name).run_with_cache(*args, remove_batch_dim=True, **kwargs)
        _, last = lens(name).run_with_cache(*args, pos_slice=-1, remove_batch_dim=True, **kwargs)
    for site in canonical(name):
        axis = 2 if site.endswith(("scores", "pattern")) else 1
        if whole[site].shape[axis] != 7:
            assert site in SHORT
            continue
        assert torch.equal(cut[site], whole[site].narrow(axis, 1, 3)), site
        assert torch.equal(flat[site], whole[site].squeeze(0)), site
        assert torch.equal(last[site], whole[site].select(axis, -1).squeeze(0)), site
