"""The analyses of a cache: another library's figures, the sums they must keep, and refusals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models import BUILDERS, IDS
from safetensors.torch import load_file
from torch import Tensor

import lensfx
from lensfx import ActivationCache, Lens, LensError

FOLDER = Path(__file__).resolve().parents[1] / "fixtures"
MODELS = tuple(BUILDERS)
# What the figures were made with.
FOLDED = lensfx.Pipeline.default(center_writing_weights=False, fold_value_biases=False).passes
PLAIN = ("accumulated_resid", "decompose_resid", "decompose_resid.attn", "stack_head_results")


@cache
def reference(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"analyses_{name}.safetensors")


@cache
def run(name: str, folded: bool, attention: str = "sdpa") -> tuple[Lens, Tensor, ActivationCache]:
    model = BUILDERS[name](attention)
    lens = lensfx.wrap(
        model, input_ids=IDS, use_cache=False, passes=FOLDED if folded else None, verify=False
    )
    with torch.no_grad():
        out, kept = lens.run_with_cache(input_ids=IDS, use_cache=False)
    return lens, out.logits, kept


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def made(lens: Lens, kept: ActivationCache, key: str) -> Tensor:
    """What an analysis gives, called as fixtures.make_analyses calls it."""
    parallel = lens.cfg.parallel_attn_mlp
    others = {"incorrect_tokens": torch.tensor([1, 2]), "pos_slice": -1}
    heads = kept.stack_head_results(pos_slice=-1)
    calls: dict[str, Any] = {
        "accumulated_resid": lambda: kept.accumulated_resid(incl_mid=not parallel),
        "accumulated_resid.ln": lambda: kept.accumulated_resid(apply_ln=True),
        "decompose_resid": kept.decompose_resid,
        "decompose_resid.attn": lambda: kept.decompose_resid(mode="attn", layer=1),
        "stack_head_results": lambda: kept.stack_head_results(incl_remainder=True),
        "stack_neuron_results": lambda: kept.stack_neuron_results(-1, pos_slice=-1),
        "full": lambda: kept.get_full_resid_decomposition(expand_neurons=False),
        "accumulated_bias": lambda: lens.accumulated_bias(2),
        "directions": lambda: lens.tokens_to_residual_directions(IDS),
        "decompose_resid.ln": lambda: kept.decompose_resid(apply_ln=True),
        "decompose_resid.ln1": lambda: kept.decompose_resid(layer=1, apply_ln=True),
        "logit_attrs": lambda: kept.logit_attrs(kept.decompose_resid(), IDS),
        "logit_attrs.difference": lambda: kept.logit_attrs(heads, torch.tensor([5, 6]), **others),
    }
    with torch.no_grad():
        found: Tensor = calls[key]()
    return found


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_another_librarys_figures(name: str, folded: bool) -> None:
    lens, _, kept = run(name, folded)
    keys = [k for k in reference(name) if k.startswith("folded/") == folded and "weight" not in k]
    assert len(keys) >= 9
    for key in keys:
        short = key.removeprefix("folded/")
        if folded and short == "directions":
            # Directions are told apart only up to what centring in a norm takes away.
            close(*(_centred(lens, d) for d in (made(lens, kept, short), reference(name)[key])))
        else:
            close(made(lens, kept, short), reference(name)[key])


def _centred(lens: Lens, directions: Tensor) -> Tensor:
    rms = lens.cfg.final_rms
    return directions if rms else directions - directions.mean(-1, keepdim=True)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_to_the_stream_and_to_the_logits(name: str, folded: bool) -> None:
    lens, logits, kept = run(name, folded)
    end = kept["resid_post", -1]
    with torch.no_grad():
        close(kept.decompose_resid().sum(0), end)
        close(kept.stack_head_results(incl_remainder=True).sum(0), end)
        close(kept.get_full_resid_decomposition().sum(0), end)
        for layer in range(2):
            heads = kept.stack_head_results(layer + 1)[4 * layer :].sum(0)
            close(heads + lens.b_O[layer], kept["attn_out", layer])
            close(
                kept.get_neuron_results(layer).sum(-2) + lens.b_out[layer], kept["mlp_out", layer]
            )
        bias = lens.ln_final.b
        constant = lens.b_U if bias is None else lens.b_U + bias @ lens.W_U
        attributed = kept.logit_attrs(kept.decompose_resid(), IDS).sum(0) + constant[IDS]
        close(attributed, logits.gather(-1, IDS[..., None])[..., 0])
        close(lens.unembed(kept.accumulated_resid(apply_ln=True)[-1]), logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_projection_is_what_projecting_the_rows_gives(name: str) -> None:
    _, _, kept = run(name, False)
    for onto in (torch.randn(32, 3), torch.randn(32)):
        with torch.no_grad():
            for given in ({}, {"apply_ln": True}, {"apply_ln": True, "layer": 1, "pos_slice": -1}):
                whole = kept.get_full_resid_decomposition(**given)
                close(
                    kept.get_full_resid_decomposition(**given, project_output_onto=onto),
                    whole @ onto,
                )
            one = kept.get_neuron_results(1, neuron_slice=3)
            close(kept.get_neuron_results(1, neuron_slice=3, project_output_onto=onto), one @ onto)


def test_labels_name_the_rows() -> None:
    _, _, kept = run("gpt2", False)
    _, labels = kept.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
    _, labels = kept.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    _, labels = kept.decompose_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out"]
    _, labels = kept.decompose_resid(mode="mlp", incl_embeds=False, return_labels=True)
    assert labels == ["0_mlp_out", "1_mlp_out"]
    _, labels = kept.stack_head_results(1, return_labels=True, incl_remainder=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "remainder"]
    _, labels = kept.get_full_resid_decomposition(0, return_labels=True)
    assert labels == ["embed", "pos_embed", "bias"]
    _, labels = kept.stack_neuron_results(1, neuron_slice=(4, 6), return_labels=True)
    assert labels == ["L0N4", "L0N5"]


def test_parallel_attention_is_no_input_of_its_mlp() -> None:
    _, _, kept = run("neox", False)
    stack = kept.decompose_resid(1, mlp_input=True)
    close(stack.sum(0), kept["resid_pre", 1])


def test_slices_and_batches() -> None:
    _, _, kept = run("llama", False)
    stack = kept.decompose_resid(pos_slice=-1)
    assert stack.shape == (5, 2, 32)
    close(
        kept.logit_attrs(stack, IDS[:, 0], pos_slice=-1),
        kept.logit_attrs(kept.decompose_resid(), IDS[:, 0])[..., -1],
    )
    one = kept.apply_slice_to_batch_dim(0)
    assert not one.has_batch_dim
    close(
        one.logit_attrs(one.decompose_resid(), IDS[0]),
        kept.logit_attrs(kept.decompose_resid(), IDS)[:, 0],
    )
    with pytest.raises(LensError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    assert kept.stack_activation("pattern").shape == (2, 2, 4, 7, 7)
    assert kept.stack_activation("scale", -1, "ln1").shape == (2, 2, 7, 1)
    fresh = kept.apply_slice_to_batch_dim((0, 1))
    fresh.compute_head_results()
    assert fresh["result", 1].shape == (1, 7, 4, 32)


def test_what_cannot_be_told_is_an_error() -> None:
    _, _, kept = run("gpt2", False)
    stack = kept.decompose_resid()
    with pytest.raises(LensError, match="layer=5, but there are 2 blocks"):
        kept.decompose_resid(5)
    with pytest.raises(LensError, match="mode='heads' is unknown"):
        kept.decompose_resid(mode="heads")
    with pytest.raises(LensError, match="nothing to stack"):
        kept.stack_head_results(0)
    with pytest.raises(LensError, match="one incorrect token for each token"):
        kept.logit_attrs(stack, IDS, IDS[0])
    square = kept.decompose_resid(pos_slice=(0, 2))
    with pytest.raises(LensError, match="one for each row or one for each position"):
        kept.logit_attrs(square, IDS[0, :2], pos_slice=(0, 2))
    with pytest.raises(LensError, match="knows no model"):
        ActivationCache(dict(kept), list(kept)).decompose_resid()
