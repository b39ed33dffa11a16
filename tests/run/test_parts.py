"""What is no value of the graph as it stands: patterns inside fused attention, results, copies."""

from __future__ import annotations

import dis
from typing import Any

import pytest
import torch
from taps import (
    HEADS,
    KINDS,
    Decoder,
    Kind,
    decoder,
    inputs,
    lens,
    model,
    parts,
    sites,
    written_out,
)
from torch import Tensor

import lensfx
from lensfx.run.specialise import Run

SDPA = "scaled_dot_product_attention"


def values(kind: Kind, ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Every named value, by hand."""
    held: dict[str, Tensor] = {}

    def hold(name: str, value: Tensor) -> Tensor:
        return held.setdefault(name, value)

    with torch.no_grad():
        written_out(model(kind), ids, keep, hold)
    return held


def latest(found: lensfx.Lens) -> Run:
    return next(reversed(found._variants.main.runs._runs.values()))


def fused(run: Run) -> int:
    """How often a run calls the fused attention."""
    steps = dis.get_instructions(run.forward)
    return sum(
        step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == SDPA for step in steps
    )


# reading


@pytest.mark.parametrize("size", [(2, 6), (1, 6), (3, 1), (1, 1)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_are_what_they_are_by_hand(kind: Kind, size: tuple[int, int]) -> None:
    args = inputs(*size)
    with torch.no_grad():
        out, kept = lens(kind).run_with_cache(*args)
    assert torch.equal(out, model(kind)(*args))
    want = values(kind, *args)
    names = [n for n in lens(kind).hook_names if "hook_" in n]
    assert {n for n in want if "hook_attn_in" not in n or kind.kv == HEADS} <= set(names)
    for name in set(want) & set(names):
        assert kept[name].shape == want[name].shape, name
        torch.testing.assert_close(kept[name], want[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reading_any_of_them_changes_no_bit(kind: Kind) -> None:
    args = inputs(2, 6)
    want = model(kind)(*args)
    for name in parts(kind):
        assert torch.equal(lens(kind).run_with_cache(*args, names_filter=name)[0], want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Kind("causal"), Kind("bool", kv=2, norm="hand")], ids=str)
def test_low_precision(kind: Kind, dtype: torch.dtype) -> None:
    low, args = decoder(kind, dtype), inputs(2, 6)
    found = lensfx.wrap(low, *args, passes=None, verify=False)
    with torch.no_grad():
        plain = low(*args)
        out, kept = found.run_with_cache(*args)
        looked = found.run_with_hooks(*args, fwd_hooks=[(parts(kind), lambda v, h: None)])
    assert torch.equal(out, plain)
    assert torch.equal(looked, plain)
    eps = torch.finfo(dtype).eps
    total = kept["blocks.0.attn.hook_result"].double().sum(-2) + low.blocks[0].o.bias.double()
    written = kept["blocks.0.hook_attn_out"].double()
    torch.testing.assert_close(total, written, rtol=0, atol=20 * eps)
    # As the kernels do, the scores and the pattern stay in float32.
    wide = torch.promote_types(dtype, torch.float32)
    for name in parts(kind):
        inside = name.endswith(("scores", "pattern"))
        assert kept[name].dtype == (wide if inside else dtype), name
    rows = kept["blocks.0.attn.hook_pattern"].sum(-1)
    assert bool(((rows - 1).abs() < 1e-5).logical_or(rows == 0).all())


def test_a_row_that_sees_no_key_has_an_empty_pattern() -> None:
    kind, args = Kind("float"), inputs(2, 6)
    _, kept = lens(kind).run_with_cache(*args)
    pattern, scores = (kept[f"blocks.0.attn.hook_{n}"] for n in ("pattern", "attn_scores"))
    assert not pattern[1, :, :2].any()
    assert (scores[1, :, :2] == -torch.inf).all()
    assert not pattern.isnan().any()
    torch.testing.assert_close(pattern[1, :, 2:].sum(-1), torch.ones(4, 4).double())


# editing


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_edits_do_what_they_do_by_hand(kind: Kind) -> None:
    args, plain = inputs(2, 6), model(kind)(*inputs(2, 6))
    point = lensfx.HookPoint("")
    for name in parts(kind):

        def tap(at: str, value: Tensor, name: str = name) -> Tensor:
            return sites(value, point) if at == name else value

        with torch.no_grad():
            want = written_out(model(kind), *args, tap)
            got = lens(kind).run_with_hooks(*args, fwd_hooks=[(name, sites)])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)
        assert not torch.allclose(got, plain), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("back", ["nothing", "value", "copy"])
def test_a_hook_that_changes_nothing_changes_no_bit(kind: Kind, back: str) -> None:
    given = {"nothing": lambda v, h: None, "value": lambda v, h: v, "copy": lambda v, h: v.clone()}
    args = inputs(2, 6)
    want = model(kind)(*args)
    for hooked in (*([n] for n in parts(kind)), parts(kind)):
        got = lens(kind).run_with_hooks(*args, fwd_hooks=[(hooked, given[back])])
        assert torch.equal(got, want), hooked


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[7]], ids=str)
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_an_edited_copy_reaches_one_head_and_no_other(kind: Kind, letter: str) -> None:
    args = inputs(2, 6)

    def edit(value: Tensor, hook: lensfx.HookPoint) -> None:
        value[:, :, 1] *= torch.linspace(0, 1, value.shape[-1], dtype=value.dtype)

    names = [f"blocks.1.attn.hook_{n}" for n in ("q", "k", "v")]
    _, plain = lens(kind).run_with_cache(*args, names_filter=names)
    with torch.no_grad(), lens(kind).hooks(fwd_hooks=[(f"blocks.1.hook_{letter}_input", edit)]):
        _, changed = lens(kind).run_with_cache(*args)
    for name in names:
        moved = (changed[name] - plain[name]).abs().amax((0, 1, 3)) > 1e-9
        wanted = torch.zeros(len(moved), dtype=torch.bool)
        wanted[1] = name.endswith(letter)
        assert torch.equal(moved, wanted), name
    mid = changed["blocks.1.hook_resid_pre"] + changed["blocks.1.hook_attn_out"]
    assert torch.equal(changed["blocks.1.hook_resid_mid"], mid)


def test_the_shared_copy_is_seen_once_and_read_by_all_three() -> None:
    seen: list[str] = []

    def edit(value: Tensor, hook: lensfx.HookPoint) -> Tensor:
        seen.append(hook.name)
        return sites(value, hook)

    kind, args, name = Kind("causal"), inputs(2, 6), "blocks.0.hook_attn_in"
    names = [f"blocks.0.attn.hook_{n}" for n in ("q", "k", "v")]
    _, plain = lens(kind).run_with_cache(*args, names_filter=names)
    with lens(kind).hooks(fwd_hooks=[(name, edit)]):
        _, changed = lens(kind).run_with_cache(
            *args, names_filter=[*names, "blocks.0.hook_k_input"]
        )
    assert seen == [name]
    assert all(not torch.allclose(changed[n], plain[n]) for n in names)
    _, copies = lens(kind).run_with_cache(*args, names_filter=name)
    torch.testing.assert_close(
        changed["blocks.0.hook_k_input"], sites(copies[name], lensfx.HookPoint(name))
    )


def test_two_edits_inside_one_attention_act_one_after_the_other() -> None:
    kind, args = Kind("bool"), inputs(2, 6)
    names = [f"blocks.0.attn.hook_{n}" for n in ("attn_scores", "pattern", "z", "result")]
    point = lensfx.HookPoint("")
    with torch.no_grad():
        want = written_out(model(kind), *args, lambda n, v: sites(v, point) if n in names else v)
        got = lens(kind).run_with_hooks(*args, fwd_hooks=[(names, sites)])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[9]], ids=str)
@pytest.mark.parametrize(
    "pair",
    [
        ("hook_resid_pre", "hook_q_input"),
        ("ln1.hook_normalized", "hook_k_input"),
        ("ln1.hook_scale", "hook_v_input"),
        ("hook_k_input", "attn.hook_k"),
        ("attn.hook_z", "attn.hook_result"),
        ("attn.hook_result", "hook_attn_out"),
        ("ln2.hook_scale", "ln2.hook_normalized"),
        ("hook_resid_mid", "hook_mlp_in"),
    ],
    ids=" ".join,
)
def test_an_edit_on_the_way_to_another_is_not_lost(kind: Kind, pair: tuple[str, str]) -> None:
    args, point = inputs(2, 6), lensfx.HookPoint("")
    names = [f"blocks.1.{n}" for n in pair]
    held: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        held[name] = sites(value, point) if name in names else value
        return held[name]

    with torch.no_grad(), lens(kind).hooks(fwd_hooks=[(names, sites)]):
        want = written_out(model(kind), *args, tap)
        got, kept = lens(kind).run_with_cache(*args, names_filter=names)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    for name in names:
        torch.testing.assert_close(kept[name], held[name], rtol=1e-9, atol=1e-10)


def test_the_results_of_the_heads_and_the_bias_make_the_output() -> None:
    for kind in KINDS:
        _, kept = lens(kind).run_with_cache(*inputs(2, 6))
        for i, block in enumerate(model(kind).blocks):
            total = kept[f"blocks.{i}.attn.hook_result"].sum(-2) + block.o.bias
            out = kept[f"blocks.{i}.hook_attn_out"]
            torch.testing.assert_close(total, out, rtol=1e-12, atol=1e-13)


# gradients


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_those_of_the_model_by_hand(kind: Kind) -> None:
    args, names = inputs(2, 6), parts(kind)
    held: dict[str, Tensor] = {}

    def hold(name: str, value: Tensor) -> Tensor:
        if name in names:
            value = value.clone()
            value.retain_grad()
            held[name] = value
        return value

    def score(logits: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        return (logits * weights.view_as(logits)).sum()

    score(written_out(model(kind), *args, hold)).backward()
    want = {n: q.grad.clone() for n, q in model(kind).named_parameters() if q.grad is not None}
    model(kind).zero_grad()
    seen: dict[str, Tensor] = {}
    hooks = [(names, lambda grad, hook: seen.__setitem__(hook.name, grad.clone()))]
    score(lens(kind).run_with_hooks(*args, bwd_hooks=hooks)).backward()
    got = {n: q.grad.clone() for n, q in model(kind).named_parameters() if q.grad is not None}
    model(kind).zero_grad()
    assert set(seen) == set(names)
    for name in names:
        torch.testing.assert_close(
            seen[name], held[name].grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m
        )
    assert set(got) == set(want)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-8, atol=1e-9)


class Scored(torch.nn.Module):
    def __init__(self, inner: Decoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        return self.inner(ids, keep).logsumexp(-1).sum()


def test_a_cache_of_gradients_leaves_the_loss_and_agrees_with_differences() -> None:
    kind, args = Kind("causal", kv=2), inputs(1, 5)
    scored = Scored(model(kind))
    found = lensfx.wrap(scored, *args, passes=None, verify=False)
    names = [n for n in parts(kind) if n.startswith("blocks.0")]
    loss, kept = found.run_with_cache(*args, names_filter=names, incl_bwd=True)
    model(kind).zero_grad()
    assert torch.equal(loss, scored(*args))
    assert sorted(kept) == sorted([*names, *(f"{n}_grad" for n in names)])
    for name in names:
        way = torch.linspace(-1, 1, kept[name].numel(), dtype=torch.float64).view_as(kept[name])

        def moved(step: float, name: str = name, way: Tensor = way) -> float:
            hooks = [(name, lambda value, hook: value + step * way)]
            with torch.no_grad():
                return float(found.run_with_hooks(*args, fwd_hooks=hooks))

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        grad = kept[f"{name}_grad"]
        assert float((grad * way).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8), name


def test_a_gradient_can_be_dropped_inside_the_attention() -> None:
    kind, args = Kind("causal"), inputs(2, 6)
    name = "blocks.1.attn.hook_pattern"
    out = lens(kind).run_with_hooks(*args, bwd_hooks=[(name, lambda g, hook: torch.zeros_like(g))])
    assert torch.equal(out, model(kind)(*args))
    out.sum().backward()
    block = model(kind).blocks[1]
    assert not block.q.weight.grad.any()
    assert not block.k.weight.grad.any()
    assert block.v.weight.grad.any()
    model(kind).zero_grad()


# what it costs


def test_the_rest_of_the_model_keeps_its_fused_attention() -> None:
    kind, args = Kind("causal"), inputs(2, 6)
    found = lens(kind)
    found(*args)
    plain = latest(found)
    assert fused(plain) == 2
    found.run_with_cache(*args, names_filter="blocks.1.attn.hook_pattern")
    assert fused(latest(found)) == 2
    assert latest(found).nodes > plain.nodes
    found.run_with_hooks(*args, fwd_hooks=[("blocks.1.attn.hook_pattern", sites)])
    assert fused(latest(found)) == 2
    found.run_with_cache(*args, names_filter="blocks.0.attn.hook_pattern", stop_at_layer=1)
    assert fused(latest(found)) == 1


def test_a_run_without_hooks_holds_none_of_it() -> None:
    for kind in KINDS:
        found = lens(kind)
        found.reset_hooks()
        found(*inputs(2, 6))
        bare = lensfx.capture(model(kind), *inputs(2, 6))
        wanted = sum(n.op == "call_function" for n in bare.graph.nodes)
        assert latest(found).nodes <= wanted


@pytest.mark.parametrize("kind", [Kind("causal"), Kind("bool", kv=2, norm="hand")], ids=str)
def test_it_compiles_whole(kind: Kind) -> None:
    args = inputs(2, 6)
    compiled = torch.compile(lens(kind).module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), model(kind)(*args))


# modes


def test_edits_in_training_mode() -> None:
    kind, args = Kind("causal"), inputs(2, 6)
    own = decoder(kind)
    found = lensfx.wrap(own, *args, passes=None, verify=False)
    found.training = True
    name = "blocks.0.attn.hook_pattern"
    got = found.run_with_hooks(*args, fwd_hooks=[(name, sites)])
    want = lens(kind).run_with_hooks(*args, fwd_hooks=[(name, sites)])
    assert torch.equal(got, want)
    assert torch.equal(found(*args), own(*args))


def test_grad_mode_makes_no_difference_to_an_edit() -> None:
    for kind in (Kind("float"), Kind("causal", kv=2, norm="rms")):
        for name in parts(kind):
            hooks: Any = [(name, sites)]
            want = lens(kind).run_with_hooks(*inputs(2, 6), fwd_hooks=hooks)
            with torch.no_grad():
                got = lens(kind).run_with_hooks(*inputs(2, 6), fwd_hooks=hooks)
            assert torch.equal(got, want), name
            assert want.requires_grad
