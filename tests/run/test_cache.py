"""A cache holds what the model computes, and gradients what autograd says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, nn

import lensfx
from lensfx import ActivationCache, HookError, HookPoint, UnknownNameError

MODEL = CASES["nanogpt_targets"].build()
ARGS = CASES["nanogpt_targets"].inputs(2, 7, 0)[0]
ONE = CASES["nanogpt_targets"].inputs(1, 7, 4)[0]
Z = "transformer.h.0.attn.scaled_dot_product_attention"

OUTPUTS = {
    "transformer.wte": ["hook_embed", "transformer.wte.embedding"],
    "transformer.wpe": ["hook_pos_embed"],
    "transformer.h.0.ln_1": ["transformer.h.0.ln_1.layer_norm"],
    "transformer.h.0.attn": ["blocks.0.hook_attn_out", "transformer.h.0.attn.c_proj.linear"],
    "transformer.h.0.ln_2": ["transformer.h.0.ln_2.layer_norm"],
    "transformer.h.0.mlp.c_fc": ["transformer.h.0.mlp.c_fc.linear", "blocks.0.mlp.hook_pre"],
    "transformer.h.0.mlp.gelu": ["transformer.h.0.mlp.gelu.gelu", "blocks.0.mlp.hook_post"],
    "transformer.h.0.mlp": ["blocks.0.hook_mlp_out"],
    "transformer.h.0": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"],
    "transformer.h.1.attn": ["blocks.1.hook_attn_out"],
    "transformer.h.1.mlp": ["blocks.1.hook_mlp_out"],
    "transformer.h.1": ["blocks.1.hook_resid_post"],
    "transformer.ln_f": ["unembed.hook_in"],
    "lm_head": ["unembed.hook_out", "lm_head.linear"],
}


@pytest.fixture(scope="module")
def lens() -> lensfx.Lens:
    return lensfx.wrap(MODEL, *ARGS, passes=None, verify=False)


@contextlib.contextmanager
def outputs_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The result of each module that returns one tensor, with its gradient retained."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.requires_grad:
            out.retain_grad()
            seen[path] = out

    handles = [
        module.register_forward_hook(lambda m, given, out, path=path: keep(path, out))
        for path, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("size", [(2, 7), (1, 5), (3, 1), (1, 1), (2, 32)])
def test_values_are_what_the_modules_return(lens: lensfx.Lens, size: tuple[int, int]) -> None:
    args = CASES["nanogpt_targets"].inputs(*size, 2)[0]
    with outputs_of(MODEL) as seen:
        MODEL(*args)
    _, cache = lens.run_with_cache(*args)
    for path, names in OUTPUTS.items():
        for name in names:
            # Positions are shown as they are added: a copy for each row.
            rows = name == "hook_pos_embed"
            assert torch.equal(cache[name], seen[path].expand(*size, -1) if rows else seen[path])
    for name, x in (("blocks.0.ln1", "blocks.0.hook_resid_pre"), ("ln_final", ("resid_post", -1))):
        bare = torch.nn.functional.layer_norm(cache[x], (32,))
        assert torch.equal(cache[f"{name}.hook_normalized"], bare)


@pytest.mark.parametrize("name", ["hf_gpt2", "llamalike", "encdec"])
def test_every_module_of_a_model_is_found_below_its_own_path(name: str) -> None:
    model = CASES[name].build()
    args, kwargs = CASES[name].inputs(2, 7, 0)
    lens = lensfx.wrap(model, *args, passes=None, verify=False, **kwargs)
    with outputs_of(model) as seen:
        model(*args, **kwargs)
    _, cache = lens.run_with_cache(*args, **kwargs)
    found = 0
    for path, out in seen.items():
        below = [n for n in cache if path and n.startswith(f"{path}.")]
        assert not below or any(torch.equal(cache[n], out) for n in below), path
        found += bool(below)
    assert found > 15


def test_the_filter_takes_what_people_write(lens: lensfx.Lens) -> None:
    def kept(names_filter: Any) -> list[str]:
        return list(lens.run_with_cache(*ARGS, names_filter=names_filter)[1])

    pair = ["blocks.1.hook_resid_pre", "hook_embed"]
    assert kept(None) == lens.hook_names
    assert kept("hook_embed") == ["hook_embed"]
    assert kept(pair) == pair
    assert kept(tuple(pair)) == pair
    assert kept([*pair, *pair]) == pair
    assert set(kept(set(pair))) == set(pair)
    assert kept([]) == []
    assert kept(lambda n: n in pair) == pair[::-1]
    assert kept(lambda n: n.endswith("hook_scale"))[-1] == "ln_final.hook_scale"


@pytest.mark.parametrize("wrong", ["blocks.0.hook_resid_mud", ["hook_embed", "blocks.0.resid_mid"]])
def test_an_unknown_name_is_refused_with_the_nearest(lens: lensfx.Lens, wrong: Any) -> None:
    with pytest.raises(
        UnknownNameError, match=r"there is no hook point .*\n.*blocks\.0\.hook_resid_mid"
    ):
        lens.run_with_cache(*ARGS, names_filter=wrong)
    with pytest.raises(KeyError):
        lens.run_with_cache(*ARGS, names_filter=wrong)
    with pytest.raises(UnknownNameError, match="holds for no hook name"):
        lens.run_with_cache(*ARGS, names_filter=lambda n: False)


def test_positions_are_sliced_on_the_axis_that_has_them(lens: lensfx.Lens) -> None:
    _, whole = lens.run_with_cache(*ARGS)
    # The loss has no positions, and before it the model joins them with the batch.
    without = {"reshape", "reshape_1", "cross_entropy_loss"}
    for wanted in (slice(1, 5), slice(None, None, 2), slice(-3, None), 3, -1, (1, 4)):
        _, cut = lens.run_with_cache(*ARGS, pos_slice=wanted)
        part = slice(*wanted) if isinstance(wanted, tuple) else wanted
        for name in whole:
            value = whole[name]
            if name not in without:
                value = value[(slice(None),) * value.shape.index(7) + (part,)]
            assert torch.equal(cut[name], value), name


def test_a_value_of_the_last_position_only_is_returned_whole() -> None:
    case = CASES["nanogpt"]
    model, args = case.build(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, passes=None, verify=False)
    for wanted in (3, slice(2, 5)):
        _, cut = lens.run_with_cache(*args, pos_slice=wanted)
        assert torch.equal(cut["unembed.hook_out"], model(*args)[0])


def test_the_batch_axis_goes_where_there_is_one(lens: lensfx.Lens) -> None:
    _, whole = lens.run_with_cache(*ONE)
    _, flat = lens.run_with_cache(*ONE, remove_batch_dim=True)
    assert flat["hook_embed"].shape == (7, 32)
    assert flat["hook_pos_embed"].shape == (7, 32)
    assert flat[Z].shape == (4, 7, 8)
    assert flat["unembed.hook_out"].shape == (7, 61)
    assert flat["cross_entropy_loss"].shape == ()
    assert all(torch.equal(flat[n].flatten(), whole[n].flatten()) for n in whole)
    _, last = lens.run_with_cache(*ONE, remove_batch_dim=True, pos_slice=-1)
    assert last["resid_post", -1].shape == (32,)
    with pytest.raises(lensfx.LensError, match="needs a batch of 1, and hook_embed has 2"):
        lens.run_with_cache(*ARGS, remove_batch_dim=True)


def test_values_can_go_to_another_device_or_into_a_dict(lens: lensfx.Lens) -> None:
    out, cache = lens.run_with_cache(*ARGS, device="meta")
    assert {v.device.type for v in cache.values()} == {"meta"}
    assert out[0].device.type == "cpu"
    assert cache["hook_embed"].shape == (2, 7, 32)
    _, here = lens.run_with_cache(*ARGS)
    assert {v.device.type for v in here.to("meta").values()} == {"meta"}
    _, plain = lens.run_with_cache(*ARGS, names_filter="hook_embed", return_cache_object=False)
    assert type(plain) is dict
    assert list(plain) == ["hook_embed"]


def test_values_are_detached_and_the_result_is_not(lens: lensfx.Lens) -> None:
    out, cache = lens.run_with_cache(*ARGS)
    assert not any(v.requires_grad for v in cache.values())
    assert out[1].requires_grad


def test_the_cache_shows_what_readers_read_after_every_hook(lens: lensfx.Lens) -> None:
    with lens.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda v, h: torch.ones_like(v))]):
        _, cache = lens.run_with_cache(*ARGS)
    assert (cache["mlp_out", 0] == 1).all()
    assert torch.equal(cache["resid_post", 0], cache["resid_mid", 0] + 1)


def test_a_cache_shares_no_memory_with_the_model() -> None:
    case = CASES["flat"]
    model, args = case.build(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, verify=False)
    _, cache = lens.run_with_cache(*args)
    before = cache["hook_pos_embed"].clone()
    with torch.no_grad():
        model.pos_embed.add_(1)
    assert torch.equal(cache["hook_pos_embed"], before)
    _, cache = lens.run_with_cache(*args)
    held = model.pos_embed.detach().clone()
    for value in cache.values():
        value.zero_()
    assert torch.equal(model.pos_embed, held)


def test_short_names_are_those_of_transformer_lens(lens: lensfx.Lens) -> None:
    _, cache = lens.run_with_cache(*ARGS)
    for short, full in {
        ("resid_pre", 0): "blocks.0.hook_resid_pre",
        ("resid_post", -1): "blocks.1.hook_resid_post",
        ("resid_mid", -2): "blocks.0.hook_resid_mid",
        ("attn_out", 1): "blocks.1.hook_attn_out",
        ("mlp_out", 0, None): "blocks.0.hook_mlp_out",
        ("normalized", 0, "ln1"): "blocks.0.ln1.hook_normalized",
        ("scale", -1, "ln2"): "blocks.1.ln2.hook_scale",
        ("scale", None): "ln_final.hook_scale",
        ("embed",): "hook_embed",
        "normalized": "ln_final.hook_normalized",
        "pos_embed": "hook_pos_embed",
        "embed": "hook_embed",
        "blocks.1.hook_resid_mid": "blocks.1.hook_resid_mid",
    }.items():
        assert cache[short] is cache[full], short  # type: ignore[index]
        assert short in cache
    assert cache.n_layers == 2


def test_parts_of_attention_and_mlp_have_short_names_too() -> None:
    names = [f"blocks.{i}.{n}" for i in range(3) for n in ("attn.hook_q", "attn.hook_pattern")]
    names += ["blocks.1.mlp.hook_pre", "blocks.1.hook_attn_out"]
    cache = ActivationCache({n: torch.tensor(i) for i, n in enumerate(names)}, names)
    assert cache["q", -1] is cache["blocks.2.attn.hook_q"]
    assert cache["query", 0] is cache["q", 0, "a"] is cache["q", 0, "attn"]
    assert cache["attn", 1] is cache["blocks.1.attn.hook_pattern"]
    assert cache["mlp_pre", 1] is cache["pre", 1, "m"] is cache["blocks.1.mlp.hook_pre"]
    assert cache["attn_out", 1] is cache["blocks.1.hook_attn_out"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("resid_pre", 2), "no value"),
        (("resid_pre", -3), "no value"),
        (("resid_prx", 0), r"nearest are blocks\.0\.hook_resid_pre"),
        (("resid_pre", "0"), "no value"),
        (("resid_pre", 0, "ln1", 1), "no value"),
        ((), "no value"),
        ("resid_pre", r"nearest are.*resid_pre"),
        (("attn_out", 0), r"attn_out was not kept in this run\n.*add 'blocks\.0\.hook_attn_out'"),
        ("hook_embed", "not kept in this run"),
        (0, "no value 0"),
    ],
)
def test_a_missing_value_is_an_error_and_never_another_layer(
    lens: lensfx.Lens, key: Any, message: str
) -> None:
    _, cache = lens.run_with_cache(*ARGS, names_filter=lambda n: "resid" in n)
    with pytest.raises(UnknownNameError, match=message):
        cache[key]
    assert key not in cache
    assert cache.get(key) is None


def test_a_cache_reads_as_a_mapping(lens: lensfx.Lens) -> None:
    _, cache = lens.run_with_cache(*ARGS, names_filter=lambda n: n.startswith("blocks.0"))
    assert len(cache) == len(list(cache)) == len(cache.items()) == 23
    assert repr(cache).startswith("ActivationCache with 23 values: blocks.0.hook_resid_pre, ")
    assert repr(cache).endswith("...")
    assert len(repr(cache)) < 250
    assert repr(lens.run_with_cache(*ARGS, names_filter=[])[1]) == "an empty cache"


class Named(nn.Module):
    """Calls its parts what the canonical names begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"first": nn.Linear(4, 4), "9": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["9"](self.blocks["first"](x))


def test_modules_named_blocks_are_not_taken_for_layers() -> None:
    model, x = Named(), torch.randn(2, 4)
    _, cache = lensfx.wrap(model, x, passes=None, verify=False).run_with_cache(x)
    assert torch.equal(cache["blocks.first.linear"], model.blocks["first"](x))
    assert cache.n_layers == 0


def test_gradients_are_those_of_autograd(lens: lensfx.Lens) -> None:
    names = [n for group in OUTPUTS.values() for n in group if "pos_embed" not in n]
    MODEL.zero_grad()
    with outputs_of(MODEL) as seen:
        loss = MODEL(*ARGS)[1]
        loss.backward()
    want = {n: q.grad.clone() for n, q in MODEL.named_parameters()}
    MODEL.zero_grad()
    out, cache = lens.run_with_cache(*ARGS, names_filter=names, incl_bwd=True)
    assert torch.equal(out[1], loss)
    assert list(cache) == [*dict.fromkeys(names), *(f"{n}_grad" for n in dict.fromkeys(names))]
    for path, group in OUTPUTS.items():
        for name in set(group) & set(names):
            torch.testing.assert_close(cache[f"{name}_grad"], seen[path].grad, rtol=1e-5, atol=1e-8)
    for name, parameter in MODEL.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-7)
    MODEL.zero_grad()


def test_everything_and_its_gradients_can_be_asked_for_at_once(lens: lensfx.Lens) -> None:
    want = MODEL(*ARGS)
    out, cache = lens.run_with_cache(*ARGS, incl_bwd=True)
    assert torch.equal(out[0], want[0])
    assert "arange" in cache
    assert "arange_grad" not in cache
    with_gradient = [n for n in lens.hook_names if f"{n}_grad" in cache]
    assert set(lens.hook_names) - set(with_gradient) == {"arange"} | {"reshape_1"}
    assert all(cache[f"{n}_grad"].shape == cache[n].shape for n in with_gradient)
    _, cut = lens.run_with_cache(*ARGS, incl_bwd=True, pos_slice=2)
    assert cut["blocks.0.hook_resid_mid_grad"].shape == (2, 32)
    MODEL.zero_grad()


def test_the_gradient_of_a_scale_is_the_one_of_dividing_by_it(lens: lensfx.Lens) -> None:
    name = "ln_final.hook_scale"
    _, cache = lens.run_with_cache(*ARGS, names_filter=name, incl_bwd=True)
    step = 1e-3

    def loss(change: float) -> float:
        moved = [(name, lambda value, hook: value + change)]
        return float(lens.run_with_hooks(*ARGS, fwd_hooks=moved)[1].detach().double())

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert float(cache[f"{name}_grad"].sum()) == pytest.approx(slope, rel=5e-3)
    MODEL.zero_grad()


def test_gradients_need_a_scalar_to_start_from(lens: lensfx.Lens) -> None:
    with torch.no_grad(), pytest.raises(HookError, match="needs one scalar result"):
        lens.run_with_cache(*ARGS, incl_bwd=True)
    with pytest.raises(HookError, match="needs one scalar result"):
        lens.run_with_cache(*ARGS, incl_bwd=True, stop_at_layer=1)


def test_a_backward_hook_sees_the_gradient_and_can_replace_it(lens: lensfx.Lens) -> None:
    name = "blocks.0.hook_mlp_out"
    seen: dict[str, Tensor] = {}

    def drop(grad: Tensor, hook: HookPoint) -> Tensor:
        seen[hook.name] = grad.clone()
        return torch.zeros_like(grad)

    def taken() -> dict[str, Tensor]:
        found = {n: q.grad.clone() for n, q in MODEL.named_parameters()}
        MODEL.zero_grad()
        return found

    with outputs_of(MODEL) as outputs:
        loss = MODEL(*ARGS)[1]
    outputs["transformer.h.0.mlp"].register_hook(torch.zeros_like)
    MODEL.zero_grad()
    loss.backward()
    want = taken()
    with lens.hooks(bwd_hooks=[(name, drop)]):
        _, cache = lens.run_with_cache(*ARGS, names_filter=name, incl_bwd=True)
    got = taken()
    assert not got["transformer.h.0.mlp.c_proj.weight"].any()
    assert got["transformer.h.0.attn.c_proj.weight"].any()
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-5, atol=1e-8)
    assert not cache[f"{name}_grad"].any()
    _, plain = lens.run_with_cache(*ARGS, names_filter=name, incl_bwd=True)
    assert torch.equal(seen[name], plain[f"{name}_grad"])
    MODEL.zero_grad()


def test_a_gradient_written_in_place_reaches_no_other_branch(lens: lensfx.Lens) -> None:
    """Both sides of a residual add are given one tensor by autograd."""
    out, mid = "blocks.0.hook_attn_out", "blocks.0.hook_resid_pre"
    _, plain = lens.run_with_cache(*ARGS, names_filter="blocks.0.hook_resid_mid", incl_bwd=True)
    with lens.hooks(bwd_hooks=[(out, lambda grad, hook: grad.zero_())]):
        _, cut = lens.run_with_cache(*ARGS, names_filter=[out, mid], incl_bwd=True)
    assert not cut[f"{out}_grad"].any()
    assert torch.equal(cut[f"{mid}_grad"], plain["blocks.0.hook_resid_mid_grad"])
    MODEL.zero_grad()


def test_a_backward_hook_where_no_gradient_flows(lens: lensfx.Lens) -> None:
    def ignore(grad: Tensor, hook: HookPoint) -> None:
        seen.append(hook.name)

    seen: list[str] = []
    with pytest.raises(HookError, match="arange has no gradient"):
        lens.run_with_hooks(*ARGS, bwd_hooks=[("arange", ignore)])
    with torch.no_grad(), pytest.raises(HookError, match="hook_embed has no gradient"):
        lens.run_with_hooks(*ARGS, bwd_hooks=[("hook_embed", ignore)])
    everywhere = [(lambda name: True, ignore)]
    with torch.no_grad():
        lens.run_with_hooks(*ARGS, bwd_hooks=everywhere)
    assert seen == []
    lens.run_with_hooks(*ARGS, bwd_hooks=everywhere)[1].backward()
    assert {"hook_embed", "unembed.hook_out"} <= set(seen)
    assert "arange" not in seen
    assert len(seen) == len(set(seen))
    MODEL.zero_grad()
