"""LayerNormToRMS: a layer norm of a value without a mean is a root-mean-square norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from customs import custom
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm
from lensfx.passes.center_writers import CenterWriters
from lensfx.passes.layer_norm_to_rms import LayerNormToRMS
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.graph import dtype_of, graph_text, is_op, native_name
from lensfx.rewrite import At, Match
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.layer_norm_to_rms")
Source = Callable[[Sketch, fx.Node], fx.Node]


def centred(s: Sketch, x: fx.Node, axis: int = -1) -> fx.Node:
    return s.call(aten.sub.Tensor, x, s.call(aten.mean.dim, x, [axis], True))


def model(source: Source = centred, norms: int = 1, **given: Any) -> Program:
    """Norms of what `source` makes of an input."""
    s, d, dtype = Sketch(), given.get("d", 8), given.get("dtype")
    x = source(s, s.input("x", *given.get("sizes", ("B", "T")), d, dtype=dtype))
    found = []
    for i in range(norms):
        g = s.weight(f"{i}.weight", d, dtype=dtype_of(x)) if given.get("gain", True) else None
        b = s.weight(f"{i}.bias", d, dtype=dtype_of(x)) if given.get("shift", True) else None
        eps = given.get("eps", 1e-5)
        found.append(s.call(aten.layer_norm.default, x, [d], g, b, eps, path=f"norms.{i}"))
    return s.done(*found)


def turned(before: Program, **options: Any) -> Program:
    return Pipeline([LayerNormToRMS(**options)]).run(before)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model()
    after = turned(before)
    golden("layer_norm_to_rms.before", graph_text(before.graph))
    golden("layer_norm_to_rms.after", graph_text(after.graph))
    assert [e.root for e in after.journal] == ["layer_norm"]
    assert_equal(before, after)


@pytest.mark.parametrize(
    ("name", "norms", "left"),
    [("base", 5, 0), ("block three times", 7, 0), ("embedding norm", 1, 5), ("layer scale", 1, 4)],
)
def test_norms_of_models_after_centring(name: str, norms: int, left: int) -> None:
    forms = [CanonicalLinear(), CanonicalNorm()]
    after = Pipeline([*forms, CenterWriters(), LayerNormToRMS(expect=norms)]).run(custom(name))
    assert prove(after).worst <= 1e-12
    assert len(after.reports[-1].refused) == left
    Pipeline([*forms, LayerNormToRMS(expect=0)]).run(custom(name))


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=7, max_size=7))
def test_it_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    before = model(
        gain=of(True, False),
        shift=of(True, False),
        eps=of(1e-5, 1e-6, 0.1),
        d=of(2, 8),
        dtype=of(torch.float32, torch.float64, torch.bfloat16),
        sizes=(of("B", 2, 1), of("T", 3, 1)),
    )
    assert_equal(before, turned(before, expect=1))


def test_a_norm_over_two_axes_needs_no_mean_along_one() -> None:
    for axis in (1, 2):
        s = Sketch()
        x = centred(s, s.input("x", "B", 4, 8), axis)
        g, b = s.weight("g", 4, 8), s.weight("b", 4, 8)
        before = s.done(s.call(aten.layer_norm.default, x, [4, 8], g, b))
        assert_equal(before, turned(before, expect=1))


# refuses


def gelu(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.gelu.default, centred(s, x))


def plus(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.add.Tensor, centred(s, x), gelu(s, x))


def written(s: Sketch, x: fx.Node) -> fx.Node:
    W = s.weight("W", 8, 8)
    return s.call(aten.linear.default, x, W, centred(s, s.weight("b", 8)))


REFUSED: dict[str, tuple[Source, str]] = {
    "input": (lambda s, x: x, "nothing says that the mean of %x is zero"),
    "gelu": (gelu, "nothing says that the mean of %gelu is zero"),
    "sum": (plus, "%gelu may bring a mean into %add"),
    "other axis": (lambda s, x: centred(s, x, 1), "%x may bring a mean into %sub"),
    "bias alone": (written, "nothing says that the mean of %linear is zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_brings_a_mean(case: str) -> None:
    source, reason = REFUSED[case]
    before = model(source)
    after = turned(before)
    assert [r.reason for r in after.reports[-1].refused] == [reason]
    assert graph_text(after.graph) == graph_text(before.graph)
    with pytest.raises(PipelineError, match="layer-norm-to-rms fired 0 times, 1 expected"):
        turned(before, expect=1)


def test_a_stored_weight_is_centred_up_to_rounding_only() -> None:
    forms = [CanonicalLinear(), CanonicalNorm(), CenterWriters()]
    Pipeline([LayerNormToRMS(expect=0)]).run(Pipeline(forms).run(custom("base")))


# faults


right = module.bare_of_mean


def made(at: At, m: Match, **given: Any) -> fx.Node:
    g, s, eps = (given.get(k, m.bindings[k]) for k in ("g", "s", "eps"))
    y = at.call(aten.rms_norm.default, m.x, m.over, g, eps)
    return y if s is None else at.call(aten.add.Tensor, y, s)


FAULTS: dict[str, Callable[[At, Match], fx.Node]] = {
    "another eps": lambda at, m: made(at, m, eps=1e-6),
    "no eps": lambda at, m: made(at, m, eps=None),
    "no gain": lambda at, m: made(at, m, g=None),
    "no shift": lambda at, m: made(at, m, s=None),
    "shift scaled": lambda at, m: made(at, m, s=at.call(aten.mul.Tensor, m.s, m.g)),
    "one plus": lambda at, m: made(at, m, g=at.call(aten.add.Tensor, m.g, 1.0)),
}


def blamed(after: Program) -> str:
    with pytest.raises(ContractError) as caught:
        prove(after)
    text = str(caught.value)
    assert text.startswith("layer-norm-to-rms broke its contract exact: %")
    return text.splitlines()[1].strip()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_norm_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, m: Match) -> fx.Node:
        here = f"norms.{place}" in str(m.norm.meta["nn_module_stack"])
        return (FAULTS[fault] if here else right)(at, m)

    monkeypatch.setattr(module, "bare_of_mean", planted)
    assert f"norms.{place}" in blamed(turned(model(norms=3)))


@pytest.mark.parametrize("case", REFUSED)
def test_a_mean_that_is_overlooked_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "mean_sources", lambda value, axis: ())
    assert "norms.0" in blamed(turned(model(REFUSED[case][0])))


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(norms=3), model(shift=False), model(dtype=torch.bfloat16)):
        for run in (Pipeline([LayerNormToRMS()]).rewrite, Pipeline([LayerNormToRMS()]).run):
            after = run(before)
            again = run(after)
            assert (again.reports[-1].fired, again.reports[-1].refused) == ((), ())
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
            assert not any(is_op(n, aten.layer_norm.default) for n in calls)
        assert set(after.tensors) == set(before.tensors)
