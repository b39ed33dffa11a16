"""What transformers' own export support gives: caches that torch sees, patches, cached calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from models.case import randomise
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from transformers import DynamicCache, EncoderDecoderCache

import lensfx
from lensfx import GuardError, Lens, capture
from lensfx.capture.hf import (
    admit,
    cached_calls,
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
def wrapped(factory: Any, passes: str | None = None) -> tuple[Any, Lens]:
    """A model and its lens, in float64 where the passes round otherwise than the model."""
    model = built(factory)
    if passes is not None:
        model = model.double()
    return model, lensfx.wrap(model, ids(), cache=True, passes=passes)


def steps(model: Any, lens: Lens, batch: int, padded: bool) -> Iterator[tuple[Any, Any]]:
    """What the model and the lens return, for a prefill and five tokens that follow."""
    tokens, mask = ids(batch), torch.ones(batch, 7, dtype=torch.int64)
    mask[1:, :2] = 1 - int(padded)
    call = {"input_ids": tokens, "position_ids": torch.arange(7).expand(batch, 7)}
    own, kept = DynamicCache(), lensfx.empty_cache(lens.program, batch)
    with torch.no_grad():
        for _ in range(6):
            call = {**call, "attention_mask": mask, "use_cache": True}
            want = model(**call, past_key_values=own)
            got = lens(**call, past_key_values=kept)
            yield want, got
            kept = got.past_key_values
            call["input_ids"] = want.logits[:, -1:].argmax(-1)
            call["position_ids"] = call["position_ids"][:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


def decoder_steps(model: Any, lens: Lens, batch: int) -> Iterator[tuple[Any, Any]]:
    """As `steps`, for a decoder that starts at one token beside an encoder's result."""
    tokens, mask = torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, 7, dtype=torch.int64)
    mask[1:, 5:] = 0
    own, kept = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    with torch.no_grad():
        seen = model.get_encoder()(input_ids=ids(batch), attention_mask=mask)
        for _ in range(6):
            call = {"encoder_outputs": seen, "attention_mask": mask, "decoder_input_ids": tokens}
            want = model(**call, past_key_values=own, use_cache=True)
            got = lens(**call, past_key_values=kept, use_cache=True)
            yield want, got
            kept, tokens = got.past_key_values, want.logits[:, -1:].argmax(-1)


def held(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result.past_key_values) if isinstance(t, Tensor)]


def assert_same(want: Any, got: Any) -> None:
    assert type(got) is type(want)
    assert torch.equal(got.logits, want.logits)
    assert len(held(got)) == len(held(want)) > 0
    assert all(map(torch.equal, held(got), held(want)))


@pytest.mark.parametrize("factory", [learned_positions, rotary, sliding])
@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_and_five_steps_are_the_models_own(factory: Any, batch: int) -> None:
    model, lens = wrapped(factory)
    for n, (want, got) in enumerate(steps(model, lens, batch, padded=True)):
        assert_same(want, got)
        assert got.past_key_values.get_seq_length() == 7 + n
    assert len(lens.programs) == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_an_encoder_and_a_decoder_are_the_models_own(batch: int) -> None:
    model, lens = wrapped(two_stacks)
    for want, got in decoder_steps(model, lens, batch):
        assert_same(want, got)
    # The first call has a cache without structure, and no encoder's keys in it.
    assert len(lens.programs) <= 3


@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_heads_take_another_path_for_one_token(batch: int) -> None:
    model, lens = wrapped(grouped)
    for want, got in steps(model, lens, batch, padded=False):
        assert_same(want, got)
    # The library packs the heads of a single query together, which rounds in another order.
    tokens = next(a for a in lens.program.guards.dynamic if a.label == "input_ids.size(1)")
    assert tokens.low == 2
    assert len(lens.programs) == 2
    # With a mask that hides nothing it takes a third kernel, and the program says that it cannot.
    (note,) = lens.programs[1].source.notes
    assert note.startswith("for other values of its inputs the model does other arithmetic: logits")
    for want, got in steps(model, lens, batch, padded=True):
        assert_close(got.logits, want.logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("factory", [learned_positions, rotary, grouped])
@pytest.mark.parametrize("batch", [1, 2])
def test_rewritten_programs_take_a_cache(factory: Any, batch: int) -> None:
    model, lens = wrapped(factory, "default")
    for want, got in steps(model, lens, batch, padded=True):
        assert_close(got.logits.log_softmax(-1), want.logits.log_softmax(-1), rtol=0, atol=1e-12)
        assert_close(held(got), held(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_rewritten_encoder_and_decoder_take_a_cache(batch: int) -> None:
    model, lens = wrapped(two_stacks, "default")
    for want, got in decoder_steps(model, lens, batch):
        assert_close(got.logits.log_softmax(-1), want.logits.log_softmax(-1), rtol=0, atol=1e-12)
        assert_close(held(got), held(want), rtol=0, atol=1e-12)


def test_every_tensor_of_a_cache_is_an_output_with_a_name() -> None:
    _, lens = wrapped(rotary)
    names = lens.program.signature.outputs
    assert names == ("logits", *(f"past_key_values[{k}]" for k in range(4)))
    results: Any = lens.program.graph.output_node().args[0]
    assert len(results) == len(names)


def test_a_plain_call_that_returns_a_cache_is_rewritten_too() -> None:
    model = built(rotary).double()
    lens = lensfx.wrap(model, ids())
    with torch.no_grad():
        want, got = model(ids(3, 5)), lens(ids(3, 5))
    assert_close(got.logits.log_softmax(-1), want.logits.log_softmax(-1), rtol=0, atol=1e-12)
    assert_close(held(got), held(want), rtol=0, atol=1e-12)


def test_a_model_in_training_mode_is_captured_as_in_eval_mode_and_left_alone() -> None:
    model = built(learned_positions)
    known = capture(model, ids(), cache=True)
    state = torch.get_rng_state()
    program = capture(model.train(), ids(), cache=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert program.guards.axes == known.guards.axes


def test_values_have_to_be_as_many_as_keys() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    q, k, v = (torch.randn(1, 2, n, 4) for n in (3, 7, 7))
    program = capture(Attends(), q, k, v)
    assert torch.equal(program(q, k[:, :, :5], v[:, :, :5]), attend(q, k[:, :, :5], v[:, :, :5]))
    with pytest.raises(GuardError):
        # Torch's own kernel reads on behind the values here.
        program(q, k, v[:, :, :5])
    # The other way round it leaves the last values out.
    longer = capture(Attends(), q, k[:, :, :5], v)
    assert torch.equal(longer(q, k[:, :, :5], v), attend(q, k[:, :, :5], v))


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
    _, lens = wrapped(learned_positions)
    empty = lensfx.empty_cache(lens.program, 3)
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
        lensfx.empty_cache(program)


def test_transformers_is_not_imported_for_a_plain_model() -> None:
    source = inspect.getsource(inspect.getmodule(register_outputs) or nn)
    top = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in top if "transformers" in line]
