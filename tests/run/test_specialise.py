"""A request becomes a graph that holds what was asked for and nothing else."""

from __future__ import annotations

import contextlib
import gc
import linecache
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, randomise
from models.nanogpt import GPT, GPTConfig, ids_and_targets
from torch import Tensor, nn

import lensfx
from lensfx.run.specialise import KEPT, Run

Edit = Callable[[Tensor], Tensor]

LAYERS = 4
MODEL: Any = randomise(GPT(GPTConfig(n_layer=LAYERS)), 0).eval()
ARGS = ids_and_targets(2, 7, 0)[0]


@pytest.fixture(scope="module")
def lens() -> lensfx.Lens:
    return lensfx.wrap(MODEL, *ARGS, passes=None, verify=False)


def latest(lens: lensfx.Lens) -> Run:
    """What the last call ran."""
    return next(reversed(lens._variants.main.runs._runs.values()))


def nodes(lens: lensfx.Lens, **request: Any) -> int:
    lens.run_with_cache(*ARGS, **request)
    return latest(lens).nodes


def nothing(value: Tensor, hook: lensfx.HookPoint) -> None:
    pass


def test_a_plain_run_holds_no_hook_point(lens: lensfx.Lens) -> None:
    lens(*ARGS)
    plain = latest(lens)
    calls = [n for n in lens.program.graph.nodes if n.op == "call_function"]
    hooks = [n for n in calls if n.target is lensfx.graph.hook_point]
    assert len(hooks) > 8 * LAYERS
    # Nor the copies of the positions that their hook point is shown.
    copies = [n for n in calls if n.target is torch.ops.aten.expand_as.default]
    assert len(copies) == 1
    assert plain.nodes == len(calls) - len(hooks) - len(copies)
    assert "hook_point" not in plain.forward.__code__.co_names


def test_asking_for_nothing_is_the_plain_run(lens: lensfx.Lens) -> None:
    lens(*ARGS)
    plain = latest(lens)
    lens.run_with_cache(*ARGS, names_filter=[])
    assert latest(lens) is plain
    lens.run_with_hooks(*ARGS)
    assert latest(lens) is plain


def test_reading_costs_no_operator_and_an_edit_one(lens: lensfx.Lens) -> None:
    lens(*ARGS)
    plain = latest(lens).nodes
    assert nodes(lens, names_filter="blocks.0.hook_resid_mid") == plain
    assert nodes(lens, names_filter=lambda n: "resid" in n or "mlp" in n) == plain
    assert nodes(lens, names_filter="blocks.0.ln1.hook_scale") == plain + 1
    with lens.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", nothing)]):
        assert nodes(lens, names_filter="blocks.0.hook_resid_mid") == plain + 1
    lens(*ARGS)
    assert latest(lens).nodes == plain


def test_stopping_computes_only_what_comes_before(lens: lensfx.Lens) -> None:
    lens(*ARGS)
    plain = latest(lens)
    counts = [nodes(lens, names_filter=[], stop_at_layer=i) for i in range(LAYERS + 1)]
    steps = [b - a for a, b in pairwise(counts)]
    assert max(steps) - min(steps) <= 1
    assert counts[0] <= 5
    assert counts[1] < plain.nodes / 3
    first = nodes(lens, names_filter="blocks.0.hook_mlp_out", stop_at_layer=1)
    assert first == counts[1]
    read = {id(w) for w in latest(lens).weights}
    later = [q for i in range(1, LAYERS) for q in MODEL.transformer.h[i].parameters()]
    assert not read & {id(q) for q in later}


@pytest.mark.parametrize("layer", [*range(LAYERS + 1), *range(-LAYERS, 0)])
def test_a_stop_gives_the_stream_before_that_block(lens: lensfx.Lens, layer: int) -> None:
    _, cache = lens.run_with_cache(*ARGS, names_filter=lambda n: "resid" in n)
    index = layer % LAYERS if layer != LAYERS else LAYERS
    want = cache["resid_post", -1] if index == LAYERS else cache["resid_pre", index]
    got, kept = lens.run_with_cache(*ARGS, stop_at_layer=layer)
    assert torch.equal(got, want)
    assert all(n in cache or "resid" not in n for n in kept)
    assert not any(f"blocks.{index}.ln1" in n for n in kept)
    assert ("blocks.0.hook_attn_out" in kept) == (index > 0)


def test_what_lies_behind_a_stop_is_refused_by_name_and_left_out_by_filter(
    lens: lensfx.Lens,
) -> None:
    names = ["blocks.0.hook_attn_out", "blocks.2.hook_attn_out"]
    with pytest.raises(lensfx.LensError, match=r"blocks\.2\.hook_attn_out is not computed before"):
        lens.run_with_cache(*ARGS, names_filter=names, stop_at_layer=2)
    with pytest.raises(lensfx.LensError, match="is not computed before"):
        lens.run_with_cache(*ARGS, names_filter="unembed.hook_out", stop_at_layer=-1)
    _, kept = lens.run_with_cache(*ARGS, names_filter=lambda n: n in names, stop_at_layer=2)
    assert list(kept) == names[:1]
    for wrong in (LAYERS + 1, -LAYERS - 1):
        with pytest.raises(lensfx.LensError, match=f"stop_at_layer={wrong}, but there are 4"):
            lens.run_with_cache(*ARGS, stop_at_layer=wrong)


def test_hooks_behind_a_stop_are_not_called_and_those_before_are(lens: lensfx.Lens) -> None:
    seen: list[str] = []
    stream = [(lambda n: n.endswith("resid_pre"), lambda value, hook: seen.append(hook.name))]
    with lens.hooks(fwd_hooks=[*stream, ("blocks.0.hook_attn_out", lambda v, h: v * 0)]):
        edited, _ = lens.run_with_cache(*ARGS, names_filter=[], stop_at_layer=1)
    assert seen == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    block = MODEL.transformer.h[0]
    x = lens.run_with_cache(*ARGS, stop_at_layer=0)[0]
    assert torch.equal(edited, x + block.mlp(block.ln_2(x)))


def test_a_request_is_compiled_once(lens: lensfx.Lens) -> None:
    lens.run_with_cache(*ARGS, names_filter="hook_embed")
    first = latest(lens)
    lens(*ARGS)
    lens.run_with_cache(*(a[:1, :3] for a in ARGS), names_filter="hook_embed")
    assert latest(lens) is first
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    lens.run_with_hooks(*ARGS, fwd_hooks=[(n, nothing) for n in names])
    edited = latest(lens)
    lens.run_with_hooks(*ARGS, fwd_hooks=[(n, lambda v, h: v * 2) for n in reversed(names)])
    assert latest(lens) is edited


def test_hooks_of_a_shared_run_do_not_leak_into_the_next(lens: lensfx.Lens) -> None:
    name = "blocks.0.hook_mlp_out"
    want = MODEL(*ARGS)[0]
    assert torch.equal(lens.run_with_hooks(*ARGS, fwd_hooks=[(name, nothing)])[0], want)
    edited = lens.run_with_hooks(*ARGS, fwd_hooks=[(name, lambda v, h: v * 2)])[0]
    assert not torch.equal(edited, want)
    assert torch.equal(lens.run_with_hooks(*ARGS, fwd_hooks=[(name, nothing)])[0], want)


def test_many_requests_keep_few_runs_and_leave_nothing_behind(lens: lensfx.Lens) -> None:
    names = [n for n in lens.hook_names if "scale" not in n]
    assert len(names) > 100

    def ask(first: int, last: int) -> None:
        with torch.no_grad():
            for i in range(first, last):
                pair = [names[i % 100], names[(i * 7 + i // 100) % 100]]
                lens.run_with_cache(*ARGS, names_filter=pair)

    ask(0, 60)
    gc.collect()
    lines, objects = len(linecache.cache), len(gc.get_objects())
    ask(60, 300)
    gc.collect()
    assert len(lens._variants.main.runs._runs) == KEPT
    assert len(linecache.cache) == lines
    # A run left behind is some hundred objects; 240 of them would show.
    assert len(gc.get_objects()) - objects < 2000
    assert torch.equal(lens(*ARGS)[0], MODEL(*ARGS)[0])


def test_a_run_in_use_outlives_ones_that_are_not(lens: lensfx.Lens) -> None:
    lens.run_with_cache(*ARGS, names_filter="hook_embed")
    kept = latest(lens)
    for name in [n for n in lens.hook_names if n.startswith("transformer")][:40]:
        lens.run_with_cache(*ARGS, names_filter=name)
        lens.run_with_cache(*ARGS, names_filter="hook_embed")
        assert latest(lens) is kept


def test_two_lenses_of_one_model_know_nothing_of_each_other(lens: lensfx.Lens) -> None:
    other = lensfx.Lens(lens.program)
    other.add_hook("hook_embed", lambda value, hook: value * 0)
    assert torch.equal(lens(*ARGS)[0], MODEL(*ARGS)[0])
    assert not torch.equal(other(*ARGS)[0], MODEL(*ARGS)[0])


class Noisy(nn.Module):
    """Draws in each of two layers, of which a request may ask for one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x + torch.randn_like(x))
        return x + self.second(x + torch.rand_like(x))


def test_a_random_model_draws_the_same_numbers_whatever_is_asked_for() -> None:
    model, ids = Noisy(), torch.arange(6).view(2, 3)
    lens = lensfx.wrap(model, ids, passes=None, verify=False)

    def drawn(call: Callable[[], Tensor]) -> Tensor:
        torch.manual_seed(5)
        return torch.cat([call().flatten(), torch.rand(1)])

    want = drawn(lambda: model(ids))
    assert torch.equal(drawn(lambda: lens(ids)), want)
    assert torch.equal(drawn(lambda: lens.run_with_cache(ids, names_filter="hook_embed")[0]), want)


def test_a_model_in_training_is_run_as_in_eval_mode_and_the_report_says_so() -> None:
    model = randomise(GPT(GPTConfig(dropout=0.3)), 0).train()
    lens = lensfx.wrap(model, *ARGS, passes=None, verify=False)
    assert "training mode" in str(lens.report)
    assert model.training
    assert torch.equal(lens(*ARGS)[0], model.eval()(*ARGS)[0])


@contextlib.contextmanager
def dividing(norm: Any, edit: Edit) -> Iterator[None]:
    """A layer norm that divides by an edited deviation, written out."""

    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return centred / edit(scale) * norm.weight + norm.bias

    norm.forward = forward
    try:
        yield
    finally:
        del norm.forward


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("blocks.0.ln1.hook_scale", "transformer.h.0.ln_1"),
        ("blocks.1.ln2.hook_scale", "transformer.h.1.ln_2"),
        ("ln_final.hook_scale", "transformer.ln_f"),
    ],
)
def test_an_edited_scale_is_what_the_norm_divides_by(
    lens: lensfx.Lens, name: str, path: str
) -> None:
    with dividing(MODEL.get_submodule(path), lambda scale: scale * 1.5 + 0.25):
        want = MODEL(*ARGS)[0]
    got = lens.run_with_hooks(*ARGS, fwd_hooks=[(name, lambda value, hook: value * 1.5 + 0.25)])
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)


def test_the_scale_comes_before_the_result_of_its_norm(lens: lensfx.Lens) -> None:
    scale, norm = "blocks.0.ln1.hook_scale", "transformer.h.0.ln_1.layer_norm"
    edits: Any = [(scale, lambda value, hook: value * 2)]
    with lens.hooks(fwd_hooks=edits):
        _, cache = lens.run_with_cache(*ARGS, names_filter=[norm, scale])
        _, also = lens.run_with_cache(*ARGS, names_filter="blocks.0.ln1.hook_normalized")
    gain, bias = (getattr(MODEL.transformer.h[0].ln_1, n) for n in ("weight", "bias"))
    assert torch.equal(cache[norm], also["normalized", 0, "ln1"] * gain + bias)
    with lens.hooks(fwd_hooks=[(norm, lambda value, hook: value * 0), *edits]):
        _, cache = lens.run_with_cache(*ARGS, names_filter=[norm, scale])
    assert not cache[norm].any()


def test_an_edited_pattern_is_the_one_that_weighs_the_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["llamalike"]
    model, args = case.build(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, passes=None, verify=False)
    name = next(n for n in lens.hook_names if n.startswith("layers.1") and "softmax" in n)

    def to_first(pattern: Tensor) -> Tensor:
        only = torch.zeros_like(pattern)
        only[..., 0] = 1
        return torch.where(torch.arange(4)[:, None, None] == 3, only, pattern)

    got = lens.run_with_hooks(*args, fwd_hooks=[(name, lambda value, hook: to_first(value))])
    softmax, calls = F.softmax, []

    def edited(scores: Tensor, dim: int) -> Tensor:
        calls.append(scores)
        pattern = softmax(scores, dim=dim)
        return to_first(pattern) if len(calls) == 2 else pattern

    monkeypatch.setattr(F, "softmax", edited)
    assert torch.equal(got, model(*args))
    assert len(calls) == 2
