"""FoldEmbeddingScale: what the rows of a lookup are multiplied by goes into its table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.fold_embedding_scale import FoldEmbeddingScale
from surgery import (
    assert_again,
    assert_blamed,
    assert_equal,
    assert_goldens,
    assert_refused,
    assert_silent,
    chooser,
)
from torch import fx

from lensfx import Pipeline, Program
from lensfx.rewrite import At

aten = torch.ops.aten
fold_embedding_scale = importlib.import_module("lensfx.passes.fold_embedding_scale")

ENTRY = FoldEmbeddingScale


def lookup(
    s: Sketch, ids: fx.Node, name: str, d: int = 8, padding: int = -1, dtype: Any = None
) -> fx.Node:
    W = s.weight(f"{name}.weight", 8, d, dtype=dtype)
    return s.call(aten.embedding.default, W, ids, padding, path=name)


def tables(sites: int = 3) -> Program:
    """Lookups each scaled by a vector, as many rows as channels."""
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    found = []
    for i in range(sites):
        y = lookup(s, ids, f"{i}.e")
        found.append(s.call(aten.mul.Tensor, y, s.weight(f"{i}.scale", 8)))
    return s.done(*found)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    rewritten = assert_goldens(golden, "fold_embedding_scale", tables(1), ENTRY())
    assert [e.sites for e in rewritten.journal] == [(("mul", "embedding_default"),)]


def test_a_padding_row_stays_one() -> None:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    y = lookup(s, ids, "e", padding=0)
    y = s.call(aten.mul.Tensor, s.call(aten.mul.Tensor, y, 8**0.5), s.stored("c", torch.rand(8)))
    before = s.done(y)
    after = Pipeline([ENTRY(expect=1)]).run(before)
    assert_equal(before, after)
    (found,) = after.graph.find_nodes(op="call_function", target=aten.embedding.default)
    assert found.args[2] == 0


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_folding_is_exact(data: list[int]) -> None:
    of, s = chooser(data), Sketch()
    dtype, d = of(torch.float32, torch.float64, torch.bfloat16), of(4, 8)
    ids = s.input("ids", of("B", 2, 1), of("T", 3, 1), dtype=torch.int64)
    if of(True, False):
        y = lookup(s, ids, "e", d, dtype=dtype)
    else:
        y = s.call(aten.index.Tensor, s.weight("e", 8, d, dtype=dtype), [ids])
    c = s.weight("c", *of((), (1,), (d,), (1, 1, d)), dtype=dtype)
    y = s.call(of(aten.mul.Tensor, aten.div.Tensor), y, c)
    y = s.call(aten.transpose.int, s.call(aten.to.dtype, y, torch.float32), 0, 1)
    before = s.done(s.call(aten.mul.Tensor, y, of(2.0, s.weight("f"), s.weight("g", d))))
    assert_equal(before, Pipeline([ENTRY(expect=1)]).run(before))


def test_a_tied_head_keeps_its_own() -> None:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    y = s.call(aten.mul.Tensor, lookup(s, ids, "e"), 3.0)
    head = s.weight("head.weight", 8, 8, like="e.weight")
    before = s.done(s.call(aten.linear.default, s.call(aten.tanh.default, y), head))
    after = Pipeline([ENTRY(expect=1)]).run(before)
    assert_equal(before, after)
    assert after.tensors["head.weight"] is before.tensors["head.weight"]


# refuses


def test_refusals_name_who_forbids_it() -> None:
    s = Sketch()
    y = lookup(s, s.input("ids", "B", "T", dtype=torch.int64), "e")
    z = s.call(aten.mul.Tensor, y, s.weight("c", 8))
    before = s.done(z, s.call(aten.tanh.default, y))
    words = "mul scales embedding, which is also read by tanh"
    assert_refused(before, ENTRY(), "tanh", words)
    s = Sketch()
    y = lookup(s, s.input("ids", "B", "T", dtype=torch.int64), "e", padding=0)
    before = s.done(s.call(aten.mul.Tensor, y, s.weight("c", 8)))
    words = "c is trained, and the table has gradients of its own: padding, frequency"
    assert_refused(before, ENTRY(), "embedding", words)


def test_what_is_none_of_its_business() -> None:
    s = Sketch()
    y = lookup(s, s.input("ids", "B", 8, dtype=torch.int64), "e")
    assert_silent(s.done(s.call(aten.mul.Tensor, y, s.weight("c", 8, 1))), ENTRY())
    s = Sketch()
    y = lookup(s, s.input("ids", "B", 8, dtype=torch.int64), "e")
    assert_silent(s.done(s.call(aten.tanh.default, y)), ENTRY())


# faults


Fold = Callable[[At, Any, Any, fx.Node], fx.Node]
right: Fold = fold_embedding_scale.times


def rows(at: At, target: Any, c: Any, W: fx.Node) -> fx.Node:
    return at.call(target, W, at.call(aten.unsqueeze.default, c, 1))


FAULTS: dict[str, Fold] = {
    "not scaled": lambda at, t, c, W: W,
    "rows": rows,
    "divided": lambda at, t, c, W: right(at, aten.div.Tensor, c, W),
    "folded twice": lambda at, t, c, W: right(at, t, c, right(at, t, c, W)),
    "a little off": lambda at, t, c, W: at.call(aten.mul.Tensor, right(at, t, c, W), 1 + 1e-9),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_table_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, target: Any, c: Any, W: fx.Node) -> fx.Node:
        here = str(W.target) == f"{place}.e.weight"
        return (FAULTS[fault] if here else right)(at, target, c, W)

    monkeypatch.setattr(fold_embedding_scale, "times", planted)
    assert_blamed(Pipeline([ENTRY(expect=3)]).run(tables()), f"{place}.e")


# again


def test_a_second_run_changes_nothing() -> None:
    assert_again(tables(), ENTRY())
