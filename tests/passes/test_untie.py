"""Untie: each reader of a role gets a parameter of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.untie import Untie
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.graph import graph_text, native_name
from lensfx.rewrite import At
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.untie")


def model(heads: int = 1, tied: bool = True, alias: bool = False, **given: Any) -> Program:
    """A table, and heads that multiply by it, by a tied name of it or by their own weights."""
    s, (rows, d) = Sketch(), given.get("sizes", (11, 8))
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    E = s.weight("embed.weight", rows, d, dtype=given.get("dtype"))
    x = s.call(aten.tanh.default, s.call(aten.embedding.default, E, ids, path="embed"))
    found = []
    for i in range(heads):
        like = "embed.weight" if alias else ""
        kind = {"dtype": given.get("dtype"), "like": like}
        W = E if tied and not alias else s.weight(f"heads.{i}.weight", rows, d, **kind)
        W = s.call(aten.t.default, s.call(aten.t.default, W)) if given.get("turned") else W
        found.append(s.call(aten.linear.default, x, W, None, path=f"heads.{i}"))
    return s.done(*found)


def untied(before: Program, **options: Any) -> Program:
    return Pipeline([Untie(**options)]).run(before)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst == 0
    assert check(before, Lens(after)).error == 0


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model()
    golden("untie.before", graph_text(before.graph))
    golden("untie.rewritten", graph_text(Pipeline([Untie()]).rewrite(before).graph))
    golden("untie.after", graph_text(untied(before).graph))
    after = untied(before, expect=1)
    assert_equal(before, after)
    assert after.tensors["embed.weight"] is before.tensors["embed.weight"]
    own = after.tensors["embed.weight_folded"]
    assert torch.equal(own, after.tensors["embed.weight"])
    assert own.data_ptr() != after.tensors["embed.weight"].data_ptr()


@pytest.mark.parametrize(
    ("options", "roots"),
    [
        ({}, ["linear", "linear_1"]),
        ({"which": "table"}, ["embedding"]),
        ({"which": "each"}, ["linear", "linear_1"]),
        ({"at": "heads.1"}, ["linear_1"]),
        ({"at": "heads.2"}, []),
    ],
)
@pytest.mark.parametrize("alias", [True, False])
def test_who_gets_a_copy(options: dict[str, Any], roots: list[str], alias: bool) -> None:
    before = model(2, alias=alias)
    after = untied(before, **options)
    assert [e.root for e in after.journal] == roots
    assert_equal(before, after)


def test_two_linear_ops_are_one_role() -> None:
    s = Sketch()
    x, W = s.input("x", "B", 8), s.weight("W", 8, 8)
    before = s.done(*(s.call(aten.linear.default, x, W, path=n) for n in "ab"))
    untied(before, expect=0)
    after = untied(before, which="each", expect=1)
    assert after.journal[0].path == "b"
    assert set(after.tensors) == {"W", "W_folded"}


def test_what_is_changed_afterwards_is_changed_in_one_place() -> None:
    after = untied(before := model())
    with torch.no_grad():
        after.tensors["embed.weight_folded"].zero_()
    assert every_value(after)["linear"].abs().max() == 0
    assert every_value(before)["linear"].abs().max() > 0


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_nothing_is_computed_otherwise(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    before = model(
        of(1, 2),
        alias=of(True, False),
        turned=of(True, False),
        sizes=of((8, 8), (11, 8)),
        dtype=of(torch.float32, torch.float64, torch.bfloat16),
    )
    assert_equal(before, untied(before, which=of("head", "table", "each")))


# refuses


def test_what_is_not_tied_is_none_of_its_business() -> None:
    before = model(2, tied=False)
    after = untied(before)
    assert (after.reports[-1].fired, after.reports[-1].refused) == ((), ())
    assert graph_text(after.graph) == graph_text(before.graph)
    with pytest.raises(PipelineError, match="untie fired 0 times, 1 expected"):
        untied(before, expect=1)


def test_a_role_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(PipelineError, match="there is no role 'tail'"):
        untied(model(), which="tail")


# faults


FAULTS: dict[str, Callable[[At, fx.Node], fx.Node]] = {
    "zeros": lambda at, W: at.call(aten.zeros_like.default, W),
    "scaled": lambda at, W: at.call(aten.mul.Tensor, W, 1 + 1e-9),
    "turned": lambda at, W: at.call(aten.t.default, W),
    "rows moved": lambda at, W: at.call(aten.roll.default, W, [1], [0]),
    "rounded": lambda at, W: at.call(aten.round.default, W),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_reader_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.copied

    def planted(at: At, W: fx.Node) -> fx.Node:
        here = f"heads.{place}" in str(at._anchor.meta["nn_module_stack"])
        return (FAULTS[fault] if here else right)(at, W)

    monkeypatch.setattr(module, "copied", planted)
    with pytest.raises(ContractError) as caught:
        prove(untied(model(3, sizes=(8, 8))))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("untie broke its contract exact: ")
    assert f"  heads.{place}  model.py:7" in second


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(), model(3, alias=True), model(turned=True)):
        for run in (Pipeline([Untie()]).rewrite, Pipeline([Untie()]).run):
            after = run(before)
            again = run(after)
            assert (again.reports[-1].fired, again.reports[-1].refused) == ((), ())
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
