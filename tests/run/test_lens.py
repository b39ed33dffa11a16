"""A lens answers as its model does, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lensfx
from lensfx import passes as p
from lensfx.rewrite import Edit, Match, Op, Param, Pass, Rule
from lensfx.verify import Exact

SIZES = [(2, 7), (3, 11), (1, 5), (2, 1), (1, 1), (2, 32)]
MODELS = ["hf_gpt2", "hf_llama", "nanogpt", "nanogpt_targets", "encdec", "keyword"]


@cache
def model_of(name: str) -> nn.Module:
    return CASES[name].build()


@cache
def lens_of(name: str, passes: str | None) -> lensfx.Lens:
    args, kwargs = CASES[name].inputs(2, 7, 0)
    return lensfx.wrap(model_of(name), *args, passes=passes, verify=False, **kwargs)


def sizes(name: str) -> Iterator[tuple[int, int, int]]:
    for seed, (batch, length) in enumerate(SIZES):
        yield batch, min(length, CASES[name].max_length), seed


def same_bits(got: Any, want: Any) -> bool:
    left, right = pytree.tree_flatten(got), pytree.tree_flatten(want)
    pairs = zip(left[0], right[0], strict=True)
    return left[1] == right[1] and all(
        torch.equal(a, b) and a.dtype is b.dtype if isinstance(b, Tensor) else a == b
        for a, b in pairs
    )


@pytest.mark.parametrize("name", MODELS)
def test_only_hooks_answer_in_the_models_own_bits(name: str) -> None:
    model, lens = model_of(name), lens_of(name, None)
    for size in sizes(name):
        args, kwargs = CASES[name].inputs(*size)
        got, want = lens(*args, **kwargs), model(*args, **kwargs)
        assert type(got) is type(want)
        assert same_bits(got, want), f"at {size}"


@pytest.mark.parametrize("name", MODELS)
def test_default_passes_answer_with_the_same_probabilities(name: str) -> None:
    model, lens = model_of(name), lens_of(name, "default")
    for size in sizes(name):
        args, kwargs = CASES[name].inputs(*size)
        with torch.no_grad():
            got, want = lens(*args, **kwargs), model(*args, **kwargs)
        assert type(got) is type(want)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            if b is None:
                assert a is None
            elif b.ndim and b.shape[-1] > 40:
                torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), rtol=0, atol=1e-5)
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_library_result_keeps_its_attributes() -> None:
    args, _ = CASES["hf_gpt2"].inputs(2, 7, 0)
    out = lens_of("hf_gpt2", None)(*args)
    assert out.loss is None
    assert torch.equal(out.logits, model_of("hf_gpt2")(*args).logits)
    assert torch.equal(out["logits"], out[0])


def test_arguments_go_by_position_or_by_name() -> None:
    (ids, targets), _ = CASES["nanogpt_targets"].inputs(3, 6, 1)
    lens = lens_of("nanogpt_targets", None)
    want = model_of("nanogpt_targets")(ids, targets)
    assert same_bits(lens(ids, targets), want)
    assert same_bits(lens(ids, targets=targets), want)
    assert same_bits(lens(targets=targets, idx=ids), want)


def test_an_argument_may_be_spelled_as_its_default() -> None:
    (ids,), _ = CASES["nanogpt"].inputs(2, 7, 0)
    assert same_bits(lens_of("nanogpt", None)(ids, targets=None), model_of("nanogpt")(ids))


@pytest.mark.parametrize("name", ["nanogpt", "nanogpt_targets"])
def test_a_call_of_another_kind_is_answered_as_the_model_does_or_refused(name: str) -> None:
    model = model_of(name)
    lens = lens_of(name, None)
    (ids, targets), _ = CASES["nanogpt_targets"].inputs(2, 7, 0)
    other = (ids,) if name == "nanogpt_targets" else (ids, targets)
    assert same_bits(lens(*other), model(*other))
    with pytest.raises(lensfx.GuardError, match="does not accept this call"):
        lens(ids, targets, 3)
    with pytest.raises(lensfx.GuardError, match="itself fails"):
        lens(ids[0], targets[0]) if name == "nanogpt_targets" else lens(ids[0])
    with pytest.raises(lensfx.GuardError, match="targets"):
        lens.program(*other)


def test_left_padding_reaches_the_model() -> None:
    _, kwargs = CASES["keyword"].inputs(3, 9, 5)
    kwargs["attention_mask"][:, 0] = 1
    flipped = {"input_ids": kwargs["input_ids"], "attention_mask": torch.ones(3, 9).long()}
    flipped["attention_mask"][1, 1:4] = 0
    lens, model = lens_of("keyword", None), model_of("keyword")
    assert same_bits(lens(**flipped), model(**flipped))
    assert not torch.equal(lens(**flipped)["logits"], lens(**kwargs)["logits"])


def test_grad_mode_decides_as_for_the_model() -> None:
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 0)
    lens = lens_of("nanogpt_targets", None)
    assert lens(*args)[1].requires_grad
    with torch.no_grad():
        assert not lens(*args)[1].requires_grad
    with torch.inference_mode():
        inside = lens(*args)[1]
    assert inside.is_inference()
    assert lens(*args)[1].requires_grad


def test_gradients_are_the_models_own() -> None:
    model, args = CASES["nanogpt_targets"].build(), CASES["nanogpt_targets"].inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, passes=None, verify=False)
    model(*args)[1].backward()
    want = {n: q.grad.clone() for n, q in model.named_parameters()}
    model.zero_grad()
    lens(*args)[1].backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, want[name]), name
    assert {id(q) for q in lens.parameters()} == {id(q) for q in model.parameters()}


def test_gradients_reach_what_no_default_pass_changed() -> None:
    model, args = model_of("nanogpt_targets"), CASES["nanogpt_targets"].inputs(2, 7, 0)[0]
    folds = lensfx.Pipeline.default(center_writing_weights=False, fold_value_biases=False)
    lens = lensfx.wrap(model, *args, passes=folds.passes, verify=False)
    kept = [q for q in lens.parameters() if any(q is own for own in model.parameters())]
    assert any(q is model.transformer.h[0].attn.c_proj.weight for q in kept)
    want = torch.autograd.grad(model(*args)[1], kept)
    got = torch.autograd.grad(lens(*args)[1], kept, allow_unused=True)
    for parameter, a, b in zip(kept, got, want, strict=True):
        # The embedding is tied to the unembedding in the model; folding gave the latter its own.
        if parameter is not model.lm_head.weight:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_training_the_model_is_seen_by_the_lens() -> None:
    case = CASES["nanogpt_targets"]
    model, args = case.build(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, passes=None, verify=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        lens(*args)[1].backward()
        optimiser.step()
        assert same_bits(lens(*args), model(*args))


@dataclass(frozen=True)
class State:
    """Everything of a model that wrapping it could disturb."""

    modules: list[tuple[str, int, bool, int]]
    tensors: list[tuple[str, int, int, int, bool]]
    values: list[Tensor]
    out: Any

    @classmethod
    def of(cls, model: nn.Module, call: Callable[[], Any]) -> State:
        modules = [
            (n, id(m), m.training, len(m._forward_hooks) + len(m._forward_pre_hooks))
            for n, m in model.named_modules()
        ]
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        tensors = [(n, id(t), t.data_ptr(), t._version, t.requires_grad) for n, t in named]
        return cls(modules, tensors, [t.detach().clone() for _, t in named], call())


def overwrite(value: Tensor, hook: lensfx.HookPoint) -> None:
    value.zero_()


@pytest.mark.parametrize("name", ["hf_gpt2", "flat", "in_place", "encdec"])
def test_the_callers_model_is_left_alone(name: str) -> None:
    model = CASES[name].build()
    args, kwargs = CASES[name].inputs(2, 7, 0)
    [*model.modules()][-1].train()
    settings = getattr(getattr(model, "config", None), "_attn_implementation", None)
    before = State.of(model, lambda: model(*args, **kwargs))
    lens = lensfx.wrap(model, *args, verify=name == "flat", **kwargs)
    with torch.no_grad():
        lens.run_with_hooks(*args, fwd_hooks=[(lambda name: True, overwrite)], **kwargs)
        for value in lens.run_with_cache(*args, **kwargs)[1].values():
            value.zero_()
    after = State.of(model, lambda: model(*args, **kwargs))
    assert after.modules == before.modules
    assert after.tensors == before.tensors
    assert same_bits(after.values, before.values)
    assert same_bits(after.out, before.out)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == settings
    assert all(q.grad is None for q in model.parameters())


def test_low_precision_keeps_its_bits_and_dtypes() -> None:
    case = CASES["nanogpt_targets"]
    model, args = case.build().bfloat16(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, passes=None, verify=False)
    assert same_bits(lens(*args), model(*args))
    _, kept = lens.run_with_cache(*args, names_filter=lambda n: "hook" in n)
    inside = ("hook_attn_scores", "hook_pattern")
    assert {v.dtype for n, v in kept.items() if not n.endswith(inside)} == {torch.bfloat16}
    # The kernels keep these in float32.
    assert {v.dtype for n, v in kept.items() if n.endswith(inside)} == {torch.float32}


def test_hook_names_put_the_canonical_ones_first_in_order_of_the_run() -> None:
    names = lens_of("nanogpt_targets", None).hook_names
    block = [
        "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "hook_k_input", "attn.hook_k",
        "hook_attn_in", "hook_q_input", "attn.hook_q", "hook_v_input", "attn.hook_v",
        "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z", "attn.hook_result",
        "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln2.hook_scale", "ln2.hook_normalized",
        "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
    ]  # fmt: skip
    canonical = ["hook_embed", "hook_pos_embed"]
    canonical += [f"blocks.{i}.{n}" for i in range(2) for n in block]
    canonical += ["ln_final.hook_scale", "ln_final.hook_normalized"]
    canonical += ["unembed.hook_in", "unembed.hook_out"]
    assert names[: len(canonical)] == canonical
    assert all("hook_" not in n for n in names[len(canonical) :])
    assert "transformer.h.1.mlp.c_fc.linear" in names
    assert len(set(names)) == len(names)


def test_a_model_without_absolute_positions_has_no_point_for_them() -> None:
    names = lens_of("hf_llama", "default").hook_names
    assert "hook_embed" in names
    assert "hook_pos_embed" not in names


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama", "nanogpt_targets", "keyword"])
def test_the_stream_adds_up(name: str) -> None:
    args, kwargs = CASES[name].inputs(2, 7, 3)
    _, cache = lens_of(name, "default").run_with_cache(*args, **kwargs)
    for i in range(2):
        mid = cache["resid_pre", i] + cache["attn_out", i]
        assert torch.equal(mid, cache["resid_mid", i])
        assert torch.equal(mid + cache["mlp_out", i], cache["resid_post", i])
    assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama", "nanogpt_targets"])
def test_folded_norms_divide_the_stream_by_their_scale(name: str) -> None:
    args, kwargs = CASES[name].inputs(2, 7, 3)
    _, cache = lens_of(name, "default").run_with_cache(*args, **kwargs)
    for stream, norm in [(("resid_pre", 0), (0, "ln1")), (("resid_mid", 1), (1, "ln2"))]:
        x = cache[stream]
        x = x if "llama" in name else x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(x / cache[("scale", *norm)], cache[("normalized", *norm)])
        assert cache[("scale", *norm)].shape == (2, 7, 1)


def test_wrap_takes_passes_in_the_forms_that_people_write() -> None:
    model, ids = (
        nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5)),
        torch.ones(2, 3),
    )

    def ran(passes: Any) -> list[str]:
        lens = lensfx.wrap(model, ids.long(), passes=passes, verify=False)
        return [report.name for report in lens.program.reports]

    default = ["canonical-linear", "canonical-norm", "fold-norm", "center-unembed", "insert-hooks"]
    assert ran("default") == [q.name for q in lensfx.Pipeline.default().passes]
    assert set(default) <= set(ran("default"))
    assert ran(None) == ran(()) == ["insert-hooks"]
    assert ran((p.CanonicalNorm(),)) == ["canonical-norm", "insert-hooks"]
    assert ran(q for q in [p.CanonicalNorm()]) == ["canonical-norm", "insert-hooks"]
    assert ran([p.CanonicalNorm(), p.InsertHooks()]) == ["canonical-norm", "insert-hooks"]
    # Options make it another value, and still the one that inserts hooks.
    assert ran([p.InsertHooks(expect=3)]) == ["insert-hooks"]


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("all", "passes='all' is unknown"),
        (p.FoldNorm(), "is no list of passes"),
        (7, "is no list of passes"),
        ((p.FoldNorm,), "is not a pass"),
        (("fold-norm",), "is not a pass"),
        ((p.FoldNorm(), p.CanonicalNorm()), "fold-norm stands before canonical-norm"),
        ((p.InsertHooks(), p.FoldNorm()), "insert-hooks stands before fold-norm"),
    ],
)
def test_wrap_refuses_what_is_no_pipeline_before_it_captures(passes: Any, message: str) -> None:
    with pytest.raises(lensfx.PipelineError, match=message):
        lensfx.wrap(nn.Identity(), passes=passes)


def double(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    at.set(m.root, weight=at.call(torch.ops.aten.mul.Tensor, m.W, 2.0))


@dataclass(frozen=True)
class DoubleWeights(Pass):
    """Claims to be exact, and is not."""

    contract = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        linear = Op("root", (torch.ops.aten.linear.default,), {"weight": Param("W", axes=2)})
        return (Rule(linear, lambda m: None, double),)


def test_verify_finds_the_pass_that_lies_and_can_be_left_out() -> None:
    model, args = model_of("nanogpt"), CASES["nanogpt"].inputs(2, 7, 0)[0]
    with pytest.raises(lensfx.ContractError, match="double-weights"):
        lensfx.wrap(model, *args, passes=(DoubleWeights(),))
    lens = lensfx.wrap(model, *args, passes=(DoubleWeights(),), verify=False)
    assert lens.report.equivalence is None
    assert not same_bits(lens(*args), model(*args))


def test_a_lens_of_a_bare_program_has_native_names_only() -> None:
    model, args = model_of("nanogpt"), CASES["nanogpt"].inputs(2, 7, 0)[0]
    lens = lensfx.Lens(lensfx.capture(model, *args))
    assert same_bits(lens(*args), model(*args))
    assert "transformer.h.0.attn.c_attn.linear" in lens.hook_names
    assert not any("hook_" in n for n in lens.hook_names)
    with pytest.raises(lensfx.LensError, match="needs a residual stream"):
        lens.run_with_cache(*args, stop_at_layer=1)
    assert repr(lens) == "Lens(GPT: 0 canonical and 49 native hook points)"
