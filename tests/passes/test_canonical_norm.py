"""CanonicalNorm: hand-written norms become one operator, and look-alikes stay what they are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace as changed
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalNorm
from torch import fx, nn

from lensfx import ContractError, Lens, Pipeline, Program, capture
from lensfx.analysis import Norm
from lensfx.graph import dtype_of, graph_text, is_op, native_name
from lensfx.rewrite import Edit, Match, Rule
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.canonical_norm")
Feed = Callable[[Sketch, fx.Node], fx.Node]
EPS = 1e-5


class Pen:
    """Writes a norm one call at a time, all of them in one module."""

    def __init__(self, s: Sketch, path: str = "ln") -> None:
        self.s, self.path = s, path

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        packet, _, overload = name.partition(".")
        target = getattr(getattr(aten, packet), overload or "default")
        return self.s.call(target, *args, path=self.path, **kwargs)

    def mean(self, x: fx.Node, axes: Any = (-1,), keep: bool = True) -> fx.Node:
        return self("mean.dim", x, list(axes), keep)

    def centred(self, x: fx.Node) -> fx.Node:
        return self("sub.Tensor", x, self.mean(x))

    def square(self, x: fx.Node, how: int = 0) -> fx.Node:
        if how == 0:
            return self("pow.Tensor_Scalar", x, 2)
        return self("mul.Tensor", x, x) if how == 1 else self("square", x)

    def spread(self, x: fx.Node, how: int = 0) -> fx.Node:
        if how < 3:
            return self.mean(self.square(self.centred(x), how))
        given = x if how % 2 else self.centred(x)
        if how < 5:
            return self("var.correction", given, [-1], correction=0, keepdim=True)
        return self("var.dim", given, [-1], False, True)

    def over(self, top: fx.Node, spread: fx.Node, eps: float | None = EPS, how: int = 0) -> fx.Node:
        inside = spread if eps is None else self("add.Tensor", spread, eps)
        if how == 0:
            return self("div.Tensor", top, self("sqrt", inside))
        if how == 1:
            return self("mul.Tensor", top, self("rsqrt", inside))
        if how == 2:
            return self("mul.Tensor", self("pow.Tensor_Scalar", inside, -0.5), top)
        if how == 3:
            return self("div.Tensor", top, self("pow.Tensor_Scalar", inside, 0.5))
        return self("mul.Tensor", top, self("reciprocal", self("sqrt", inside)))

    def layer(self, x: fx.Node, spread: int = 0, root: int = 0) -> fx.Node:
        return self.over(self.centred(x), self.spread(x, spread), how=root)

    def rms(self, x: fx.Node, square: int = 0, root: int = 1, of: fx.Node | None = None) -> fx.Node:
        return self.over(x, self.mean(self.square(x if of is None else of, square)), how=root)

    def vector(self, name: str, size: int = 8, dtype: torch.dtype | None = None) -> fx.Node:
        return self.s.weight(f"{self.path}.{name}", size, dtype=dtype)


def program(
    feed: Callable[[Pen, fx.Node], fx.Node], *sizes: int | str, dtype: torch.dtype | None = None
) -> Program:
    s = Sketch()
    return s.done(feed(Pen(s), s.input("x", *(sizes or ("B", "T", 8)), dtype=dtype)))


def stack(sites: int = 3) -> Program:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    for i in range(sites):
        pen = Pen(s, f"h.{i}.ln")
        y = pen("mul.Tensor", pen.rms(x), pen.vector("weight"))
        x = s.call(aten.add.Tensor, x, s.call(aten.tanh.default, y))
    return s.done(x)


def canonical(before: Program) -> Program:
    return Pipeline([CanonicalNorm()]).run(before)


def norms(after: Program) -> list[str]:
    kinds = (aten.layer_norm.default, aten.rms_norm.default)
    found = [n for n in after.graph.nodes if is_op(n, *kinds)]
    return [n.target.overloadpacket.__name__ for n in found]


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    def feed(pen: Pen, x: fx.Node) -> fx.Node:
        y = pen("mul.Tensor", pen.vector("weight"), pen.layer(x))
        return pen("add.Tensor", y, pen.vector("bias"))

    before = program(feed)
    after = canonical(before)
    golden("canonical_norm.before", graph_text(before.graph))
    golden("canonical_norm.after", graph_text(after.graph))
    assert [e.root for e in after.journal] == ["div", "mul", "add_1"]
    assert_equal(before, after)


def test_a_cast_up_and_back_is_taken_in(golden: Callable[[str, str], None]) -> None:
    def feed(pen: Pen, x: fx.Node) -> fx.Node:
        y = pen.rms(pen("to.dtype", x, torch.float32))
        return pen(
            "mul.Tensor", pen("to.dtype", y, torch.bfloat16), pen.vector("g", 8, dtype_of(x))
        )

    before = program(feed, dtype=torch.bfloat16)
    golden("canonical_norm.cast", graph_text(canonical(before).graph))
    assert_equal(before, canonical(before))


def test_a_width_that_only_a_weight_fixes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    model = Model()
    after = canonical(capture(model, torch.randn(2, 5, 8)))
    assert norms(after) == ["rms_norm"]
    assert check(model, Lens(after)).error <= 1e-12


@pytest.mark.parametrize("spread", range(6))
@pytest.mark.parametrize("root", range(5))
def test_each_spelling_of_a_layer_norm(spread: int, root: int) -> None:
    before = program(lambda pen, x: pen.layer(x, spread, root))
    after = canonical(before)
    assert norms(after) == ["layer_norm"]
    assert len(after.graph.nodes) == 3
    assert_equal(before, after)


@pytest.mark.parametrize("square", range(3))
@pytest.mark.parametrize("root", range(5))
def test_each_spelling_of_an_rms_norm(square: int, root: int) -> None:
    before = program(lambda pen, x: pen.rms(x, square, root))
    after = canonical(before)
    assert norms(after) == ["rms_norm"]
    assert len(after.graph.nodes) == 3
    assert_equal(before, after)


def gained(pen: Pen, x: fx.Node) -> fx.Node:
    top = pen("mul.Tensor", pen.vector("g"), pen.centred(x))
    return pen.over(top, pen.spread(x))


ALSO: dict[str, tuple[Callable[[Pen, fx.Node], fx.Node], str]] = {
    "scale before the root": (gained, "layer_norm"),
    "rms scale before the root": (
        lambda pen, x: pen.over(
            pen("mul.Tensor", x, pen.vector("g")), pen.mean(pen.square(x)), how=1
        ),
        "rms_norm",
    ),
    "no eps": (lambda pen, x: pen.over(x, pen.mean(pen.square(x)), None, 1), "rms_norm"),
    "of a scaled value": (
        lambda pen, x: pen.rms(pen("mul.Tensor", x, pen.vector("g"))),
        "rms_norm",
    ),
    "axes counted from the front": (
        lambda pen, x: pen.over(x, pen.mean(pen.square(x), (2,)), how=1),
        "rms_norm",
    ),
    "one plus the scale": (
        lambda pen, x: pen("mul.Tensor", pen.rms(x), pen("add.Tensor", pen.vector("g"), 1.0)),
        "rms_norm",
    ),
}


@pytest.mark.parametrize("case", ALSO)
def test_other_forms_that_are_norms(case: str) -> None:
    feed, kind = ALSO[case]
    before = program(feed)
    after = canonical(before)
    assert norms(after) == [kind]
    assert_equal(before, after)


# contract


@settings(max_examples=30)
@given(data=st.lists(st.integers(0, 10**6), min_size=12, max_size=12))
def test_the_rewritten_norms_are_the_same(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    s, d = Sketch(), of(3, 8)
    small = of(torch.float32, torch.float64, torch.bfloat16)
    x = s.input("x", of("B", 1, 2), of("T", 1, d), d, dtype=small)
    pen = Pen(s)
    wide = small is torch.bfloat16 and of(True, False)
    y = pen("to.dtype", x, torch.float32) if wide else x
    kind = of("layer", "rms")
    y = (
        pen.layer(y, of(0, 1, 2, 3, 4, 5), of(0, 1, 2))
        if kind == "layer"
        else pen.rms(y, of(0, 1, 2))
    )
    y = pen("to.dtype", y, small) if wide else y
    g = pen.vector("weight", d, small)
    y = pen("mul.Tensor", *of((y, g), (g, y)))
    shifted = of(True, False)
    y = pen("add.Tensor", y, pen.vector("bias", d, small)) if shifted else y
    before = s.done(y)
    after = canonical(before)
    assert len(norms(after)) == 1
    assert_equal(before, after)


# refuses


def outside(pen: Pen, x: fx.Node, spread: fx.Node) -> fx.Node:
    return pen("div.Tensor", pen.centred(x), pen("add.Tensor", pen("sqrt", spread), 0.01))


def std(pen: Pen, x: fx.Node, correction: int, eps: float | None) -> fx.Node:
    spread = pen("std.correction", x, [-1], correction=correction, keepdim=True)
    below = spread if eps is None else pen("add.Tensor", spread, eps)
    return pen("div.Tensor", pen.centred(x), below)


def var(pen: Pen, x: fx.Node) -> fx.Node:
    spread = pen("var.correction", x, [-1], correction=1, keepdim=True)
    return pen.over(pen.centred(x), spread)


def mixed_dtypes(pen: Pen, x: fx.Node) -> fx.Node:
    mean = pen("mean.dim", x, [-1], True, dtype=torch.float32)
    top = pen("sub.Tensor", x, mean)
    return pen.over(top, pen.mean(pen.square(top)))


REFUSED: dict[str, tuple[Callable[[Pen, fx.Node], fx.Node], str]] = {
    "eps outside": (
        lambda pen, x: outside(pen, x, pen.spread(x)),
        "eps=0.01 is added outside the root",
    ),
    "eps outside a deviation": (
        lambda pen, x: std(pen, x, 0, 0.01),
        "eps=0.01 is added outside the root",
    ),
    "deviation": (lambda pen, x: std(pen, x, 0, None), "its deviation has no eps"),
    "unbiased deviation": (
        lambda pen, x: std(pen, x, 1, None),
        "its variance divides by n-1: aten.std.correction",
    ),
    "unbiased variance": (var, "its variance divides by n-1: aten.var.correction"),
    "unbiased by default": (
        lambda pen, x: pen.over(pen.centred(x), pen("var.dim", x, [-1], True, True)),
        "its variance divides by n-1: aten.var.dim",
    ),
    "over positions": (
        lambda pen, x: pen.over(x, pen.mean(pen.square(x), (1,)), how=1),
        "it does not normalise over the last axis alone",
    ),
    "over two axes": (
        lambda pen, x: pen.over(x, pen.mean(pen.square(x), (-1, -2)), how=1),
        "it does not normalise over the last axis alone",
    ),
    "scale of one number": (
        lambda pen, x: pen.over(
            pen("mul.Tensor", x, pen.vector("g", 1)), pen.mean(pen.square(x)), how=1
        ),
        "its scale is not one number per channel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_look_alikes_are_refused_by_name(case: str) -> None:
    feed, reason = REFUSED[case]
    before = program(feed)
    after = canonical(before)
    refused = after.reports[-1].refused
    assert [(r.path, r.reason) for r in refused] == [("ln", reason)]
    assert refused[0].root in ("div", "mul", "mul_1")
    assert refused[0].blame == f"%{refused[0].root}  ln  model.py:7  self.ln(x)"
    assert graph_text(after.graph) == graph_text(before.graph)


def test_an_axis_of_free_size_is_refused() -> None:
    after = canonical(program(lambda pen, x: pen.rms(x), "B", 8, "T"))
    reason = "the size of the axis it normalises over is not fixed"
    assert [r.reason for r in after.reports[-1].refused] == [reason]


def test_mixed_dtypes_are_refused() -> None:
    wide = "it is computed in another dtype than the value it normalises"
    after = canonical(program(mixed_dtypes, dtype=torch.bfloat16))
    assert [r.reason for r in after.reports[-1].refused] == [wide]
    scale = "its scale has another dtype than the value it scales"

    def gain(pen: Pen, x: fx.Node) -> fx.Node:
        top = pen("mul.Tensor", x, pen.vector("g", 8, torch.float64))
        return pen.over(top, pen.mean(pen.square(x)), how=1)

    after = canonical(program(gain))
    assert [r.reason for r in after.reports[-1].refused] == [scale]


def two_axes(pen: Pen, x: fx.Node) -> fx.Node:
    y = pen("layer_norm", pen("unflatten.int", x, -1, [2, 4]), [2, 4])
    return pen("add.Tensor", pen("mul.Tensor", y, pen.vector("g", 4)), pen.vector("b", 4))


def of_a_weight(pen: Pen, x: fx.Node) -> fx.Node:
    return pen("linear", x, pen.rms(pen.s.weight("W", 5, 8)))


NOT_ITS_BUSINESS: dict[str, Callable[[Pen, fx.Node], fx.Node]] = {
    "another value's size": lambda pen, x: pen.rms(x, of=pen("tanh", x)),
    "another value's mean": lambda pen, x: pen.over(
        pen("sub.Tensor", x, pen.mean(pen("tanh", x))), pen.spread(x)
    ),
    "deviation of what is not centred": lambda pen, x: pen.over(x, pen.spread(x, 3)),
    "second moment of what is centred": lambda pen, x: pen.over(
        pen.centred(x), pen.mean(pen.square(x))
    ),
    "fourth power": lambda pen, x: pen.over(x, pen.mean(pen("pow.Tensor_Scalar", x, 4)), how=1),
    "multiplied by the deviation": lambda pen, x: pen(
        "mul.Tensor", x, pen("sqrt", pen.mean(pen.square(x)))
    ),
    "divided by the inverse": lambda pen, x: pen(
        "div.Tensor", x, pen("rsqrt", pen.mean(pen.square(x)))
    ),
    "upside down": lambda pen, x: pen("div.Tensor", pen("sqrt", pen.mean(pen.square(x))), x),
    "a learned eps": lambda pen, x: pen(
        "mul.Tensor",
        x,
        pen("rsqrt", pen("add.Tensor", pen.mean(pen.square(x)), pen.vector("eps", 1))),
    ),
    "scaled eps": lambda pen, x: pen(
        "mul.Tensor",
        x,
        pen("rsqrt", pen("add.Tensor", pen.mean(pen.square(x)), 1e-5, alpha=2)),
    ),
    "scale and shift of another shape": two_axes,
    "a normalised weight": of_a_weight,
    "shift of an rms norm": lambda pen, x: pen(
        "add.Tensor", pen("rms_norm", x, [8]), pen.vector("b")
    ),
}


@pytest.mark.parametrize("case", NOT_ITS_BUSINESS)
def test_what_is_no_norm_is_left_alone(case: str) -> None:
    before = program(NOT_ITS_BUSINESS[case])
    after = canonical(before)
    assert (after.journal, after.reports[-1].refused) == ((), ())
    assert graph_text(after.graph) == graph_text(before.graph)


def test_a_scale_stays_behind_a_norm_that_somebody_else_reads() -> None:
    def feed(pen: Pen, x: fx.Node) -> fx.Node:
        y = pen.rms(x)
        return pen("add.Tensor", pen("mul.Tensor", y, pen.vector("g")), y)

    before = program(feed)
    after = canonical(before)
    assert [e.root for e in after.journal] == ["mul"]
    assert_equal(before, after)


# faults


def assert_blamed(after: Program, path: str, number: str = "") -> None:
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("canonical-norm broke its contract exact: ")
    assert path in second
    assert f"(rewrite {number}" in second


Doctor = Callable[[Norm], Norm]

DOCTORED: dict[str, Doctor] = {
    "eps": lambda n: changed(n, eps=1e-6),
    "no eps": lambda n: changed(n, eps=0.0),
    "centred": lambda n: changed(n, centred=True),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", DOCTORED)
def test_a_fault_at_one_norm_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = module.written_norm

    def planted(m: Match) -> Norm | str:
        found = true(m)
        here = isinstance(found, Norm) and f"h.{place}." in str(m.norm.meta["nn_module_stack"])
        return DOCTORED[fault](found) if here else found

    monkeypatch.setattr(module, "written_norm", planted)
    assert_blamed(canonical(stack()), f"h.{place}.ln", f"{2 - place} of 6")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_forgotten_scale_is_found_and_blamed(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(m: Match, edit: Edit) -> None:
        if f"h.{place}." not in str(m.mul.meta["nn_module_stack"]):
            return module.replace_scaled(m, edit)
        edit.before(m.mul).replace(m.mul, m.norm)

    rules = (CanonicalNorm.rules[0], Rule(module.SCALED, module.unless_scaled, planted))
    monkeypatch.setattr(CanonicalNorm, "rules", rules)
    assert_blamed(canonical(stack()), f"h.{place}.ln", f"{5 - place} of 6")


@pytest.mark.parametrize("case", ["eps outside", "unbiased deviation", "unbiased variance"])
def test_a_look_alike_taken_for_a_norm_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "written_norm", lambda m: Norm(m.x, True, 8, float(m.eps or 0.0), m.gain)
    )
    assert_blamed(canonical(program(REFUSED[case][0])), "%div  ln  model.py:7")


def test_a_gain_of_another_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = module.written_norm
    monkeypatch.setattr(module, "written_norm", lambda m: changed(true(m), gain=None))
    assert_blamed(canonical(program(gained)), "%div  ln")


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (stack(), program(gained), *(program(feed) for feed, _ in ALSO.values())):
        for run in (Pipeline([CanonicalNorm()]).rewrite, Pipeline([CanonicalNorm()]).run):
            after = run(before)
            again = run(after)
            assert again.reports[-1].fired == ()
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
            assert {str(n.target) for n in after.graph.nodes if n.op == "get_attr"} == set(
                after.tensors
            )
            assert set(after.tensors) == set(before.tensors)
