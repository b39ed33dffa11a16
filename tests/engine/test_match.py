"""The matcher finds exactly what a pattern says, and says of everything else why not."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any as Object

import pytest
import torch
from graphs import LINEAR, NORM, Sketch
from torch import fx

from lensfx.graph import readers
from lensfx.rewrite import (
    Any,
    Const,
    EveryReader,
    Match,
    Maybe,
    Miss,
    OneOf,
    Op,
    Param,
    Ref,
    Through,
    match,
)
from lensfx.rewrite.match import root_targets, same_value

aten = torch.ops.aten
Build = Callable[[Sketch], fx.Node]


def shown(value: Object) -> Object:
    if isinstance(value, tuple):
        return tuple(map(shown, value))
    return value.name if isinstance(value, fx.Node) else value


def found(build: Build, pattern: Object) -> Object:
    """The bindings by name, or `reason @ blamed node`, of the pattern at the node that is built."""
    sketch = Sketch()
    root = build(sketch)
    sketch.done(root)
    result = match(pattern, root)
    if isinstance(result, Miss):
        return f"{result.reason} @ {result.node.name}"
    assert result.root is root
    return {k: shown(v) for k, v in result.bindings.items() if k != "root"}


def norm(*args: Object, target: Object = aten.layer_norm.default) -> Build:
    def build(s: Sketch) -> fx.Node:
        nodes = {"x": s.input("x", 2, 8), "g": s.weight("g", 8), "b": s.weight("b", 8)}
        given = (nodes.get(a, a) if isinstance(a, str) else a for a in args)
        return s.call(target, nodes["x"], [8], *given)

    return build


def pair(target: Object, first: str = "x", second: str = "relu", **kwargs: Object) -> Build:
    """A call of two operands, each the input `x`, the weight `w` or `relu` or `neg` of x."""

    def build(s: Sketch) -> fx.Node:
        x, w = s.input("x", 2, 2), s.weight("w", 2, 2)
        made = {"x": x, "w": w}
        for name in ("relu", "neg"):
            made[name] = s.call(getattr(aten, name).default, x)
        return s.call(target, made[first], made[second], **kwargs)

    return build


def binary(target: Object, self: Object, other: Object, **more: Object) -> Op:
    return Op("op", (target,), {"self": self, "other": other, **more})


RELU = Op("r", (aten.relu.default,), {"self": Any("a")})
NORM_EPS = Op("n", NORM.targets, {**NORM.args, "eps": Const("eps")})

ARGUMENTS = {
    "defaults come from the schema": (
        norm(),
        NORM_EPS,
        {"n": "layer_norm", "g": None, "s": None, "eps": 1e-05},
    ),
    "None is absent": (
        norm("g", None, 1e-3),
        NORM_EPS,
        {"n": "layer_norm", "g": "g", "s": None, "eps": 1e-3},
    ),
    "arguments that are not named do not count": (
        norm("g", "b", 1e-05, False),
        NORM,
        {"norm": "layer_norm", "g": "g", "s": "b"},
    ),
    "Maybe covers an argument the operator does not have": (
        norm("g", target=aten.rms_norm.default),
        NORM_EPS,
        {"n": "rms_norm", "g": "g", "s": None, "eps": None},
    ),
    "only Maybe does": (
        norm("g", target=aten.rms_norm.default),
        Op("n", NORM.targets, {"bias": Const("s")}),
        "rms_norm has no argument bias @ rms_norm",
    ),
    "a name inside Maybe(Op) is None too": (
        norm(),
        Op("n", NORM.targets, {"weight": Maybe(Op("m", (aten.mul.Tensor,), {"self": Any("v")}))}),
        {"n": "layer_norm", "m": None, "v": None},
    ),
    "Maybe is not a wildcard": (
        norm("g"),
        Op("n", NORM.targets, {"weight": Maybe(Const("k"))}),
        "g is not a constant @ g",
    ),
    "a parameter of another rank": (
        norm("g"),
        Op("n", NORM.targets, {"weight": Param("g", axes=2)}),
        "g has 1 axes, wanted 2 @ g",
    ),
    "absent where a node is wanted": (
        norm(),
        Op("n", NORM.targets, {"weight": Any("g")}),
        "None is not computed in the graph @ layer_norm",
    ),
    "another operator": (
        norm(),
        LINEAR,
        "it is layer_norm, wanted linear @ layer_norm",
    ),
    "another operator, several wanted": (
        pair(aten.add.Tensor),
        NORM,
        "it is add, wanted layer_norm or rms_norm @ add",
    ),
}

COMMUTING = {
    f"{target} {first} {second}": (
        pair(target, first, second),
        binary(target, RELU, Any("b")),
        {"op": name, "r": "relu", "a": "x", "b": "neg"},
    )
    for target, name in ((aten.add.Tensor, "add"), (aten.mul.Tensor, "mul"))
    for first, second in (("relu", "neg"), ("neg", "relu"))
} | {
    "explicit alpha=1 commutes": (
        pair(aten.add.Tensor, "neg", "relu", alpha=1),
        binary(aten.add.Tensor, RELU, Any("b"), alpha=Const(value=1)),
        {"op": "add", "r": "relu", "a": "x", "b": "neg"},
    ),
    "one operand named, on either side": (
        pair(aten.mul.Tensor, "neg", "relu"),
        Op("op", (aten.mul.Tensor,), {"self": RELU}),
        {"op": "mul", "r": "relu", "a": "x"},
    ),
    "alpha=2 does not commute": (
        pair(aten.add.Tensor, "neg", "relu", alpha=2),
        binary(aten.add.Tensor, RELU, Any("b")),
        "it is neg, wanted relu @ neg",
    ),
    "alpha=2 in the written order": (
        pair(aten.add.Tensor, "relu", "neg", alpha=2),
        binary(aten.add.Tensor, RELU, Any("b"), alpha=Const("scale")),
        {"op": "add", "r": "relu", "a": "x", "b": "neg", "scale": 2},
    ),
    "sub does not commute": (
        pair(aten.sub.Tensor, "neg", "relu"),
        binary(aten.sub.Tensor, RELU, Any("b")),
        "it is neg, wanted relu @ neg",
    ),
    "the weight on either side": (
        pair(aten.mul.Tensor, "w", "x"),
        binary(aten.mul.Tensor, Any("v"), Param("g")),
        {"op": "mul", "v": "x", "g": "w"},
    ),
}


def unequal(s: Sketch) -> fx.Node:
    """relu(x) - x: two ways to read the left operand, and only the second fits the right one."""
    x = s.input("x", 2, 2)
    return s.call(aten.sub.Tensor, s.call(aten.relu.default, x), x)


def crossed(s: Sketch) -> fx.Node:
    """(1 + relu(x)) * relu(x): both operators have to be turned round."""
    r = s.call(aten.relu.default, s.input("x", 2, 2))
    return s.call(aten.mul.Tensor, s.call(aten.add.Tensor, r, 1), r)


def twins(*, names: tuple[str, str] = ("w", "w"), op: Object = aten.mul.Tensor) -> Build:
    """op(x, first) - op(x, second), each reading its weight by its own get_attr."""

    def build(s: Sketch) -> fx.Node:
        x = s.input("x", 2, 2)
        reads = [s.weight(names[0], 2, 2), s.weight(names[1], 2, 2)]
        return s.call(aten.sub.Tensor, *(s.call(op, x, r) for r in reads))

    return build


def noisy(s: Sketch) -> fx.Node:
    draws = [s.call(aten.rand.default, [2]) for _ in range(2)]
    return s.call(aten.sub.Tensor, *draws)


SAME = binary(aten.sub.Tensor, Any("a"), Ref("a"))
AFTER_RELU = Op("op", (aten.sub.Tensor,), {"self": OneOf(Any("a"), RELU), "other": Ref("a")})

NAMES = {
    "OneOf takes the next alternative when the rest does not fit": (
        unequal,
        AFTER_RELU,
        {"op": "sub", "r": "relu", "a": "x"},
    ),
    "nested orders": (
        crossed,
        binary(
            aten.mul.Tensor,
            Any("a"),
            Op("plus", (aten.add.Tensor,), {"self": Const("k"), "other": Ref("a")}),
        ),
        {"op": "mul", "a": "relu", "plus": "add", "k": 1},
    ),
    "Ref is another node": (
        pair(aten.sub.Tensor, "relu", "neg"),
        SAME,
        "neg is not a @ neg",
    ),
    "Ref is an equal call on an equal read": (
        twins(),
        SAME,
        {"op": "sub", "a": "mul"},
    ),
    "a read of another parameter is another value": (
        twins(names=("w", "v")),
        SAME,
        "mul_1 is not a @ mul_1",
    ),
    "the same name twice is the same value": (
        twins(names=("w", "v")),
        binary(aten.sub.Tensor, Any("a"), Any("a")),
        "a is two different values @ mul_1",
    ),
    "two draws of random numbers are two values": (noisy, SAME, "rand_1 is not a @ rand_1"),
    "an unbound Ref": (unequal, binary(aten.sub.Tensor, Any("b"), Ref("a")), "x is not a @ x"),
}


def behind(*views: tuple[Object, ...]) -> Build:
    """neg of views of relu of x: [2, 8, 8]."""

    def build(s: Sketch) -> fx.Node:
        value = s.call(aten.relu.default, s.input("x", 2, 8, 8))
        for target, *args in views:
            value = s.call(target, value, *args)
        return s.call(aten.neg.default, value)

    return build


def unary(inner: Object) -> Op:
    return Op("n", (aten.neg.default,), {"self": inner})


VIEWS = {
    "no view": (
        behind(),
        unary(Through(RELU, path="p")),
        {"n": "neg", "r": "relu", "a": "x", "p": ()},
    ),
    "flattening what is in front keeps the last axis": (
        behind((aten.reshape.default, [-1, 8]), (aten.to.dtype, torch.float64)),
        unary(Through(RELU, path="p")),
        {"n": "neg", "r": "relu", "a": "x", "p": ("to", "reshape")},
    ),
    "a head split does not": (
        behind((aten.reshape.default, [2, 8, 4, 2])),
        unary(Through(RELU)),
        "it is reshape, wanted relu @ reshape",
    ),
    "two axes of one size, swapped": (
        behind((aten.transpose.int, 1, 2)),
        unary(Through(RELU)),
        "it is transpose, wanted relu @ transpose",
    ),
    "there and back is still two steps that move it": (
        behind((aten.transpose.int, 1, 2), (aten.transpose.int, 1, 2)),
        unary(Through(RELU)),
        "it is transpose, wanted relu @ transpose_1",
    ),
    "a cast to whole numbers": (
        behind((aten.to.dtype, torch.int64)),
        unary(Through(RELU)),
        "it is to, wanted relu @ to",
    ),
    "another axis to keep": (
        behind((aten.transpose.int, 1, 2)),
        unary(Through(RELU, keeps=0, path="p")),
        {"n": "neg", "r": "relu", "a": "x", "p": ("transpose",)},
    ),
    "other views than allowed": (
        behind((aten.unsqueeze.default, 0)),
        unary(Through(RELU, via=frozenset({aten.reshape.default}))),
        "it is unsqueeze, wanted relu @ unsqueeze",
    ),
    "nearest fit first": (
        behind((aten.unsqueeze.default, 0)),
        unary(Through(Any("v"), path="p")),
        {"n": "neg", "v": "unsqueeze", "p": ()},
    ),
}

TABLE = {**ARGUMENTS, **COMMUTING, **NAMES, **VIEWS}


@pytest.mark.parametrize(("build", "pattern", "expected"), TABLE.values(), ids=TABLE)
def test_table(build: Build, pattern: Object, expected: Object) -> None:
    assert found(build, pattern) == expected


@pytest.mark.parametrize(
    ("wanted", "given", "fits"),
    [
        (1e-05, 1.0000000000000001e-05, True),
        (1e-05, 1e-05 * (1 + 1e-10), True),
        (1e-05, 1.001e-05, False),
        (1.0, 1, True),
        (1.0, True, False),
        (1.0, None, False),
        (1, 1, True),
        (1, 1.0, False),
        (1, True, False),
        (True, True, True),
        (True, 1, False),
        (None, None, True),
        (None, 0, False),
        (-math.inf, -math.inf, True),
        (-math.inf, -1e308, False),
        ([-1], [-1], True),
        ((-1,), [-1], True),
        ([-1], [-2], False),
        ([-1], -1, False),
    ],
)
def test_constants(wanted: Object, given: Object, fits: bool) -> None:
    graph = fx.Graph()
    call = graph.call_function(aten.pow.Tensor_Scalar, (graph.placeholder("x"), given))
    result = match(Op("p", (call.target,), {"exponent": Const("k", wanted)}), call)
    if fits:
        assert isinstance(result, Match)
        assert result.k is given or result.k == given
    else:
        assert isinstance(result, Miss)
        assert result.reason == f"it is {given!r}, wanted {wanted!r}"


def test_constant_tolerance_and_computed_values() -> None:
    power = aten.pow.Tensor_Scalar
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(power, (x, 2.5))
    loose = Const("k", 2.0, tolerance=0.5)
    assert isinstance(match(Op("p", (power,), {"exponent": loose}), call), Match)
    assert isinstance(match(Op("p", (power,), {"exponent": Const(value=2.0)}), call), Miss)
    result = match(Op("p", (power,), {"self": Const("k")}), call)
    assert result == Miss("x is not a constant", x)


def test_the_deepest_reason_is_told() -> None:
    def build(s: Sketch) -> fx.Node:
        x = s.input("x", 2, 2)
        return s.call(aten.neg.default, s.call(aten.relu.default, s.call(aten.tanh.default, x)))

    shallow = unary(Op("t", (aten.tanh.default,)))
    deep = unary(Op("r", (aten.relu.default,), {"self": Op("s", (aten.sin.default,))}))
    told = "it is tanh, wanted sin @ tanh"
    assert found(build, OneOf(shallow, deep)) == found(build, OneOf(deep, shallow)) == told


def test_depth_of_structural_sameness() -> None:
    graph = fx.Graph()
    a = b = graph.placeholder("x")
    for depth in range(5):
        assert same_value(a, b), depth
        a, b = (graph.call_function(aten.relu.default, (n,)) for n in (a, b))
    assert same_value((a, [1, 2.0]), (a, [1, 2.0]))
    assert not same_value((a, [1, 2.0]), (a, [1, 2]))


def test_readers_of_an_op_do_not_count_sizes() -> None:
    s = Sketch()
    r = s.call(aten.relu.default, s.input("x", "B", 4))
    size = s.call(aten.sym_size.int, r, 0)
    first = s.call(aten.reshape.default, s.call(aten.neg.default, r), [size, 2, 2])
    assert isinstance(match(Op("r", (aten.relu.default,), readers=1), r), Match)
    second = s.call(aten.tanh.default, r)
    s.done(first, second)
    assert match(Op("r", (aten.relu.default,), readers=1), r) == Miss("relu has 2 readers", r)
    assert [n.name for n in readers(r)] == ["neg", "tanh"]


def test_interior_is_what_the_pattern_walked_over() -> None:
    s = Sketch()
    x, w = s.input("x", 2, 2), s.weight("w", 2, 2)
    product = s.call(aten.mul.Tensor, x, w)
    root = s.call(aten.neg.default, product)
    s.done(root)
    inner = Op("m", (aten.mul.Tensor,), {"self": Any("x"), "other": Param("w")})
    result = match(unary(inner), root)
    assert isinstance(result, Match)
    assert result.interior == {x, product}
    with pytest.raises(AttributeError, match="the pattern binds no 'y'"):
        _ = result.y


def test_root_targets() -> None:
    assert root_targets(EveryReader(NORM, LINEAR)) == NORM.targets
    assert root_targets(OneOf(LINEAR, NORM)) == (*LINEAR.targets, *NORM.targets)
    with pytest.raises(TypeError, match="starts at an Op, not at Through"):
        root_targets(Through(LINEAR))
    with pytest.raises(TypeError, match="cannot stand inside another"):
        found(behind(), unary(EveryReader(NORM, LINEAR)))


def test_absent_and_present_under_one_name_do_not_match() -> None:
    both = Op("n", NORM.targets, {"weight": Maybe(Param("v")), "bias": Maybe(Param("v"))})
    assert isinstance(found(norm(None, "b"), both), str)
    assert isinstance(found(norm("g", None), both), str)


class Fan:
    """A norm over `x: [B, T, 8]` and its readers, added one by one."""

    def __init__(self) -> None:
        self.s = Sketch()
        self.x = self.s.input("x", "B", "T", 8)
        weights = {k: self.s.weight(k, 8, 8) for k in ("q", "k", "v")}
        self.weights = iter(weights.values())
        self.norm = self.s.call(
            aten.layer_norm.default, self.x, [8], self.s.weight("g", 8), self.s.weight("b", 8)
        )
        self.outputs: list[fx.Node] = []

    def linear(self, *views: tuple[Object, ...]) -> fx.Node:
        value = self.norm
        for target, *args in views:
            value = self.s.call(target, value, *args)
        self.outputs.append(self.s.call(aten.linear.default, value, next(self.weights)))
        return self.outputs[-1]

    def other(self, target: Object, *args: Object) -> fx.Node:
        self.outputs.append(self.s.call(target, self.norm, *args))
        return self.outputs[-1]

    def match(self, others: str | None = None) -> Match | Miss:
        self.s.done(*self.outputs)
        return match(EveryReader(NORM, LINEAR, others=others), self.norm)


FLAT, HEADS = (aten.reshape.default, [-1, 8]), (aten.reshape.default, [-1, 4, 2])


def test_every_reader_directly_and_behind_views() -> None:
    fan = Fan()
    made = [fan.linear(), fan.linear(FLAT), fan.linear((aten.to.dtype, torch.float32), FLAT)]
    fan.s.call(aten.sym_size.int, fan.norm, 0)
    result = fan.match()
    assert isinstance(result, Match)
    assert shown((result.norm, result.g, result.s)) == ("layer_norm", "g", "b")
    assert [r.linear for r in result.readers] == made
    assert [shown(r.path) for r in result.readers] == [(), ("reshape",), ("to", "reshape_1")]
    assert [shown(r.W) for r in result.readers] == ["q", "k", "v"]
    assert all(r.norm is fan.norm and r.b is None for r in result.readers)
    assert {n.name for n in result.interior} == {"reshape", "to", "reshape_1"}


def add_residual(fan: Fan) -> None:
    fan.other(aten.add.Tensor, fan.x)


def add_heads(fan: Fan) -> None:
    fan.other(*HEADS)


def add_swapped(fan: Fan) -> None:
    fan.other(aten.transpose.int, 1, 2)


def add_computed_weight(fan: Fan) -> None:
    fan.other(aten.linear.default, fan.s.call(aten.reshape.default, fan.x, [-1, 8]))


def add_output(fan: Fan) -> None:
    fan.outputs.append(fan.norm)


def add_flat_output(fan: Fan) -> None:
    fan.other(*FLAT)


UNFIT = {
    "residual": (add_residual, "reader add is add, not linear", "add"),
    "heads": (add_heads, "reader reshape is reshape, not linear", "reshape"),
    "swapped axes": (add_swapped, "reader transpose is transpose, not linear", "transpose"),
    "computed weight": (
        add_computed_weight,
        "reader linear_1: reshape is not a parameter",
        "linear_1",
    ),
    "output": (add_output, "it is an output of the model, which would change", "output"),
    "view that is an output": (
        add_flat_output,
        "it is an output of the model, which would change",
        "output",
    ),
}


@pytest.mark.parametrize(("add", "reason", "blamed"), UNFIT.values(), ids=UNFIT)
def test_a_reader_that_does_not_fit(add: Callable[[Fan], None], reason: str, blamed: str) -> None:
    strict, lenient = Fan(), Fan()
    for fan in (strict, lenient):
        fan.linear()
        add(fan)
    result = strict.match()
    assert isinstance(result, Miss)
    assert (result.reason, result.node.name, result.at_site) == (reason, blamed, True)
    kept = lenient.match(others="others")
    assert isinstance(kept, Match)
    assert shown(kept.others) == (blamed,)
    assert [r.linear.name for r in kept.readers] == ["linear"]


def test_others_is_empty_where_every_reader_fits() -> None:
    fan = Fan()
    fan.linear()
    result = fan.match(others="others")
    assert isinstance(result, Match)
    assert result.others == ()


def test_no_reader_fits() -> None:
    fan = Fan()
    add = fan.other(aten.add.Tensor, fan.x)
    assert fan.match(others="others") == Miss("no reader can take it up", add, at_site=True)
    unread = Fan()
    unread.outputs.append(unread.x)
    assert unread.match() == Miss("no reader can take it up", unread.norm, at_site=True)


def test_a_producer_that_does_not_fit_is_not_a_site() -> None:
    s = Sketch()
    x = s.input("x", 8)
    n = s.call(aten.layer_norm.default, x, [8], x)
    s.done(s.call(aten.linear.default, n, s.weight("q", 8, 8)))
    assert match(EveryReader(NORM, LINEAR), n) == Miss("x is not a parameter", x)


def scaled(second: Object) -> EveryReader:
    return EveryReader(Op("r", (aten.relu.default,)), binary(aten.mul.Tensor, Ref("r"), second))


@pytest.mark.parametrize("view", [False, True])
def test_one_reader_that_reads_it_twice(view: bool) -> None:
    s = Sketch()
    r = s.call(aten.relu.default, s.input("x", 2, 8))
    second = s.call(aten.unsqueeze.default, r, 0) if view else r
    product = s.call(aten.mul.Tensor, r, second)
    s.done(product)
    assert match(scaled(Any("o")), r) == Miss("mul reads it 2 times", product, at_site=True)


def test_a_producer_without_axes_is_a_miss() -> None:
    s = Sketch()
    r = s.call(aten.relu.default, s.input("x"))
    s.done(s.call(aten.mul.Tensor, r, s.weight("w", 4)))
    assert isinstance(match(scaled(Param("w")), r), Miss)


def test_every_reader_keeps_the_axis_it_names() -> None:
    s = Sketch()
    r = s.call(aten.relu.default, s.input("x", 4, 8))
    view = s.call(aten.unsqueeze.default, r, 1)
    s.done(s.call(aten.mul.Tensor, view, s.weight("w", 4, 1, 1)))
    reader = binary(aten.mul.Tensor, Ref("r"), Param("w"))
    result = match(EveryReader(Op("r", (aten.relu.default,)), reader, keeps=0), r)
    assert isinstance(result, Match)


def test_the_view_checks_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = importlib.import_module("lensfx.rewrite.match")
    monkeypatch.setattr(engine, "carried_axis", lambda view, axis: axis)
    wrong = [
        k for k, (build, pattern, expected) in VIEWS.items() if found(build, pattern) != expected
    ]
    assert "a cast to whole numbers" in wrong
    assert "two axes of one size, swapped" in wrong
    fan = Fan()
    fan.linear((aten.transpose.int, 0, 2), (aten.transpose.int, 0, 2))
    assert isinstance(fan.match(), Match)
