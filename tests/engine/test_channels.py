"""Channel numbers: each view against itself, run on a vector that was spread over the value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lensfx.analysis import channels as module
from lensfx.analysis.channels import Channels, joined, replay, seed, through
from lensfx.graph import Program, graph_text, hook_point, shape_of
from lensfx.rewrite import Edit

aten = torch.ops.aten
Pick = Callable[..., Any]
View = Callable[[Sketch, fx.Node, Pick], fx.Node]


def sizes(n: fx.Node) -> list[Any]:
    return list(shape_of(n) or ())


def regrouped(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    """Join the two last axes, or split one that is even."""
    shape = sizes(x)
    even = [a for a, n in enumerate(shape) if isinstance(n, int) and n % 2 == 0]
    if even and pick(True, False):
        a = pick(*even)
        halves = pick([2, shape[a] // 2], [shape[a] // 2, 2])
        return s.call(aten.unflatten.int, x, a, halves)
    return s.call(aten.flatten.using_ints, x, len(shape) - 2, -1)


def ids(s: Sketch, n: Any, numbers: Any) -> fx.Node:
    top = n if isinstance(n, int) else 3
    return s.stored(f"ids_{len(s.tensors)}", torch.tensor(numbers) % top)


def rows(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    shape = sizes(x)
    a = pick(*range(len(shape)))
    given: list[Any] = [None] * a + [ids(s, shape[a], pick([0, 0, 1], [[1], [0]]))]
    for b in range(a + 1, len(shape)):
        given.append(ids(s, shape[b], [1]) if pick(True, False) else None)
    return s.call(aten.index.Tensor, x, given)


def axis(x: fx.Node, pick: Pick) -> int:
    rank = len(sizes(x))
    return int(pick(*range(-rank, rank)))


def part(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    a = pick(*[i for i, n in enumerate(sizes(x)) if isinstance(n, int)])
    n = sizes(x)[a]
    op, *args = pick(
        (aten.split.Tensor, 2, a),
        (aten.chunk.default, 2, a),
        (aten.split_with_sizes.default, [1, n - 1], a),
        (aten.unbind.int, a),
        (aten.tensor_split.indices, [1], a),
    )
    pieces = s.call(op, x, *args)
    return s.call(operator.getitem, pieces, pick(*range(len(pieces.meta["val"]))))


def ordered(x: fx.Node, pick: Pick) -> list[int]:
    left = list(range(len(sizes(x))))
    return [left.pop(pick(*range(len(left)))) for _ in range(len(left))]


def spread(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    a = pick(*range(len(sizes(x)) + 1))
    new = s.call(aten.unsqueeze.default, x, a)
    return s.call(aten.expand.default, new, [*[-1] * a, 3, *[-1] * (len(sizes(x)) - a)])


def picked(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    a = axis(x, pick)
    return s.call(aten.index_select.default, x, a, ids(s, sizes(x)[a], [1, 0, 1]))


def gathered(s: Sketch, x: fx.Node, pick: Pick) -> fx.Node:
    a = axis(x, pick)
    zeros = s.call(aten.to.dtype, s.call(aten.zeros_like.default, x), torch.int64)
    return s.call(aten.gather.default, x, a, zeros)


VIEWS: dict[str, View] = {
    "regroup": regrouped,
    "index": rows,
    "part": part,
    "spread": spread,
    "index_select": picked,
    "gather": gathered,
    "transpose": lambda s, x, p: s.call(aten.transpose.int, x, axis(x, p), axis(x, p)),
    "permute": lambda s, x, p: s.call(aten.permute.default, x, ordered(x, p)),
    "movedim": lambda s, x, p: s.call(aten.movedim.int, x, axis(x, p), axis(x, p)),
    "select": lambda s, x, p: s.call(aten.select.int, x, axis(x, p), p(0, 1, -1)),
    "slice": lambda s, x, p: s.call(
        aten.slice.Tensor, x, axis(x, p), p(None, 0, 1), p(None, -1, 2, 9), p(1, 2)
    ),
    "narrow": lambda s, x, p: s.call(aten.narrow.default, x, axis(x, p), 0, p(1, 2)),
    "repeat_interleave": lambda s, x, p: s.call(aten.repeat_interleave.self_int, x, 2, axis(x, p)),
    "repeat": lambda s, x, p: s.call(
        aten.repeat.default, x, [*p([], [2]), *(p(1, 2) for _ in sizes(x))]
    ),
    "flip": lambda s, x, p: s.call(aten.flip.default, x, [axis(x, p)]),
    "roll": lambda s, x, p: s.call(aten.roll.default, x, [1], [axis(x, p)]),
    "unsqueeze": lambda s, x, p: s.call(aten.unsqueeze.default, x, p(0, 1, -1)),
    "squeeze": lambda s, x, p: s.call(aten.squeeze.default, x),
    "contiguous": lambda s, x, p: s.call(aten.contiguous.default, x),
    "cast": lambda s, x, p: s.call(aten.to.dtype, x, torch.float32),
    "dropout": lambda s, x, p: s.call(aten.dropout.default, x, 0.5, False),
    "hook": lambda s, x, p: s.call(hook_point, x, f"h{len(s.graph.nodes)}"),
}


class NoSite(Exception):
    """The drawn view cannot be made of this value."""


def drawn(s: Sketch, x: fx.Node, kind: str, pick: Pick) -> fx.Node:
    try:
        return VIEWS[kind](s, x, pick)
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError):
        # Leave no half-made node behind.
        for n in reversed(s.graph.nodes):
            if n is x or n.op != "call_function":
                break
            if not n.users and "val" not in n.meta:
                s.graph.erase_node(n)
        raise NoSite from None


def run(program: Program, x: fx.Node, value: fx.Node, given: torch.Tensor) -> torch.Tensor:
    """What `value` is where `x` is `given`."""
    env: dict[fx.Node, Any] = {x: given}
    env.update(
        {n: program.tensors[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}
    )
    for n in program.graph.nodes:
        if n.op == "call_function" and n not in env:
            args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda m: env[m])
            env[n] = n.target(*args, **kwargs)
    return env[value]


def assert_followed(program: Program, x: fx.Node, value: fx.Node, found: Channels, at: int) -> None:
    """The vector spread over x and run through the graph is what the numbers say."""
    count = found.count
    vector = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vector = vector.float().double()
    shape = [
        {0: 3, 1: 4}.get(i, int(n)) if not isinstance(n, int) else n for i, n in enumerate(sizes(x))
    ]
    spread = vector.reshape([count if i == at else 1 for i in range(len(shape))]).expand(shape)
    wanted = run(program, x, value, spread)
    assert found.idx.ndim == wanted.ndim
    told = vector.to(wanted.dtype)[found.idx]
    torch.testing.assert_close(told.expand(wanted.shape), wanted, rtol=0, atol=0)
    for a, n in enumerate(found.idx.shape):
        assert n == (wanted.shape[a] if a in found.axes else 1)
    edit = Edit(program.graph, "test")
    edit.begin(value)
    stored = next(n for n in program.graph.nodes if n.target == "vector")
    weight = replay(edit.before(program.graph.output_node()), stored, found)
    assert weight.meta["weight"]
    assert tuple(weight.meta["val"].shape) == tuple(found.idx.shape)
    again = run(replace(program, tensors={**program.tensors, "vector": vector}), x, weight, spread)
    torch.testing.assert_close(again, vector[found.idx], rtol=0, atol=0)


def chain(kinds: list[str], numbers: list[int]) -> bool:
    """Whether the channels of a random chain of these views were told; they are checked."""
    left = iter(numbers)

    def pick(*options: Any) -> Any:
        return options[next(left, 0) % len(options)]

    s = Sketch()
    shape = pick(["B", "T", 4], ["B", 3, 4], [2, 3, 4], ["B", 4, 1], [2, 1, 2, 3], [4, "T"])
    x = s.input("x", *shape, dtype=torch.float64)
    fixed = [i for i, n in enumerate(shape) if not isinstance(n, str)]
    at = pick(*reversed(fixed))
    s.weight("vector", shape[at], dtype=torch.float64)
    found, value = seed(x, at), x
    for kind in kinds:
        try:
            value = drawn(s, value, kind, pick)
        except NoSite:
            continue
        steps = [value]
        while steps[-1].args[0] is not x and "followed" not in steps[-1].args[0].meta:
            steps.append(steps[-1].args[0])
        for step in reversed(steps):
            told = through(step, step.args[0], found)
            if isinstance(told, str):
                assert told.startswith((f"%{step.name} ", "no rule for"))
                return False
            found = told
        value.meta["followed"] = True
    program = s.done(value)
    text = graph_text(program.graph)
    assert text
    assert_followed(program, x, value, found, at)
    return True


@pytest.mark.parametrize("kind", VIEWS)
def test_each_view_alone(kind: str) -> None:
    told = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        numbers = torch.randint(0, 1000, (30,), generator=generator).tolist()
        told += chain([kind], numbers)
    assert told >= 4


@settings(max_examples=150)
@given(
    kinds=st.lists(st.sampled_from(list(VIEWS)), min_size=2, max_size=5),
    numbers=st.lists(st.integers(0, 999), min_size=40, max_size=40),
)
def test_views_in_a_row(kinds: list[str], numbers: list[int]) -> None:
    chain(kinds, numbers)


def test_a_reader_of_sizes_is_no_second_reading() -> None:
    s = Sketch()
    x = s.input("x", "B", 4)
    y = s.call(aten.expand_as.default, x, x)
    found = through(y, x, seed(x, -1))
    assert isinstance(found, Channels)
    assert found.in_order


def test_cat_of_parts_and_factors() -> None:
    s = Sketch()
    x = s.input("x", "B", 4, dtype=torch.float64)
    s.weight("vector", 4, dtype=torch.float64)
    parts = [s.call(aten.slice.Tensor, x, 1, *cut) for cut in ((2, 4), (0, 2))]
    both = s.call(aten.cat.default, parts, 1)
    told = [through(p, x, seed(x, -1)) for p in parts]
    assert all(isinstance(t, Channels) for t in told)
    found = joined(told, 1)  # type: ignore[arg-type]
    assert found.idx.tolist() == [[2, 3, 0, 1]]
    assert_followed(s.done(both), x, both, found, 1)


REFUSED: dict[str, tuple[list[Any], int, Callable[[Sketch, fx.Node], fx.Node], str]] = {
    "unknown size": (
        ["B", "T", 4],
        2,
        lambda s, x: s.call(aten.flatten.using_ints, x, 1, 2),
        "%flatten merges the channels with axis 1 of unknown size s",
    ),
    "picked": (
        ["B", 4],
        1,
        lambda s, x: s.call(aten.index.Tensor, x, [None, s.stored("i", torch.tensor([1, 0, 1]))]),
        "%index picks channels by a tensor",
    ),
    "dropout": (
        ["B", 4],
        1,
        lambda s, x: s.call(aten.dropout.default, x, 0.5, True),
        "%dropout drops entries at random",
    ),
    "whole numbers": (
        ["B", 4],
        1,
        lambda s, x: s.call(aten.to.dtype, x, torch.int64),
        "%to turns it into torch.int64",
    ),
    "unknown": (
        ["B", 4],
        1,
        lambda s, x: s.call(aten.tanh.default, x),
        "no rule for tanh at %tanh; nothing is assumed",
    ),
    "as an index": (
        ["B", 4],
        1,
        lambda s, x: s.call(aten.gather.default, s.weight("w", 3, 4), 0, x),
        "%gather (gather) reads it in another way than as its first input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    shape, at, view, words = REFUSED[case]
    s = Sketch()
    kind = torch.int64 if case == "as an index" else None
    x = s.input("x", *shape, dtype=kind)
    value = view(s, x)
    found = through(value, x, seed(x, at))
    assert isinstance(found, str)
    assert found.startswith(words)


def test_a_selected_channel_leaves_no_channel_axis() -> None:
    """A width-1 slice keeps its axis among the channels, a selected channel does not."""
    s = Sketch()
    x = s.input("x", "B", 5, 4)
    one = s.call(aten.slice.Tensor, x, 2, 1, 2)
    gone = s.call(aten.select.int, x, 2, 1)
    a, b = (through(n, x, seed(x, -1)) for n in (one, gone))
    assert isinstance(a, Channels)
    assert isinstance(b, Channels)
    assert (a.axes, a.idx.tolist()) == ({2}, [[[1]]])
    assert (b.axes, b.idx.tolist()) == (frozenset(), [[1]])


# faults


def entries_kept(view: Any) -> Any:
    return replace(view.channels, parts=())


def unexpanded(view: Any) -> Any:
    shape = [int(n) if a in view.channels.axes else 1 for a, n in enumerate(view.after)]
    return module._reshape(view) if len(shape) == len(view.before) else entries_kept(view)


FAULTS = {
    "a slice of channels keeps all": ("slice", entries_kept),
    "a flip keeps the order": ("flip", entries_kept),
    "repeat does not repeat": ("repeat_interleave", entries_kept),
    "a transpose is none": ("transpose", entries_kept),
    "an index keeps its rank": ("index", entries_kept),
    "a select keeps the first": (
        "select",
        lambda v: v.channels.call(aten.select.int, v.dim(), 0, axes=module._kept(v, v.dim())),
    ),
    "a split has equal parts": (
        "part",
        lambda v: replace(v.channels, parts=(replace(v.channels, parts=()),) * 9),
    ),
    "a reshape keeps its axes": ("regroup", unexpanded),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_rule_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, rule = FAULTS[fault]
    names = {
        "slice": "slice",
        "flip": "flip",
        "repeat_interleave": "repeat_interleave",
        "transpose": "transpose",
        "index": "index",
        "select": "select",
    }
    ops = {
        "part": ("split", "chunk", "split_with_sizes", "unbind", "tensor_split"),
        "regroup": ("flatten", "unflatten"),
    }.get(kind, (names.get(kind, kind),))
    rules = {
        op: rule if op.overloadpacket.__name__ in ops else known
        for op, known in module._RULES.items()
        if op is not hook_point
    }
    monkeypatch.setattr(module, "_RULES", rules)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        test_each_view_alone(kind)
