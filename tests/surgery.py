"""What the tests of the passes that rewrite linear ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from torch import fx

from lensfx import ContractError, Lens, Pipeline, Program
from lensfx.graph import dtype_of, graph_text, native_name
from lensfx.rewrite import Pass
from lensfx.verify import check, prove

aten = torch.ops.aten


def linear(s: Sketch, x: fx.Node, name: str, out: int, bias: bool = True) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), dtype_of(x)
    W = s.weight(f"{name}.weight", out, size, dtype=dtype)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    return s.call(aten.linear.default, x, W, b, path=name)


def refusals(after: Program) -> list[tuple[str, str]]:
    """Who forbids it and the reason, for each site that was left alone."""
    return [(r.blame.split()[0], r.reason) for r in after.reports[-1].refused]


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


def assert_refused(before: Program, entry: Pass, blame: str, reason: str) -> None:
    after = Pipeline([entry]).run(before)
    assert refusals(after) == [(f"%{blame}", reason)]
    assert graph_text(after.graph) == graph_text(before.graph)


def assert_silent(before: Program, entry: Pass) -> None:
    after = Pipeline([entry]).run(before)
    assert (after.reports[-1].fired, after.reports[-1].refused) == ((), ())
    assert graph_text(after.graph) == graph_text(before.graph)


def assert_goldens(
    golden: Callable[[str, str], None], name: str, before: Program, entry: Pass
) -> Program:
    """The texts before, rewritten and folded; the rewritten program."""
    rewritten = Pipeline([entry]).rewrite(before)
    golden(f"{name}.before", graph_text(before.graph))
    golden(f"{name}.rewritten", graph_text(rewritten.graph))
    golden(f"{name}.after", graph_text(Pipeline([entry]).run(before).graph))
    return rewritten


def assert_blamed(after: Program, path: str) -> None:
    """The proof finds a fault, and names the rewrite at the module `path`."""
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith(f"{after.passes[-1]} broke its contract exact: ")
    assert f"  {path}  model.py:7" in second


def assert_again(before: Program, entry: Pass) -> None:
    """A second run changes nothing, every node is described, no tensor is lost or left over."""
    for run in (Pipeline([entry]).rewrite, Pipeline([entry]).run):
        after = run(before)
        again = run(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
    read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
    sources = {name for f in after.formulas.values() for name in f.sources}
    assert read == set(after.tensors)
    assert set(before.tensors) - read <= sources


def chooser(data: list[int]) -> Callable[..., Any]:
    """Picks one of its arguments by the next of the drawn numbers."""
    pick = iter(data)
    return lambda *options: options[next(pick) % len(options)]
