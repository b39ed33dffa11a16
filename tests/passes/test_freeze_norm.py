"""FreezeNorm: norms that divide by what they divided by on one call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.freeze_norm import AtGiven, FreezeNorm
from models import CASES
from torch import Tensor, fx

from lensfx import ContractError, GuardError, Lens, Pipeline, PipelineError, Program, capture, wrap
from lensfx.analysis import NORMS
from lensfx.graph import graph_text, is_op, native_name
from lensfx.rewrite import At
from lensfx.verify import AtExample, check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.freeze_norm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def norm(
    s: Sketch, x: fx.Node, name: str, kind: str = "layer", eps: float | None = 1e-5
) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    g = None if kind.startswith("bare") else s.weight(f"{name}.weight", size, dtype=dtype)
    if kind.endswith("rms"):
        return s.call(aten.rms_norm.default, x, [size], g, eps, path=name)
    b = s.weight(f"{name}.bias", size, dtype=dtype) if kind == "layer" else None
    return s.call(aten.layer_norm.default, x, [size], g, b, eps or 1e-5, path=name)


def stack(
    kind: str = "layer",
    sites: int = 3,
    d: int = 8,
    dtype: torch.dtype | None = None,
    sizes: tuple[Any, ...] = ("B", "T"),
    eps: float | None = 1e-5,
) -> Program:
    """Norms on a stream, each read by a linear op that writes to it."""
    s = Sketch()
    x = s.input("x", *sizes, d, dtype=dtype)
    for i in range(sites):
        W = s.weight(f"h.{i}.W", d, d, dtype=dtype)
        y = s.call(aten.linear.default, norm(s, x, f"h.{i}.ln", kind, eps), W, path=f"h.{i}")
        x = s.call(aten.add.Tensor, x, y, path=f"h.{i}")
    return s.done(x)


def frozen(program: Program, scales: Any = None, **options: Any) -> Program:
    return Pipeline([FreezeNorm(scales, **options)]).run(program)


def assert_frozen(before: Program, after: Program) -> None:
    """Equal on the example call, for which the proof is, and on no other."""
    assert prove(after).worst <= 1e-12
    assert check(before, after, inputs=[before.example]).error <= 1e-12
    assert not [n for n in after.graph.nodes if is_op(n, *NORMS)]


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = stack(sites=1)
    golden("freeze_norm.before", graph_text(before.graph))
    golden("freeze_norm.after", graph_text(frozen(before).graph))
    (entry,) = frozen(before).journal
    assert (entry.root, entry.sites) == ("layer_norm", (("layer_norm", entry.sites[0][1]),))
    assert_frozen(before, frozen(before))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_program_is_affine_from_then_on(kind: str) -> None:
    before = stack(kind, dtype=torch.float64)
    after = frozen(before, expect=3)
    (x,) = (t.double() for t in before.example)
    moved = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def run(x: Tensor) -> Any:
        return after.flat(x)[0]

    def pushed(v: Tensor) -> Tensor:
        return torch.func.jvp(run, (x,), (v,))[1]

    along = pushed(moved)
    for size in (1e-3, 1.0, 50.0):
        torch.testing.assert_close(run(x + size * moved) - run(x), size * along)
    assert float((before.flat(x + moved)[0] - run(x) - along).detach().abs().max()) > 1e-3
    torch.testing.assert_close(torch.func.vmap(pushed)(moved.unsqueeze(0))[0], along)


CAPTURED = ["hf_gpt2", "hf_llama", "hf_bert", "nanogpt_vocab_is_width", "nanogpt_shared_block",
            "llamalike_offset", "encdec", "flat", "norm_returned"]  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_models(name: str) -> None:
    from lensfx.passes import CanonicalLinear, CanonicalNorm

    case = CASES[name]
    args, kwargs = case.inputs(2, 5, 0)
    before = capture(case.build(), *args, **kwargs)
    after = Pipeline([CanonicalLinear(), CanonicalNorm(), FreezeNorm()]).run(before)
    assert len(after.reports[-1].fired) >= 5
    assert not after.reports[-1].refused
    assert_frozen(before, after)
    args, kwargs = case.inputs(1, 4, 0)
    with pytest.raises(GuardError, match="is frozen at a call of sizes"):
        after(*args, **kwargs)


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_freezing_keeps_the_example(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    before = stack(
        of("layer", "scale", "bare", "rms", "bare rms"),
        sites=of(1, 2),
        dtype=of(*DTYPES),
        sizes=of(("B", "T"), (1, "T"), ("B", 1), (2, 3), ("T",)),
        eps=of(1e-5, None, 0.3),
    )
    after = frozen(before)
    assert_frozen(before, after)
    assert prove(after).drift < 3


def test_divisors_of_a_cache_and_a_given_one() -> None:
    case = CASES["nanogpt"]
    before = capture(case.build(), *case.inputs(2, 5, 0)[0])
    other = case.inputs(2, 5, 7)[0]
    _, cache = wrap(case.build(), *other).run_with_cache(*other)
    after = frozen(before, cache, expect=5)
    torch.testing.assert_close(after(*other)[0], before(*other)[0], rtol=1e-4, atol=1e-5)
    assert prove(after).passes[-1].contract == AtGiven()
    assert prove(after).passes[-1].output_error > 1e-4
    one = {"blocks.1.ln2.hook_scale": cache["blocks.1.ln2.hook_scale"] * 2}
    (entry,) = frozen(before, one, at="blocks.1.ln2", expect=1).journal[-1:]
    assert entry.path == "transformer.h.1.ln_2"


def test_names_choose_norms() -> None:
    before = stack()
    for name in ("h.1.ln", "h.1", "layer_norm_1", "h.1.ln.layer_norm"):
        after = frozen(before, at=name, expect=1)
        assert [e.path for e in after.journal] == ["h.1.ln"]
        assert graph_text(frozen(after, at=name).graph) == graph_text(after.graph)
    with pytest.raises(PipelineError, match=r"there is no norm at 'h\.7'"):
        frozen(before, at="h.7")
    with pytest.raises(PipelineError, match="there is no norm at 'hook_scale'"):
        frozen(before, {"hook_scale": torch.ones(3, 5, 1)})


def test_other_sizes_are_an_error_and_nothing_is_broadcast() -> None:
    before = stack()
    after = frozen(before)
    for shape in ((1, 5, 8), (3, 1, 8), (1, 1, 8), (3, 6, 8)):
        with pytest.raises(GuardError) as caught:
            after(torch.randn(shape))
        assert str(caught.value).splitlines() == [
            f"h.0.ln.layer_norm is frozen at a call of sizes [3, 5], and this one has "
            f"{list(shape[:-1])}",
            "  at h.0.ln.layer_norm",
            "  try: call it with inputs of those sizes, or freeze it at this call",
        ]
        with pytest.raises(GuardError, match="is frozen at a call of sizes"):
            Lens(after)(torch.randn(shape))


# refuses


def over_two_axes() -> Program:
    s = Sketch()
    x = s.input("x", "B", 3, 4)
    return s.done(s.call(aten.layer_norm.default, x, [3, 4]))


SHAPE = "its divisor has the shape [3, 4, 1], and it needs "
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "two axes": (over_two_axes, None, "it normalises over several axes, and a divisor is for the "
                 "last one"),
    "wrong rank": (lambda: stack(sites=1), {"layer_norm": torch.ones(4)},
                   "its divisor has the shape [4], and it needs ["),
    "wrong size": (lambda: stack(sites=1, sizes=(3, 5)), {"layer_norm": torch.ones(3, 4, 1)},
                   SHAPE),
    "zero": (lambda: stack(sites=1), {"layer_norm": torch.zeros(3, 5, 1)},
             "its divisor is 0 or no number somewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason(case: str) -> None:
    build, scales, reason = REFUSED[case]
    before = build()
    after = frozen(before, scales)
    (refused,) = after.reports[-1].refused
    assert refused.reason.startswith(reason)
    assert refused.blame.startswith("%layer_norm")
    assert graph_text(after.graph) == graph_text(before.graph)


def test_a_norm_without_a_divisor_is_left_alone() -> None:
    after = frozen(stack(), {"layer_norm_1": torch.ones(3, 5, 1)})
    assert [e.root for e in after.journal] == ["layer_norm_1"]
    assert {r.reason for r in after.reports[-1].refused} == {"no divisor was given for it"}


def test_without_weights_there_is_nothing_to_freeze_at() -> None:
    before = stack()
    before = replace(before, tensors={k: t.to("meta") for k, t in before.tensors.items()})
    (first, *_) = frozen(before).reports[-1].refused
    assert first.reason.startswith("the program holds no weights to run the example with")


# faults

right = module.affine
Planted = Callable[[At, fx.Node, fx.Node], fx.Node]


def slightly_off(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
    return right(at, n, at.call(aten.mul.Tensor, d, 1.0 + 1e-9))


def multiplied(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
    return right(at, n, at.call(aten.reciprocal.default, d))


def squared(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
    return right(at, n, at.call(aten.mul.Tensor, d, d))


def no_shift(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
    return at.call(aten.sub.Tensor, right(at, n, d), n.args[3])


def first_position(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
    first = at.call(aten.slice.Tensor, d, 1, 0, 1)
    return right(at, n, at.call(aten.expand_as.default, first, d))


FAULTS = {
    f.__name__: ("affine", f) for f in (slightly_off, multiplied, squared, no_shift, first_position)
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_norm_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, instead = FAULTS[fault]

    def planted(at: At, n: fx.Node, d: fx.Node) -> fx.Node:
        return (instead if f"h.{place}.ln" in n.meta["nn_module_stack"] else right)(at, n, d)

    monkeypatch.setattr(module, name, planted)
    with pytest.raises(ContractError) as caught:
        prove(frozen(stack()))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("freeze-norm broke its contract at-example: ")
    assert f"h.{place}.ln  model.py:7" in second


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (stack(), stack("rms", dtype=torch.bfloat16)):
        after = frozen(before)
        again = frozen(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        assert read == set(after.tensors)
        assert set(before.tensors) <= read
        assert prove(after).passes[-1].contract == AtExample()
        assert all(isinstance(t, Tensor) for t in after.tensors.values())
