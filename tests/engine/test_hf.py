"""What transformers' own export support gives: caches that torch sees, patches, cached calls."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from models.case import randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lensfx import LensError, Program, capture
from lensfx.capture.hf import (
    CACHE,
    admit,
    cached_calls,
    cached_programs,
    empty_cache,
    exporter_patches,
    library_models,
    register_outputs,
)
from lensfx.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def learned_positions() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def rotary() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def grouped() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2}))


def sliding() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def two_stacks() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def built(factory: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(factory(), 0).eval()


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


@cache
def captured(factory: Any) -> tuple[Any, tuple[Program, ...]]:
    model, tokens = built(factory), ids()
    calls = cached_calls(model, (tokens,), {"attention_mask": torch.ones_like(tokens)})
    return model, cached_programs(capture, model, calls)


def first_that_takes(programs: tuple[Program, ...], call: dict[str, Any]) -> Any:
    for program in programs:
        try:
            return program(**call)
        except LensError as error:
            refused = error
    raise refused


@pytest.mark.parametrize("factory", [learned_positions, rotary, sliding])
@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_and_five_steps_are_the_models_own(factory: Any, batch: int) -> None:
    from transformers import DynamicCache

    model, programs = captured(factory)
    tokens, mask = ids(batch), torch.ones(batch, 7, dtype=torch.int64)
    mask[1:, :2] = 0
    places = torch.arange(7).expand(batch, 7)
    own, kept = DynamicCache(), empty_cache(programs[0], batch)
    with torch.no_grad():
        for step in range(6):
            call = {"input_ids": tokens, "attention_mask": mask, "position_ids": places}
            want = model(**call, past_key_values=own, use_cache=True)
            got = first_that_takes(programs, {**call, CACHE: kept, "use_cache": True})
            assert type(got) is type(want)
            assert torch.equal(got.logits, want.logits), step
            kept = got.past_key_values
            assert kept.get_seq_length() == own.get_seq_length() == 7 + step
            pairs = zip(kept.layers, own.layers, strict=True)
            assert all(torch.equal(a.keys, b.keys) for a, b in pairs)
            tokens = want.logits[:, -1:].argmax(-1)
            places, mask = places[:, -1:] + 1, torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def test_an_encoder_and_a_decoder_take_a_program_for_the_first_call() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    model, programs = captured(two_stacks)
    assert len(programs) == 2
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    own, kept = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    with torch.no_grad():
        seen = model.get_encoder()(input_ids=ids(), attention_mask=mask)
        for _ in range(6):
            call = {"encoder_outputs": seen, "attention_mask": mask, "decoder_input_ids": tokens}
            want = model(**call, past_key_values=own, use_cache=True)
            got = first_that_takes(programs, {**call, CACHE: kept, "use_cache": True})
            assert torch.equal(got.logits, want.logits)
            kept, tokens = got.past_key_values, want.logits[:, -1:].argmax(-1)


def test_grouped_heads_take_another_path_for_one_token() -> None:
    _, programs = captured(grouped)
    tokens = next(a for a in programs[0].guards.dynamic if a.label == "input_ids.size(1)")
    # The library packs the heads of a single query together, which rounds in another order.
    assert tokens.low == 2
    past = next(a for a in programs[0].guards.dynamic if a.label == "past_key_values[0].size(2)")
    assert past.low == 0


def test_the_cache_of_an_output_is_the_models_own_type() -> None:
    model: Any = built(rotary)
    register_outputs(model)
    program = capture(model, input_ids=ids(), use_cache=True)
    with torch.no_grad():
        want, got = model(ids(3, 5), use_cache=True), program(input_ids=ids(3, 5), use_cache=True)
    assert type(got.past_key_values) is type(want.past_key_values)
    layers = zip(got.past_key_values.layers, want.past_key_values.layers, strict=True)
    assert all(torch.equal(a.values, b.values) for a, b in layers)


def test_a_call_that_differs_opens_nothing() -> None:
    model = built(learned_positions)
    calls = cached_calls(model, (ids(),), {})
    program = capture(model, **calls.many)
    before = [a.low for a in program.guards.dynamic]
    with torch.no_grad():
        moved = {name: t + 1 for name, t in program.tensors.items()}
    broken = program.with_graph(program.graph, tensors=moved)
    assert [a.low for a in admit(broken, model, calls.trials).guards.dynamic] == before
    assert [a.low for a in admit(program, model, calls.trials).guards.dynamic] != before


def test_an_empty_cache_holds_nothing_for_any_batch() -> None:
    _, programs = captured(learned_positions)
    assert len(programs) == 1
    empty = empty_cache(programs[0], 3)
    assert empty.get_seq_length() == 0
    assert {t.shape for t in pytree.tree_leaves(empty)} == {(3, 4, 0, 8)}


def test_patches_are_held_for_the_trace_only() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with exporter_patches(built(rotary)):
        assert torch.nn.functional.scaled_dot_product_attention is not before
    assert torch.nn.functional.scaled_dot_product_attention is before
    with exporter_patches(nn.Linear(2, 2)):
        assert torch.nn.functional.scaled_dot_product_attention is before


def test_a_model_inside_a_users_module_is_found() -> None:
    inner = built(rotary)
    assert library_models(nn.Sequential(inner))[0] is inner
    assert library_models(nn.Linear(2, 2)) == []


def test_what_does_not_generate_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        cached_calls(nn.Linear(2, 2), (torch.ones(1, 2),), {})
    assert str(caught.value) == (
        "Linear does not generate, so there is no cache to capture it with\n"
        "  try: capture it without cache=True, or pass a model with a generate method"
    )


def test_a_program_without_a_cache_has_no_empty_one() -> None:
    program = capture(built(rotary), input_ids=ids(), use_cache=False)
    with pytest.raises(CaptureError, match="takes no cache"):
        empty_cache(program)


def test_transformers_is_not_imported_for_a_plain_model() -> None:
    source = inspect.getsource(inspect.getmodule(register_outputs) or nn)
    top = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in top if "transformers" in line]
