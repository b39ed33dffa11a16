"""The structure of small models of the zoo, one of each kind; `benchmarks/structure.py` has all."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from models.zoo import Architecture, Built, architectures, build
from models.zoo.facts import facts
from models.zoo.score import canonical, captured, score
from torch import Tensor, fx, nn

import lensfx
from lensfx.analysis.structure import Structure, structure
from lensfx.graph.layout import shown
from lensfx.graph.program import Program

SAMPLE = {
    "layer norm, fused q k v": ("GPT2LMHeadModel", "GPTNeoXForCausalLM"),
    "rms norm, rotary, fewer key heads": ("LlamaForCausalLM", "Qwen3ForCausalLM"),
    "one key head": ("GPTBigCodeForCausalLM", "GemmaForCausalLM"),
    "parallel branches": ("GPTJForCausalLM", "CohereForCausalLM"),
    "norms on both sides": ("Gemma2ForCausalLM",),
    "norm behind the branch": ("Olmo2ForCausalLM",),
    "post-norm": ("BertLMHeadModel", "OpenAIGPTLMHeadModel"),
    "scaled embeddings, added positions": ("OPTForCausalLM", "BartForCausalLM"),
    "complex rotary": ("Llama4ForCausalLM",),
    "latent attention": ("MiniCPM3ForCausalLM",),
    "experts, sinks": ("MixtralForCausalLM", "GptOssForCausalLM"),
    "scores with a bias": ("MptForCausalLM",),
    "no attention": ("MambaForCausalLM",),
    "some layers of each": ("Lfm2ForCausalLM",),
}
NAMES = [name for names in SAMPLE.values() for name in names]
# Models whose attention is a product of projections and nothing else on the way.
PLAIN = (
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "GPTNeoXForCausalLM",
    "GPTJForCausalLM",
    "MixtralForCausalLM",
    "Gemma2ForCausalLM",
    "GPTBigCodeForCausalLM",
    "BertLMHeadModel",
    "OPTForCausalLM",
    "BartForCausalLM",
)


@cache
def known() -> dict[str, Architecture]:
    return {architecture.class_name: architecture for architecture in architectures()}


@cache
def model(name: str) -> tuple[Built, Program]:
    built = build(known()[name])
    return built, captured(built)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_structure_is_what_the_config_says(name: str) -> None:
    built, program = model(name)
    expected = facts(built)
    for form in (program, canonical(program)):
        found = score(expected, form, structure(form))
        assert found.complete, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_fact_that_is_off_is_noticed(name: str) -> None:
    built, program = model(name)
    found, expected = structure(program), facts(built)
    other = torch.zeros(1)
    faults: list[dict[str, Any]] = [
        {"layers": 5},
        {"attentions": 1},
        {"heads": frozenset({3})},
        {"kv_heads": frozenset({3})},
        {"norms": frozenset({"rms" if "layer" in expected.norms else "layer"})},
        {"table": other},
        {"head": other},
    ]
    for fault in faults:
        assert score(replace(expected, **fault), program, found).wrong, fault


class _Kept(fx.Interpreter):
    """Runs a program and keeps every value by the name of its node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.flat, garbage_collect_values=False)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n.name] = found = super().run_node(n)
        return found


def _values(built: Built, program: Program) -> dict[str, Any]:
    given = {**built.inputs(2, 9), "use_cache": False}
    kept = _Kept(program)
    with torch.no_grad():
        kept.run(*program.signature.bind((), given))
    return kept.kept


def _rows(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], value.shape[1], -1)


def _spread(value: Tensor, heads: int) -> Tensor:
    return value.repeat_interleave(heads // value.shape[2], 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PLAIN)
def test_places_hold_what_they_are_named_for(name: str) -> None:
    built, program = model(name)
    found, kept = structure(program), _values(built, program)

    def see(place: Any) -> Tensor:
        return shown(kept[place.node.name], place.layout)

    for attn in _attentions(found):
        assert attn.heads is not None
        q, k, v, z = (see(p) for p in (attn.q, attn.k, attn.v, attn.z))
        widths = (attn.head_width, attn.head_width, attn.value_width, attn.value_width)
        counts = (attn.heads, attn.kv_heads, attn.kv_heads, attn.heads)
        for value, count, width in zip((q, k, v, z), counts, widths, strict=True):
            assert value.shape == (2, 9, count, width)
        q, k = see(attn.rot_q or attn.q), see(attn.rot_k or attn.k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, _spread(k, attn.heads)) * attn.scale
        if attn.softcap is not None:
            scores = attn.softcap * torch.tanh(scores / attn.softcap)
        if attn.mask is not None and kept[attn.mask.name].dtype == torch.bool:
            scores = scores.masked_fill(~kept[attn.mask.name], -torch.inf)
        elif attn.causal:
            scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        elif attn.pattern is not None:
            scores = see(attn.scores)
        result = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), _spread(v, attn.heads))
        torch.testing.assert_close(result, z, atol=1e-5, rtol=1e-4)
        read = [kept[n.name].reshape(-1) for n in attn.out.all_input_nodes]
        assert any(torch.equal(x, z.reshape(-1)) for x in read)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", "BartForCausalLM"])
def test_places_are_what_the_modules_give(name: str) -> None:
    built, program = model(name)
    found, kept = structure(program), _values(built, program)
    given: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            given.setdefault(path, out)

        return hook

    leaves = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "gate_proj", "up_proj")
    modules = [(n, m) for n, m in built.model.named_modules() if n.endswith(leaves)]
    hooks = [m.register_forward_hook(note(n)) for n, m in modules if "encoder_attn" not in n]
    with torch.no_grad():
        built.model(**built.inputs(2, 9))
    for hook in hooks:
        hook.remove()
    outputs = {n: [v for k, v in given.items() if k.endswith(n)] for n in leaves}
    for at, block in enumerate(found.blocks):
        attn, write = block.attn, block.attn_write
        assert attn is not None
        assert write is not None
        for leaf, place in (("k_proj", attn.k), ("v_proj", attn.v), ("q_proj", attn.q)):
            assert place is not None
            value = _rows(shown(kept[place.node.name], place.layout))
            factor = attn.head_width**-0.5 if leaf == "q_proj" and attn.scale == 1.0 else 1.0
            assert torch.equal(value, outputs[leaf][at] * factor)
        out = (outputs["out_proj"] + outputs["o_proj"])[at]
        assert torch.equal(kept[write.value.name], out)
        if outputs["gate_proj"]:
            mlp = block.mlp
            assert mlp is not None
            for leaf, place in (("gate_proj", mlp.pre), ("up_proj", mlp.pre_linear)):
                assert place is not None
                assert torch.equal(shown(kept[place.node.name], place.layout), outputs[leaf][at])


@torch.library.custom_op("structure_zoo::bend", mutates_args=())
def bend(x: Tensor) -> Tensor:
    return x.tanh() * 2


@torch.library.custom_op("structure_zoo::shuffle", mutates_args=())
def shuffle(x: Tensor) -> Tensor:
    return x.flip(1).contiguous()


bend.register_fake(torch.empty_like)
shuffle.register_fake(torch.empty_like)


class _Unknown(nn.Module):
    """Two residual branches, with operators that nobody has a rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        a, b, c, d = self.layers
        x = self.embed(ids)
        x = x + b(torch.ops.structure_zoo.bend(a(x)))
        x = x + d(torch.ops.structure_zoo.shuffle(c(x)))
        return x @ self.embed.weight.T


def test_an_operator_without_a_rule_is_asked() -> None:
    program = lensfx.capture(_Unknown(), torch.arange(10).reshape(2, 5))
    found = [w for b in structure(program).blocks for w in b.writes]
    assert [w.kind for w in found] == ["mlp", "mixer"]
    assert [w.branch.mixes for w in found] == [(), ("unknown",)]


def _attentions(found: Structure) -> list[Any]:
    return [a for b in found.blocks for w in b.writes for a in w.attention]
