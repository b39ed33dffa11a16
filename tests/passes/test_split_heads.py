"""SplitHeads: what each head writes to the stream is a value of the graph."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes.split_heads import SplitHeads
from surgery import (
    assert_again,
    assert_blamed,
    assert_equal,
    assert_goldens,
    assert_silent,
    chooser,
    linear,
)
from torch import fx

from lensfx import Pipeline, Program
from lensfx.graph import module_path
from lensfx.rewrite import At

aten = torch.ops.aten
split_heads = importlib.import_module("lensfx.passes.split_heads")


def attention(s: Sketch, x: fx.Node, name: str, h: int, k: int, **given: Any) -> fx.Node:
    """Attention with h heads of k; `kv` heads of keys and values, which are repeated."""
    size, kv = int(x.meta["val"].shape[-1]), given.get("kv", h)
    sides = []
    for part, n in (("q", h), ("k", kv), ("v", kv)):
        y = s.call(aten.unflatten.int, linear(s, x, f"{name}.{part}", n * k), -1, [n, k])
        y = s.call(aten.transpose.int, y, 1, 2)
        if n < h:
            y = s.call(aten.repeat_interleave.self_int, y, h // n, 1)
        sides.append(y)
    z = s.call(aten.scaled_dot_product_attention.default, *sides)  # [b, h, t, k]
    z = s.call(aten.flatten.using_ints, s.call(aten.transpose.int, z, 1, 2), 2, 3)
    return linear(s, z, f"{name}.o", size, given.get("bias", True))


def model(h: int = 2, k: int = 4, sites: int = 3, d: int = 8, **given: Any) -> Program:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    dtype = given.pop("dtype", None)
    x = s.call(aten.embedding.default, s.weight("e", 8, d, dtype=dtype), ids)
    for i in range(sites):
        g = s.weight(f"{i}.g", d, dtype=dtype)
        n = s.call(aten.rms_norm.default, x, [d], g, 1e-5, path=f"{i}.ln")
        x = s.call(aten.add.Tensor, x, attention(s, n, f"{i}.attn", h, k, **given))
    return s.done(linear(s, x, "head", 8))


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    rewritten = assert_goldens(golden, "split_heads", model(sites=1), SplitHeads())
    assert [e.path for e in rewritten.journal] == ["0.attn.o"]


def test_the_result_of_a_head_is_what_the_projection_makes_of_it_alone() -> None:
    before = model(sites=1, bias=False)
    after = Pipeline([SplitHeads(expect=1)]).run(before)
    (result,) = after.graph.find_nodes(op="call_function", target=aten.einsum.default)
    out = next(n for n in before.graph.nodes if module_path(n) == "0.attn.o")
    z = every_value(before)[out.args[0].name]
    W = before.tensors["0.attn.o.weight"]
    found = every_value(after)[result.name]
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(found[..., head, :], z[..., own] @ W[:, own].T)


# contract


@settings(max_examples=12)
@given(data=st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
def test_splitting_is_exact(data: list[int]) -> None:
    of = chooser(data)
    h, k = of((2, 4), (4, 2), (2, 3), (3, 4))
    kinds = {"bias": of(True, False), "kv": of(h, 1), "d": of(8, h * k)}
    before = model(h, k, 1, dtype=of(torch.float32, torch.bfloat16), **kinds)
    assert_equal(before, Pipeline([SplitHeads(expect=1)]).run(before))


# refuses


def test_a_model_without_attention_is_none_of_its_business() -> None:
    s = Sketch()
    assert_silent(s.done(linear(s, s.input("x", "B", 8), "a", 8)), SplitHeads())


# faults


right = split_heads.projection


def by_width(at: At, m: Any) -> fx.Node:
    W = at.call(aten.unflatten.int, m.out.args[1], 1, [m.width, m.heads])
    return at.call(aten.permute.default, W, [2, 1, 0])


def turned(at: At, m: Any) -> fx.Node:
    W = at.call(aten.t.default, m.out.args[1])
    W = at.call(aten.unflatten.int, W, 1, [m.heads, m.width])
    return at.call(aten.permute.default, W, [1, 2, 0])


FAULTS: dict[str, Callable[[At, Any], fx.Node]] = {
    "heads permuted": lambda at, m: at.call(aten.flip.default, right(at, m), [0]),
    "width before heads": by_width,
    "the other axis of a square weight": turned,
    "one head for all": lambda at, m: at.call(
        aten.expand.default, at.call(aten.slice.Tensor, right(at, m), 0, 0, 1), [2, -1, -1]
    ),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_attention_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, m: Any) -> fx.Node:
        here = f"{place}.attn.o" in m.out.meta["nn_module_stack"]
        return (FAULTS[fault] if here else right)(at, m)

    monkeypatch.setattr(split_heads, "projection", planted)
    assert_blamed(Pipeline([SplitHeads(expect=3)]).run(model()), f"{place}.attn.o")


# again


def test_a_second_run_changes_nothing() -> None:
    assert_again(model(), SplitHeads())
