"""An edit at a hook point does what a hand-written change of the model would do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor

import lensfx
from lensfx import HookError, HookPoint, UnknownNameError

Edit = Callable[[Tensor], Tensor]
Calls = list[tuple[str, int]]

MODEL = CASES["nanogpt_targets"].build()
ARGS = CASES["nanogpt_targets"].inputs(2, 7, 0)[0]
OTHER = CASES["nanogpt_targets"].inputs(2, 7, 1)[0][0], ARGS[1]
MID = "blocks.0.hook_resid_mid"


@pytest.fixture(scope="module")
def shared() -> lensfx.Lens:
    return lensfx.wrap(MODEL, *ARGS, passes=None, verify=False)


@pytest.fixture
def lens(shared: lensfx.Lens) -> Iterator[lensfx.Lens]:
    """The lens, which every test must leave without a hook and answering as before."""
    yield shared
    shared.reset_hooks(including_permanent=True)
    assert torch.equal(shared(*ARGS)[0], MODEL(*ARGS)[0])


def zero(value: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(value)


def shrink(value: Tensor) -> Tensor:
    """A change that is different at every position and channel."""
    ramp = torch.linspace(0.2, 1.7, value[0].numel() if value.ndim > 2 else value.numel())
    return value * ramp.reshape(value.shape[-2:] if value.ndim < 3 else value.shape[1:])


@contextlib.contextmanager
def on_output(path: str, edit: Edit) -> Iterator[None]:
    handle = MODEL.get_submodule(path).register_forward_hook(lambda m, given, out: edit(out))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def on_input(path: str, edit: Edit) -> Iterator[None]:
    module = MODEL.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, given: (edit(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def between(block: Any, edit: Edit) -> Iterator[None]:
    """The edit of the stream between attention and MLP, written out."""

    def forward(x: Tensor) -> Tensor:
        x = edit(x + block.attn(block.ln_1(x)))
        return x + block.mlp(block.ln_2(x))

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


@contextlib.contextmanager
def before_gain(path: str, edit: Edit) -> Iterator[None]:
    """The edit of what a norm has divided, before its gain and bias, written out."""
    norm = MODEL.get_submodule(path)

    def forward(x: Tensor) -> Tensor:
        bare = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
        return edit(bare) * norm.weight + norm.bias

    norm.forward = forward
    try:
        yield
    finally:
        del norm.forward


PLACES: dict[str, Callable[[Edit], Any]] = {
    "hook_embed": lambda e: on_output("transformer.wte", e),
    "hook_pos_embed": lambda e: on_output("transformer.wpe", e),
    "blocks.0.hook_resid_pre": lambda e: on_input("transformer.h.0", e),
    "blocks.1.hook_resid_pre": lambda e: on_input("transformer.h.1", e),
    "blocks.0.ln1.hook_normalized": lambda e: before_gain("transformer.h.0.ln_1", e),
    "blocks.0.hook_attn_out": lambda e: on_output("transformer.h.0.attn", e),
    "blocks.1.hook_attn_out": lambda e: on_output("transformer.h.1.attn", e),
    "blocks.0.hook_resid_mid": lambda e: between(MODEL.transformer.h[0], e),
    "blocks.1.hook_resid_mid": lambda e: between(MODEL.transformer.h[1], e),
    "blocks.1.ln2.hook_normalized": lambda e: before_gain("transformer.h.1.ln_2", e),
    "blocks.0.hook_mlp_out": lambda e: on_output("transformer.h.0.mlp", e),
    "blocks.1.hook_mlp_out": lambda e: on_output("transformer.h.1.mlp", e),
    "blocks.1.hook_resid_post": lambda e: on_output("transformer.h.1", e),
    "ln_final.hook_normalized": lambda e: before_gain("transformer.ln_f", e),
    "unembed.hook_in": lambda e: on_input("lm_head", e),
    "unembed.hook_out": lambda e: on_output("lm_head", e),
    "transformer.h.0.mlp.gelu.gelu": lambda e: on_output("transformer.h.0.mlp.gelu", e),
    "transformer.h.1.attn.c_attn.linear": lambda e: on_output("transformer.h.1.attn.c_attn", e),
}


@pytest.mark.parametrize("edit", [torch.zeros_like, shrink], ids=["zero", "shrink"])
@pytest.mark.parametrize("name", PLACES)
def test_an_edit_does_what_a_module_hook_does(lens: lensfx.Lens, name: str, edit: Edit) -> None:
    with PLACES[name](edit):
        want = MODEL(*ARGS)
    got = lens.run_with_hooks(*ARGS, fwd_hooks=[(name, lambda value, hook: edit(value))])
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert not torch.equal(got[0], MODEL(*ARGS)[0])


def test_one_head_of_z_is_one_slice_of_what_the_projection_reads(lens: lensfx.Lens) -> None:
    def without_head(value: Tensor, hook: HookPoint) -> Tensor:
        value[:, 2] = 0
        return value

    def without_columns(value: Tensor) -> Tensor:
        return torch.cat(
            [value[..., :16], torch.zeros_like(value[..., 16:24]), value[..., 24:]], -1
        )

    with on_input("transformer.h.1.attn.c_proj", without_columns):
        want = MODEL(*ARGS)[0]
    z = "transformer.h.1.attn.scaled_dot_product_attention"
    assert torch.equal(lens.run_with_hooks(*ARGS, fwd_hooks=[(z, without_head)])[0], want)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "resid_post"])
def test_patching_the_whole_stream_recovers_the_clean_run(
    lens: lensfx.Lens, point: str, layer: int
) -> None:
    name = f"blocks.{layer}.hook_{point}"
    clean, cache = lens.run_with_cache(*ARGS, names_filter=name)
    got = lens.run_with_hooks(*OTHER, fwd_hooks=[(name, lambda value, hook: cache[hook.name])])
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1], clean[1])


def test_patching_one_position_reaches_that_position_and_later_ones(lens: lensfx.Lens) -> None:
    clean, cache = lens.run_with_cache(*ARGS, names_filter="blocks.1.hook_resid_pre")

    def patch(value: Tensor, hook: HookPoint) -> Tensor:
        value[:, 4] = cache[hook.name][:, 4]
        return value

    got = lens.run_with_hooks(*OTHER, fwd_hooks=[("blocks.1.hook_resid_pre", patch)])[0]
    plain = lens(*OTHER)[0]
    moved = (got != plain).any(-1).all(0)
    assert moved.tolist() == [False] * 4 + [True] * 3
    assert not torch.equal(got, clean[0])


def test_an_edit_between_attention_and_mlp_reaches_the_skip_connection(lens: lensfx.Lens) -> None:
    with lens.hooks(fwd_hooks=[(MID, zero)]):
        _, cache = lens.run_with_cache(*ARGS)
    assert torch.equal(cache["resid_post", 0], cache["mlp_out", 0])
    assert not cache["resid_mid", 0].any()


def test_two_edits_act_in_the_order_of_the_run(lens: lensfx.Lens) -> None:
    """The second sees what the first has done upstream of it."""
    seen = {}

    def look(value: Tensor, hook: HookPoint) -> None:
        seen[hook.name] = value.detach().abs().sum().item()

    lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, look), ("blocks.0.hook_attn_out", zero)])
    _, cache = lens.run_with_cache(*ARGS, names_filter="blocks.0.hook_resid_pre")
    assert seen[MID] == cache["resid_pre", 0].abs().sum().item()


def test_looking_everywhere_changes_no_bit(lens: lensfx.Lens) -> None:
    seen: list[str] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append(hook.name)

    got = lens.run_with_hooks(*ARGS, fwd_hooks=[(lambda n: True, look)])
    assert torch.equal(got[0], MODEL(*ARGS)[0])
    assert sorted(seen) == sorted(lens.hook_names)


def test_a_function_is_called_once_for_each_name_in_the_order_of_the_run(
    lens: lensfx.Lens,
) -> None:
    seen: list[str] = []
    names = ["blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    lens.run_with_hooks(*ARGS, fwd_hooks=[(names, lambda value, hook: seen.append(hook.name))])
    assert seen == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    seen.clear()
    lens.run_with_hooks(*ARGS, fwd_hooks=[(lambda n: n in names, lambda v, h: seen.append(h.name))])
    assert seen == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]


def test_hooks_of_one_name_run_in_turn_and_a_prepended_one_runs_first(lens: lensfx.Lens) -> None:
    calls: Calls = []

    def note(label: str, add: float) -> Callable[[Tensor, HookPoint], Tensor]:
        def hook(value: Tensor, point: HookPoint) -> Tensor:
            calls.append((label, round(value.detach().mean().item())))
            return torch.full_like(value, add)

        return hook

    lens.add_hook(MID, note("a", 1))
    lens.add_hook(MID, note("b", 2))
    lens.add_hook(MID, note("c", 3), prepend=True)
    lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, note("d", 4)), (MID, note("e", 5))])
    assert [label for label, _ in calls] == ["c", "a", "b", "d", "e"]
    assert [mean for _, mean in calls[1:]] == [3, 1, 2, 4]


def test_a_hook_may_write_in_place_with_or_without_returning(lens: lensfx.Lens) -> None:
    def silently(value: Tensor, hook: HookPoint) -> None:
        value.zero_()

    want = lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, zero)])[0]
    for write in (silently, lambda value, hook: value.zero_()):
        assert torch.equal(lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, write)])[0], want)


def test_writing_in_place_changes_the_named_value_and_no_other(lens: lensfx.Lens) -> None:
    _, plain = lens.run_with_cache(*ARGS)
    with (
        torch.no_grad(),
        lens.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda v, h: v.zero_())]),
    ):
        _, cache = lens.run_with_cache(*ARGS)
    raw = "transformer.h.0.attn.c_proj.linear"
    assert not cache["attn_out", 0].any()
    assert torch.equal(cache[raw], plain[raw])
    assert torch.equal(cache["resid_mid", 0], plain["resid_pre", 0])


def test_a_written_value_leaves_views_of_the_same_memory_alone(lens: lensfx.Lens) -> None:
    """Queries, keys and values of a fused projection are three views of one tensor."""
    queries, values = (f"transformer.h.0.attn.getitem{i}" for i in ("", "_2"))
    _, plain = lens.run_with_cache(*ARGS, names_filter=[queries, values])
    with lens.hooks(fwd_hooks=[("transformer.h.0.attn.c_attn.linear", lambda v, h: None)]):
        with torch.no_grad(), lens.hooks(fwd_hooks=[(queries, lambda v, h: v.zero_())]):
            _, cache = lens.run_with_cache(*ARGS, names_filter=[queries, values])
    assert torch.equal(cache[values], plain[values])


def test_hook_points_know_their_name_layer_and_context(lens: lensfx.Lens) -> None:
    def count(value: Tensor, hook: HookPoint) -> None:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1
        points[hook.name] = hook

    points: dict[str, HookPoint] = {}
    lens.add_hook(["blocks.1.hook_resid_pre", "unembed.hook_in"], count)
    lens(*ARGS)
    lens(*ARGS)
    stream, head = points["blocks.1.hook_resid_pre"], points["unembed.hook_in"]
    assert stream.layer() == 1
    assert (stream.ctx, head.ctx) == ({"runs": 2}, {"runs": 2})
    with pytest.raises(HookError, match="belongs to no layer"):
        head.layer()
    stream.clear_context()
    assert (stream.ctx, head.ctx) == ({}, {"runs": 2})
    lens.reset_hooks(clear_contexts=False)
    assert head.ctx == {"runs": 2}
    lens.run_with_hooks(*ARGS, fwd_hooks=[("unembed.hook_in", count)], clear_contexts=True)
    assert head.ctx == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda v: v[:, :3], r"float32 \[2, 3, 32\] on cpu, and the value is .* \[2, 7, 32\]"),
        (lambda v: v[:1, :1], r"returned torch.float32 \[1, 1, 32\]"),
        (lambda v: v.double(), r"returned torch.float64 \[2, 7, 32\]"),
        (lambda v: v.to("meta"), "on meta, and the value is .* on cpu"),
        (lambda v: 0.0, "returned float, not a tensor or None"),
        (lambda v: (v, None), "returned tuple, not a tensor or None"),
        (lambda v: v.detach().numpy(), "returned ndarray, not a tensor or None"),
    ],
)
def test_a_hook_that_returns_something_else_is_an_error_that_names_it(
    lens: lensfx.Lens, wrong: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(HookError, match=message) as caught:
        lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, lambda value, hook: wrong(value))])
    assert MID in str(caught.value)
    assert "try: return" in str(caught.value)
    assert torch.equal(lens(*ARGS)[0], MODEL(*ARGS)[0])


@pytest.mark.parametrize(
    "name", ["blocks.0.hook_resid_md", ["hook_embed", "blocks.0.hook_resid_md"]]
)
def test_an_unknown_name_is_an_error_that_lists_the_nearest(lens: lensfx.Lens, name: Any) -> None:
    calls: Calls = []
    pairs = [(MID, lambda value, hook: calls.append((hook.name, 0))), (name, zero)]
    for attach in (
        lambda: lens.run_with_hooks(*ARGS, fwd_hooks=pairs),
        lambda: lens.run_with_hooks(*ARGS, bwd_hooks=pairs),
        lambda: lens.add_hook(name, zero),
    ):
        with pytest.raises(
            UnknownNameError, match=r"hook_resid_md'\n.*nearest are.*hook_resid_mid"
        ):
            attach()
    lens(*ARGS)
    assert calls == []


def test_a_context_removes_its_own_hooks_and_no_others(lens: lensfx.Lens) -> None:
    calls: Calls = []

    def note(value: Tensor, hook: HookPoint) -> None:
        calls.append((hook.name, len(calls)))

    def count() -> int:
        calls.clear()
        lens(*ARGS)
        return len(calls)

    lens.add_hook(MID, note)
    with lens.hooks(fwd_hooks=[(MID, note), ("hook_embed", note)]) as entered:
        assert entered is lens
        with lens.hooks(fwd_hooks=[(MID, note)]):
            assert count() == 4
        assert count() == 3
        lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, note)])
        assert count() == 3
    assert count() == 1
    with lens.hooks(fwd_hooks=[(MID, note)], reset_hooks_end=False):
        pass
    assert count() == 2


def test_an_exception_inside_a_context_leaves_no_hook_behind(lens: lensfx.Lens) -> None:
    with pytest.raises(ZeroDivisionError):
        with lens.hooks(fwd_hooks=[(MID, zero)]), lens.hooks(fwd_hooks=[("hook_embed", zero)]):
            raise ZeroDivisionError
    assert torch.equal(lens(*ARGS)[0], MODEL(*ARGS)[0])


def test_a_hook_that_raises_leaves_the_lens_usable(lens: lensfx.Lens) -> None:
    def fail(value: Tensor, hook: HookPoint) -> None:
        raise ZeroDivisionError(hook.name)

    with pytest.raises(ZeroDivisionError, match=MID):
        lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, fail)])
    with pytest.raises(ZeroDivisionError, match=MID):
        lens.run_with_hooks(*ARGS, bwd_hooks=[(MID, fail)])[1].backward()
    assert torch.equal(lens(*ARGS)[0], MODEL(*ARGS)[0])


def test_reset_keeps_permanent_hooks_and_the_other_direction(lens: lensfx.Lens) -> None:
    calls: list[str] = []

    def note(label: str) -> Callable[[Tensor, HookPoint], None]:
        return lambda value, hook: calls.append(label)

    def heard() -> list[str]:
        calls.clear()
        lens(*ARGS)[1].backward()
        MODEL.zero_grad()
        return list(calls)

    lens.add_hook(MID, note("fwd"))
    lens.add_hook(MID, note("kept"), is_permanent=True)
    lens.add_hook(MID, note("bwd"), dir="bwd")
    assert heard() == ["fwd", "kept", "bwd"]
    lens.reset_hooks(direction="fwd")
    assert heard() == ["kept", "bwd"]
    lens.reset_hooks(direction="bwd")
    assert heard() == ["kept"]
    lens.reset_hooks()
    assert heard() == ["kept"]
    lens.reset_hooks(including_permanent=True)
    assert heard() == []


def test_the_same_function_attached_twice_runs_twice(lens: lensfx.Lens) -> None:
    def halve(value: Tensor, hook: HookPoint) -> Tensor:
        return value / 2

    twice = lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, halve), (MID, halve)])[0]
    once = lens.run_with_hooks(*ARGS, fwd_hooks=[(MID, lambda value, hook: value / 4)])[0]
    assert torch.equal(twice, once)


def test_what_cannot_be_attached_is_refused(lens: lensfx.Lens) -> None:
    with pytest.raises(UnknownNameError, match="holds for no hook name"):
        lens.run_with_hooks(*ARGS, fwd_hooks=[(lambda n: "hook_rot_q" in n, zero)])
    with pytest.raises(HookError, match="a hook is a function of"):
        lens.add_hook(MID, None)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="dir='forward' is no direction"):
        lens.add_hook(MID, zero, dir="forward")
    with pytest.raises(HookError, match="direction='all' is none"):
        lens.reset_hooks(direction="all")
