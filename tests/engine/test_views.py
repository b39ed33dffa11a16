"""carried_axis against the operators themselves: numbers laid along an axis tell where it went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from lensfx.graph import CASTS, VIEWS, carried_axis, same_shape, same_size
from lensfx.graph import views as tables

aten = torch.ops.aten
Draw = Callable[[st.SearchStrategy[Any]], Any]
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
DTYPES = st.sampled_from((*FLOATS, torch.int64, torch.bool))


def axis_of(draw: Draw, shape: list[int], extra: int = 0) -> int:
    rank = len(shape) + extra
    return draw(st.integers(-rank, rank - 1))


def regrouped(draw: Draw, shape: list[int]) -> list[int]:
    """A shape of as many entries: prime factors in their order, grouped anew."""
    primes = [p for size in shape for p in ({4: [2, 2], 6: [2, 3]}.get(size, [size]))]
    sizes = [1]
    for p in primes:
        if draw(st.booleans()):
            sizes.append(p)
        else:
            sizes[-1] *= p
    return sizes if draw(st.booleans()) or sizes[0] > 1 or len(sizes) == 1 else sizes[1:]


def reshape_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (regrouped(draw, shape),)


def flatten_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    first, last = sorted(draw(st.integers(0, len(shape) - 1)) for _ in range(2))
    return (first, last - len(shape))


def unflatten_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    at = axis_of(draw, shape)
    return (at, regrouped(draw, [shape[at]]))


def two_axes(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return axis_of(draw, shape), axis_of(draw, shape)


def permute_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    order = draw(st.permutations(range(len(shape))))
    return ([d - len(shape) if draw(st.booleans()) else d for d in order],)


def unsqueeze_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (axis_of(draw, shape, extra=1),)


def one_axis(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (axis_of(draw, shape),)


def some_axes(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (draw(st.lists(st.integers(0, len(shape) - 1), unique=True)),)


def expand_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    front = draw(st.lists(st.integers(1, 3), max_size=2))
    grown = [draw(st.sampled_from((s, -1, 3))) if s == 1 else s for s in shape]
    return ([*front, *grown],)


def slice_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    at = axis_of(draw, shape)
    return at, draw(st.integers(0, shape[at] - 1)), None, draw(st.integers(1, 2))


def select_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    at = axis_of(draw, shape)
    return at, draw(st.integers(-shape[at], shape[at] - 1))


def index_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    """A mask, or one or two lists of positions, of ranks and sizes that occur in practice."""
    picked: list[Tensor | None] = [None] * len(shape)
    if draw(st.integers(0, 3)) == 0:
        first = draw(st.integers(0, len(shape) - 1))
        held = shape[first : first + draw(st.integers(1, 2))]
        return ([*picked[:first], torch.ones(held, dtype=torch.bool)],)
    taken = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=2, unique=True))
    sizes = draw(st.lists(st.sampled_from(shape), max_size=2))
    for at in taken:
        picked[at] = torch.arange(torch.Size(sizes).numel()).reshape(sizes) % shape[at]
    return (picked,)


def nothing(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return ()


def dtype_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (draw(DTYPES),)


def device_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return torch.device("cpu"), draw(DTYPES)


def like_call(draw: Draw, shape: list[int]) -> tuple[Any, ...]:
    return (torch.zeros(draw(st.sampled_from(shape)), dtype=draw(DTYPES)),)


CALLS: dict[Any, Callable[[Draw, list[int]], tuple[Any, ...]]] = {
    aten.reshape.default: reshape_call,
    aten.view.default: reshape_call,
    aten._unsafe_view.default: reshape_call,
    aten.flatten.using_ints: flatten_call,
    aten.unflatten.int: unflatten_call,
    aten.transpose.int: two_axes,
    aten.permute.default: permute_call,
    aten.t.default: nothing,
    aten.unsqueeze.default: unsqueeze_call,
    aten.squeeze.dim: one_axis,
    aten.squeeze.dims: some_axes,
    aten.squeeze.default: nothing,
    aten.expand.default: expand_call,
    aten.slice.Tensor: slice_call,
    aten.select.int: select_call,
    aten.index.Tensor: index_call,
    aten.contiguous.default: nothing,
    aten.alias.default: nothing,
    aten.to.dtype: dtype_call,
    aten.to.dtype_layout: dtype_call,
    aten.to.device: device_call,
    aten.to.other: like_call,
    aten.type_as.default: like_call,
    aten._to_copy.default: dtype_call,
}
BY_KEYWORD = (aten.to.dtype_layout, aten._to_copy.default)

# A slice of an axis is not the axis even where it takes all of it, nor is a list of positions.
PICKS = (aten.slice.Tensor, aten.index.Tensor)


def counted(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose every entry says where it stands along the axis."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=dtype).reshape(sizes).expand(shape).contiguous()


def whole_at(after: Tensor, size: int) -> list[int]:
    """The axes of a result along which the counted axis lies whole."""
    fit = [i for i, s in enumerate(after.shape) if s == size]
    return [i for i in fit if torch.equal(after, counted(tuple(after.shape), i, after.dtype))]


def traced(target: Any, source: Tensor, args: tuple[Any, ...]) -> tuple[fx.Node, Tensor]:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def hold(value: Any) -> Any:
        if isinstance(value, list):
            return [hold(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        nodes.append(graph.placeholder(f"t{len(nodes)}"))
        nodes[-1].meta["val"] = value
        return nodes[-1]

    given, kwargs = (source, *args), {}
    if target in BY_KEYWORD:
        given, kwargs = (source,), {"dtype": args[0]}
    node = graph.call_function(target, tuple(map(hold, given)), kwargs)
    node.meta["val"] = target(*given, **kwargs)
    return node, node.meta["val"]


def check(target: Any, draw: Draw, seen: Counter[str]) -> None:
    rank = 2 if target is aten.t.default else draw(st.integers(1, 4))
    shape = draw(st.lists(st.sampled_from((1, 2, 2, 3, 4, 4, 6)), min_size=rank, max_size=rank))
    axis = draw(st.integers(0, rank - 1))
    args = CALLS[target](draw, shape)
    dtype = torch.bool if target in CASTS and draw(st.integers(0, 3)) == 0 else torch.float32
    source = counted(tuple(shape), axis, torch.int64).to(dtype)
    node, after = traced(target, source, args)
    claimed, size = carried_axis(node, axis), shape[axis]
    told = f"{target}({list(shape)}, {args}) axis {axis} -> {claimed}"
    floats = source.is_floating_point() and after.is_floating_point()
    literal = whole_at(after, size) if floats or target not in CASTS else []
    assert claimed is None or claimed in literal, told
    trivial = size == 1 or target in PICKS or after.numel() == 0
    if literal and not trivial:
        assert claimed == literal[0], told
    seen["carried" if claimed is not None else "lost"] += 1


def run(target: Any, examples: int, seen: Counter[str], phases: tuple[Phase, ...]) -> None:
    @settings(max_examples=examples, phases=phases)
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        check(target, data.draw, seen)

    compare()


def test_every_view_and_cast_is_checked() -> None:
    assert CALLS.keys() == VIEWS | CASTS


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_the_axis_lies_where_it_is_said_to(target: Any) -> None:
    seen: Counter[str] = Counter()
    run(target, 100, seen, (Phase.generate, Phase.shrink))
    assert seen["carried"] > 5, seen
    keeps_all = {aten.contiguous.default, aten.alias.default, aten.t.default, aten.transpose.int}
    keeps_all |= {aten.permute.default, aten.unsqueeze.default}
    assert (seen["lost"] == 0) == (target in keeps_all), seen


def first_fitting_size(before: Any, after: Any, axis: int) -> int | None:
    return next((i for i, s in enumerate(after) if s == before[axis]), None)


def stays(view: fx.Node, axis: int, rank: int) -> int:
    return axis


@pytest.mark.parametrize(
    ("target", "name", "wrong"),
    [
        (aten.reshape.default, "_through_reshape", first_fitting_size),
        (aten.transpose.int, "_MOVES", {aten.transpose.int: stays}),
        (aten.select.int, "_MOVES", {aten.select.int: stays}),
        (aten.to.dtype, "is_op", lambda node, *targets: False),
    ],
)
def test_the_check_finds_faults(
    target: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, name, wrong)
    with pytest.raises(AssertionError):
        run(target, 300, Counter(), (Phase.generate,))


SYMBOLIC = {
    "flattening the front keeps the last": (aten.reshape, [-1, 8], (None, None, 1)),
    "a head split keeps what is in front": (aten.reshape, ["B", "T", 4, 2], (0, 1, None)),
    "an axis is told by what is behind it": (aten.reshape, ["B", -1], (0, None, None)),
    "dynamic sizes may be swapped": (aten.permute, [1, 0, 2], (1, 0, 2)),
    "and regrouped": (aten.reshape, ["T", "B", 8], (None, None, 2)),
    "growing an axis in front": (aten.expand, [3, "B", "T", 8], (1, 2, 3)),
}


@pytest.mark.parametrize(("target", "sizes", "axes"), SYMBOLIC.values(), ids=SYMBOLIC)
def test_dynamic_sizes(target: Any, sizes: list[Any], axes: tuple[Any, ...]) -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    known = {"B": s.call(aten.sym_size.int, x, 0), "T": s.call(aten.sym_size.int, x, 1)}
    view = s.call(target.default, x, [known.get(size, size) for size in sizes])
    assert tuple(carried_axis(view, i) for i in range(3)) == axes


def test_equal_sizes_are_told_apart_by_what_is_behind_them() -> None:
    s = Sketch()
    x = s.input("x", 2, 8, 8)
    flat = s.call(aten.reshape.default, x, [16, 8])
    swapped = s.call(aten.transpose.int, x, 1, 2)
    assert [carried_axis(flat, i) for i in range(3)] == [None, None, 1]
    assert [carried_axis(swapped, i) for i in range(3)] == [0, 2, 1]


def test_an_unknown_equality_is_no_equality_and_no_guard() -> None:
    s = Sketch()
    a, b = (s.input(name, "B", 4).meta["val"].shape for name in ("a", "b"))
    assert same_shape(a, a)
    assert same_size(a[1], 4)
    assert not same_size(a[0], b[0])
    assert not same_size(a[0], 5)
    assert not same_shape(a, (*a, 1))
    assert not a[0].node.shape_env.guards


def test_what_is_no_view_carries_nothing() -> None:
    s = Sketch()
    x = s.input("x", 2, 4)
    assert carried_axis(x, 0) is None
    assert carried_axis(s.call(aten.relu.default, x), 1) is None
    assert carried_axis(s.call(aten.sym_size.int, x, 0), 1) is None
