"""Models that processing elsewhere gets wrong without a word: right here, or refused by node.

Square weights (a vocabulary or an MLP as wide as the model), attention sinks, value biases of
grouped heads, norms behind a branch, norms by another formula, post-norm, float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from models.case import builder, token_ids
from torch import nn

import lensfx
from lensfx import passes as p
from lensfx.verify import UpToLogitShift, check, prove

D, LAYERS, HEADS = 32, 2, 4
HEAD = D // HEADS
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def model(name: str, **given: Any) -> Callable[[], nn.Module]:
    """A tiny model of a class of transformers, every parameter redrawn."""

    def make() -> nn.Module:
        import transformers

        kind: Any = getattr(transformers, name)
        config = kind.config_class(use_cache=False, **{**TOKENS, **given})
        made: nn.Module = kind(config)
        return made

    return builder(make)


def gpt2(vocab: int = 61, inner: int = 48) -> Callable[[], nn.Module]:
    sizes = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": D}
    return model("GPT2LMHeadModel", vocab_size=vocab, n_inner=inner, **sizes)


def common(
    name: str, vocab: int = 61, inner: int = 48, groups: int = 2, **more: Any
) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": D,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": D,
    }
    grouped = {"num_key_value_heads": HEADS // groups} if groups else {}
    return model(name, **{**sizes, **grouped, **more})


NEO = {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]}
DEEPSEEK = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": 4,
    "v_head_dim": HEAD,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SINKS = {"head_dim": HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}

# What each pass does there: how many sites fire; -1 is any number.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "vocabulary as wide as the model, layer norm": (gpt2(vocab=D), {"FoldNorm": 5}),
    "vocabulary as wide as the model, rms norm": (
        common("LlamaForCausalLM", vocab=D),
        {"FoldNorm": 5, "CenterWriters": 0},
    ),
    "mlp as wide as the model": (gpt2(inner=D), {"FoldNorm": 5}),
    "mlp as wide as the model, local attention": (
        common("GPTNeoForCausalLM", inner=D, groups=0, **NEO),
        {"FoldNorm": 5},
    ),
    "mlp as wide as the model, parallel": (
        common("GPTNeoXForCausalLM", inner=D, groups=0),
        {"FoldNorm": 5},
    ),
    "everything as wide as the model": (gpt2(vocab=D, inner=D), {"FoldNorm": 5}),
    "sinks": (common("GptOssForCausalLM", **SINKS), {"FoldNorm": 5, "FoldValueBias": 0}),
    "value biases of grouped heads": (
        common("Qwen2ForCausalLM"),
        {"FoldNorm": 5, "FoldValueBias": LAYERS},
    ),
    "norms behind branches": (common("Olmo2ForCausalLM"), {"FoldNorm": 1, "CenterWriters": 0}),
    "norms around branches": (common("Glm4ForCausalLM", head_dim=HEAD), {"FoldNorm": 5}),
    "low-rank norms and experts": (
        common("DeepseekV3ForCausalLM", groups=1, **DEEPSEEK),
        {"FoldNorm": 9},
    ),
    "one plus the gain": (common("NemotronForCausalLM"), {"FoldNorm": 5}),
    "post-norm": (common("BertForMaskedLM", groups=0), {"FoldNorm": 2}),
    "post-norm decoder": (
        common(
            "OPTForCausalLM",
            groups=0,
            do_layer_norm_before=False,
            ffn_dim=48,
            word_embed_proj_dim=D,
        ),
        {"FoldNorm": 1},
    ),
}
IDS = token_ids(2, 7, 0, D)


@cache
def lens(name: str) -> lensfx.Lens:
    return lensfx.wrap(MODELS[name][0](), IDS, verify=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_result_is_the_model(name: str) -> None:
    build, counts = MODELS[name]
    found = lens(name)
    proved = prove(found.program)
    assert proved.worst <= 1e-12
    moved = tuple(k for entry in found.program.journal for k in entry.shifted)
    up_to = UpToLogitShift(moved) if moved else None
    assert check(build(), found, up_to=up_to, inputs=[IDS, IDS[:1], IDS[:, :1]]).error <= 1e-12
    fired = {k: len(found.report.passes[k].fired) for k in counts}
    assert fired == counts


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("sinks", "FoldValueBias", "no longer sum to one"),
        ("post-norm", "FoldNorm", "only linear readers"),
        ("post-norm decoder", "FoldNorm", "only linear readers"),
        ("norms behind branches", "FoldNorm", ""),
    ],
)
def test_what_is_not_exact_is_refused_with_the_node(name: str, entry: str, words: str) -> None:
    refused = lens(name).report.passes[entry].refused
    assert refused
    assert any(words in r.reason for r in refused), [r.reason for r in refused]
    assert all(r.blame.startswith("%") for r in refused)


def test_value_biases_of_grouped_heads_fold_alone() -> None:
    build, _ = MODELS["value biases of grouped heads"]
    alone = (p.CanonicalLinear(), p.FoldValueBias(expect=LAYERS))
    found = lensfx.wrap(build(), IDS, passes=alone)
    assert found.report.equivalence.worst <= 1e-12
    assert not [k for k in found.program.tensors if k.endswith("v_proj.bias")]


def test_a_float64_model_stays_one() -> None:
    made = gpt2()().double()
    found = lensfx.wrap(made, IDS)
    assert {t.dtype for t in found.program.tensors.values() if t.is_floating_point()} == {
        torch.float64
    }
    with torch.no_grad():
        want, got = (m(IDS).logits.log_softmax(-1) for m in (made, found))
    assert float((want - got).abs().max()) <= 1e-12
