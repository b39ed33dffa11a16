"""Linear reach: what each operator makes of a scale and of a shift, against the operator itself."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from torch import fx

from lensfx.analysis import reach_products, reach_rules
from lensfx.analysis.channels import replay
from lensfx.analysis.reach import Reach, Refused, follow_all, reach
from lensfx.errors import LensError
from lensfx.graph import Program, hook_point
from lensfx.rewrite import Edit

aten = torch.ops.aten
Make = Callable[[Sketch, fx.Node], fx.Node]
D = torch.float64


def weight(s: Sketch, *sizes: int) -> fx.Node:
    return s.weight(f"w{len(s.tensors)}", *sizes, dtype=D)


def given(s: Sketch, *sizes: int | str) -> fx.Node:
    return s.input(f"y{len(s.graph.nodes)}", *sizes, dtype=D)


def attention(s: Sketch, v: fx.Node, q: fx.Node, k: fx.Node, **options: Any) -> fx.Node:
    return s.call(aten.scaled_dot_product_attention.default, q, k, v, **options)


def heads(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.transpose.int, s.call(aten.unflatten.int, x, -1, [2, 4]), 1, 2)


def scores(s: Sketch, *sizes: int | str) -> fx.Node:
    return s.call(aten.softmax.int, given(s, *sizes), -1)


def gathered(s: Sketch, x: fx.Node, turned: bool = False) -> fx.Node:
    ids = s.input("ids", "B", dtype=torch.int64)
    P = weight(s, 5, 6, 8) if turned else weight(s, 5, 8, 6)
    W = s.call(aten.index.Tensor, P, [ids])
    W = s.call(aten.transpose.int, W, 1, 2) if turned else W
    return s.call(aten.bmm.default, x, W)


def split(s: Sketch, x: fx.Node) -> fx.Node:
    pieces = s.call(aten.split.Tensor, x, 4, -1)
    a, b = (s.call(operator.getitem, pieces, i) for i in (0, 1))
    return s.call(aten.cat.default, [b, given(s, "B", 3, 2), a], -1)


def grouped(s: Sketch, v: fx.Node) -> fx.Node:
    q = given(s, "B", 4, 5, 4)
    k = given(s, "B", 2, 3, 4)
    return attention(s, heads(s, v), q, k, enable_gqa=True)


def mask(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.gt.Scalar, given(s, "B", 3, 1), 0.0)


# What is made of x [B, 3, 8], and whether a scale, and a shift, of its channels passes.
RULES: dict[str, tuple[Make, bool, bool]] = {
    "cast": (lambda s, x: s.call(aten.to.dtype, x, D), True, True),
    "hook": (lambda s, x: s.call(hook_point, x, "h"), True, True),
    "heads": (heads, True, True),
    "split and foreign": (split, True, True),
    "neg": (lambda s, x: s.call(aten.neg.default, x), True, True),
    "times a number": (lambda s, x: s.call(aten.mul.Tensor, x, 3.0), True, True),
    "times a weight": (lambda s, x: s.call(aten.mul.Tensor, weight(s, 1), x), True, True),
    "by a number": (lambda s, x: s.call(aten.div.Tensor, x, 3.0), True, True),
    "times a vector": (lambda s, x: s.call(aten.mul.Tensor, x, weight(s, 8)), True, False),
    "gate": (lambda s, x: s.call(aten.mul.Tensor, x, given(s, "B", 3, 8)), True, False),
    "by a value": (lambda s, x: s.call(aten.div.Tensor, x, given(s, "B", 3, 1)), True, False),
    "under a value": (lambda s, x: s.call(aten.div.Tensor, given(s, "B", 3, 8), x), False, False),
    "rounded": (
        lambda s, x: s.call(aten.div.Tensor_mode, x, 3.0, rounding_mode="floor"),
        False,
        False,
    ),
    "square": (lambda s, x: s.call(aten.mul.Tensor, x, x), False, False),
    "add": (lambda s, x: s.call(aten.add.Tensor, given(s, "B", 3, 8), x), False, True),
    "sub": (lambda s, x: s.call(aten.sub.Tensor, given(s, "B", 3, 8), x, alpha=2), False, True),
    "rsub": (lambda s, x: s.call(aten.rsub.Scalar, x, 1.0), False, True),
    "twice": (lambda s, x: s.call(aten.add.Tensor, x, x, alpha=2), True, True),
    "with a part of itself": (
        lambda s, x: s.call(aten.add.Tensor, x, s.call(aten.flip.default, x, [-1])),
        False,
        False,
    ),
    "with its double": (
        lambda s, x: s.call(aten.add.Tensor, x, s.call(aten.mul.Tensor, x, 2.0)),
        True,
        False,
    ),
    "tanh": (lambda s, x: s.call(aten.tanh.default, x), False, False),
    "unknown": (lambda s, x: s.call(aten.logcumsumexp.default, x, 1), False, False),
    "norm": (lambda s, x: s.call(aten.layer_norm.default, x, [8]), False, False),
    "mean of rows": (lambda s, x: s.call(aten.mean.dim, x, [1]), True, True),
    "sum of rows": (lambda s, x: s.call(aten.sum.dim_IntList, x, [1], True), True, True),
    "sum of examples": (lambda s, x: s.call(aten.sum.dim_IntList, x, [0]), True, False),
    "sum of channels": (lambda s, x: s.call(aten.sum.dim_IntList, x, [-1]), False, False),
    "running sum": (lambda s, x: s.call(aten.cumsum.default, x, 1), True, False),
    "masked": (lambda s, x: s.call(aten.masked_fill.Scalar, x, mask(s, x), 0.0), True, False),
    "masked by 1": (lambda s, x: s.call(aten.masked_fill.Scalar, x, mask(s, x), 1.0), False, False),
    "where": (lambda s, x: s.call(aten.where.self, mask(s, x), x, x), True, True),
    "pad rows": (lambda s, x: s.call(aten.constant_pad_nd.default, x, [0, 0, 1, 0]), True, False),
    "pad channels": (lambda s, x: s.call(aten.constant_pad_nd.default, x, [1, 2]), True, True),
    "cat rows": (
        lambda s, x: s.call(aten.cat.default, [x, given(s, "B", 2, 8)], 1),
        False,
        False,
    ),
    "cat of itself": (lambda s, x: s.call(aten.cat.default, [x, x], 1), True, True),
    "stack": (lambda s, x: s.call(aten.stack.default, [x, x], 1), True, True),
    "stack with another": (
        lambda s, x: s.call(aten.stack.default, [given(s, "B", 3, 8), x], 2),
        True,
        True,
    ),
    "attention weights": (
        lambda s, x: s.call(aten.matmul.default, scores(s, "B", 5, 3), x),
        True,
        True,
    ),
    "weights of columns": (
        lambda s, x: s.call(
            aten.matmul.default, s.call(aten.transpose.int, scores(s, "B", 3, 3), 1, 2), x
        ),
        True,
        False,
    ),
    "rows mixed by values": (
        lambda s, x: s.call(aten.matmul.default, given(s, "B", 5, 3), x),
        True,
        False,
    ),
    "turned weights": (
        lambda s, x: s.call(
            aten.matmul.default,
            s.call(aten.transpose.int, x, 1, 2),
            s.call(aten.transpose.int, scores(s, "B", 5, 3), 1, 2),
        ),
        True,
        True,
    ),
    "einsum of weights": (
        lambda s, x: s.call(
            aten.einsum.default, "bhqk,bhkd->bqhd", [scores(s, "B", 2, 5, 3), heads(s, x)]
        ),
        True,
        True,
    ),
    "einsum of many": (
        lambda s, x: s.call(aten.einsum.default, "...qk,...kd->...qd", [scores(s, "B", 5, 3), x]),
        True,
        True,
    ),
    "sdpa": (
        lambda s, x: attention(s, heads(s, x), given(s, "B", 2, 5, 4), given(s, "B", 2, 3, 4)),
        True,
        True,
    ),
    "sdpa causal": (
        lambda s, x: attention(s, x, given(s, "B", 3, 4), given(s, "B", 3, 4), is_causal=True),
        True,
        True,
    ),
    "sdpa grouped": (grouped, True, True),
    "sdpa masked": (
        lambda s, x: attention(
            s, x, given(s, "B", 3, 4), given(s, "B", 3, 4), attn_mask=mask(s, x)
        ),
        True,
        False,
    ),
    "sdpa query": (
        lambda s, x: attention(s, given(s, "B", 5, 8), x, given(s, "B", 5, 8)),
        False,
        False,
    ),
    "linear": (lambda s, x: s.call(aten.linear.default, x, weight(s, 5, 8)), True, True),
    "linear with a bias": (
        lambda s, x: s.call(aten.linear.default, x, weight(s, 8, 8), weight(s, 8)),
        True,
        True,
    ),
    "linear of a part": (
        lambda s, x: s.call(
            aten.linear.default, s.call(aten.slice.Tensor, x, 2, 1, 7, 2), weight(s, 5, 3)
        ),
        True,
        True,
    ),
    "linear of a copy": (
        lambda s, x: s.call(
            aten.linear.default,
            s.call(aten.mul.Tensor, s.call(aten.repeat.default, x, [1, 1, 2]), 2.0),
            weight(s, 5, 16),
        ),
        True,
        True,
    ),
    "linear of heads": (
        lambda s, x: s.call(aten.linear.default, heads(s, x), weight(s, 5, 4)),
        False,
        False,
    ),
    "linear over rows": (
        lambda s, x: s.call(
            aten.linear.default, s.call(aten.transpose.int, x, 1, 2), weight(s, 5, 3)
        ),
        True,
        False,
    ),
    "linear by itself": (
        lambda s, x: s.call(aten.linear.default, x, s.call(aten.reshape.default, x, [-1, 8])),
        False,
        False,
    ),
    "linear weight": (
        lambda s, x: s.call(
            aten.linear.default, weight(s, 3, 8), s.call(aten.reshape.default, x, [-1, 8])
        ),
        False,
        False,
    ),
    "matmul": (lambda s, x: s.call(aten.matmul.default, x, weight(s, 8, 5)), True, True),
    "matmul of heads": (
        lambda s, x: s.call(aten.matmul.default, heads(s, x), weight(s, 2, 4, 5)),
        True,
        True,
    ),
    "matmul of heads with one weight": (
        lambda s, x: s.call(aten.matmul.default, heads(s, x), weight(s, 1, 4, 5)),
        False,
        False,
    ),
    "weight on the left": (
        lambda s, x: s.call(
            aten.matmul.default, weight(s, 5, 8), s.call(aten.transpose.int, x, 1, 2)
        ),
        True,
        True,
    ),
    "many experts": (
        lambda s, x: s.call(
            aten.matmul.default, s.call(aten.unsqueeze.default, x, 1), weight(s, 4, 8, 5)
        ),
        True,
        True,
    ),
    "chosen experts": (gathered, True, True),
    "chosen experts turned": (lambda s, x: gathered(s, x, turned=True), True, True),
    "addmm": (
        lambda s, x: s.call(
            aten.addmm.default,
            weight(s, 5),
            s.call(aten.reshape.default, x, [-1, 8]),
            weight(s, 8, 5),
        ),
        True,
        True,
    ),
    "addmm with alpha": (
        lambda s, x: s.call(
            aten.addmm.default,
            weight(s, 5),
            s.call(aten.reshape.default, x, [-1, 8]),
            weight(s, 8, 5),
            alpha=2,
        ),
        True,
        False,
    ),
    "einsum with heads": (
        lambda s, x: s.call(
            aten.einsum.default, "bhtd,ohd->bot", [heads(s, x), weight(s, 5, 2, 4)]
        ),
        True,
        True,
    ),
    "einsum over rows": (
        lambda s, x: s.call(aten.einsum.default, "btd,do->bo", [x, weight(s, 8, 5)]),
        True,
        False,
    ),
    "three factors": (
        lambda s, x: s.call(
            aten.einsum.default, "btd,do,bt->bo", [x, weight(s, 8, 5), given(s, "B", 3)]
        ),
        False,
        False,
    ),
    "product with a value": (
        lambda s, x: s.call(aten.matmul.default, x, given(s, "B", 8, 5)),
        False,
        False,
    ),
    "conv": (
        lambda s, x: s.call(
            aten.conv1d.default, s.call(aten.transpose.int, x, 1, 2), weight(s, 5, 8, 2)
        ),
        True,
        True,
    ),
    "conv with a bias": (
        lambda s, x: s.call(
            aten.conv1d.default,
            s.call(aten.transpose.int, x, 1, 2),
            weight(s, 5, 8, 2),
            weight(s, 5),
        ),
        True,
        True,
    ),
    "padded conv": (
        lambda s, x: s.call(
            aten.conv1d.default,
            s.call(aten.transpose.int, x, 1, 2),
            weight(s, 5, 8, 2),
            padding=[1],
        ),
        True,
        False,
    ),
    "conv of each channel": (
        lambda s, x: s.call(
            aten.conv1d.default,
            s.call(aten.transpose.int, x, 1, 2),
            weight(s, 16, 1, 2),
            groups=8,
        ),
        True,
        False,
    ),
}


def run(program: Program, start: fx.Node, value: fx.Node, given: torch.Tensor) -> torch.Tensor:
    """What `value` is where `start` is `given`."""
    inputs = iter(program.example)
    env: dict[fx.Node, Any] = {}
    for n in program.graph.nodes:
        if n.op == "placeholder":
            env[n] = next(inputs)
        elif n.op == "get_attr":
            env[n] = program.tensors[str(n.target)]
        elif n.op == "call_function":
            args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda m: env[m])
            env[n] = n.target(*args, **kwargs)
        env[n] = given if n is start else env.get(n)
    return env[value]


def asked(make: Make, scale: bool, shift: bool) -> tuple[Program, fx.Node, Reach]:
    s = Sketch()
    x = s.input("x", "B", 3, 8, dtype=D)
    s.weight("g", 8, dtype=D)
    s.weight("s", 8, dtype=D)
    out = make(s, x)
    program = s.done(out)
    return program, out, follow_all(x, scale=scale, shift=shift)


def assert_rule(make: Make, scale: bool, shift: bool) -> bool:
    """Whether a scale, or a shift, of x is followed to the result; it is checked literally."""
    program, out, found = asked(make, scale, shift)
    if [r for r in found.refused if r.node.op != "output"]:
        return False
    x, example = found.value, program.example[0]
    stored = {n.target: n for n in program.graph.nodes if n.op == "get_attr"}
    g, s = stored["g"], stored["s"]
    real_g, real_s = program.tensors["g"], program.tensors["s"]
    moved = example * real_g if scale else example + real_s
    with torch.no_grad():
        wanted, before = run(program, x, out, moved), run(program, x, out, example)
        edit = Edit(program.graph, "test", 0, program.tensors)
        edit.begin(x)
        if found.sinks:
            (sink,) = found.sinks
            assert sink.node is out
            at = edit.before(out)
            if scale:
                sink.install(edit, weight=sink.scaled(at, g))
            else:
                sink.install(edit, shift=sink.moved(at, s))
            flat: Any = program.graph.output_node().args[0]
            told = run(program, x, flat[0], example)
        else:
            at = edit.before(program.graph.output_node())
            channels = found.carried[out]
            vector = replay(at, g if scale else s, channels, float(scale), scaled=shift)
            there = run(program, x, vector, example)
            assert there.ndim == before.ndim
            told = before * there if scale else before + there
    assert told.shape == wanted.shape
    torch.testing.assert_close(told, wanted, rtol=1e-12, atol=1e-12)
    return True


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_against_its_operator(rule: str) -> None:
    make, scale, shift = RULES[rule]
    assert assert_rule(make, True, False) is scale
    assert assert_rule(make, False, True) is shift


def test_every_reader_counts_and_the_nearest_refusal_is_shown() -> None:
    s = Sketch()
    x = s.input("x", "B", 3, 8)
    far = s.call(aten.tanh.default, s.call(aten.transpose.int, x, 1, 2))
    near = s.call(aten.exp.default, x)
    y = s.call(aten.linear.default, x, s.weight("w", 5, 8))
    s.done(y, far, near)
    found = reach(x)
    assert isinstance(found, Refused)
    assert (found.node, found.path, found.count) == (near, (x,), 2)
    both = follow_all(x)
    assert [k.node for k in both.sinks] == [y]
    assert [r.node for r in both.refused] == [near, far]


def test_outputs_and_unread_values_are_refused() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    z = s.call(aten.zeros_like.default, x)
    s.done(s.call(aten.linear.default, x, s.weight("w", 5, 8)), x, z)
    found = reach(x)
    assert isinstance(found, Refused)
    assert (
        found.reason == "it is output 1 of the model; allowed only under a contract that names it"
    )
    unread = reach(z)
    assert isinstance(unread, Refused)
    s = Sketch()
    x = s.input("x", "B", 8)
    s.done(s.call(aten.zeros_like.default, x))
    alone = reach(x)
    assert isinstance(alone, Refused)
    assert alone.reason == "no reader can take it up"


def test_an_axis_without_a_fixed_size_is_an_error() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    s.done(x)
    with pytest.raises(LensError, match="axis 0 of this value has no fixed number of channels"):
        reach(x, 0)


def test_an_attention_that_reads_a_value_in_all_places_carries_the_value() -> None:
    s = Sketch()
    x = s.input("x", "B", 3, 12)
    pieces = s.call(aten.split.Tensor, x, 4, -1)
    q, k, v = (s.call(operator.getitem, pieces, i) for i in range(3))
    z = attention(s, v, q, k)
    y = s.call(aten.linear.default, z, s.weight("w", 5, 4))
    s.done(y)
    found = follow_all(x, scale=False)
    assert [r.channels.numbers for r in found.refused] == [set(range(4)), set(range(4, 8))]
    assert [(k.node, k.mixed, k.channels.numbers) for k in found.sinks] == [
        (y, True, set(range(8, 12)))
    ]
    assert isinstance(reach(x, scale=False), Refused)


# faults


def kept(read: Any) -> Any:
    return next(c for c in map(read.held, read.node.all_input_nodes) if c is not None)


def even(*_: Any) -> None:
    return None


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


def fault(rule: str, *ops: Any, does: Any = kept) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(reach_rules, "_RULES", {**reach_rules._RULES, **dict.fromkeys(ops, does)})

    FAULTS[f"{rule}: {ops[0]}"] = (rule, plant)
    return plant


fault("gate", aten.mul.Tensor)
fault("add", aten.add.Tensor)
fault("tanh", aten.tanh.default)
fault("masked", aten.masked_fill.Scalar)
fault("pad rows", aten.constant_pad_nd.default)
fault("running sum", aten.cumsum.default)
fault("cat rows", aten.cat.default)
fault("with a part of itself", aten.add.Tensor)
fault("neg", aten.neg.default)
fault("rsub", aten.rsub.Scalar)
fault("by a number", aten.div.Tensor)
fault("sum of rows", aten.sum.dim_IntList)


def planted_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reach_products, "_weighted", even)


def planted_sizes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reach_products, "_unfit", even)


def planted_padding(patch: pytest.MonkeyPatch) -> None:
    right = reach_products._convolved
    rules = {**reach_rules._RULES, aten.conv1d.default: lambda r: right(replace(r, shift=False))}
    patch.setattr(reach_rules, "_RULES", rules)


FAULTS |= {
    "weights of columns: rows": ("weights of columns", planted_rows),
    "rows mixed by values": ("rows mixed by values", planted_rows),
    "one weight for all heads": ("matmul of heads with one weight", planted_sizes),
    "alpha": ("addmm with alpha", planted_sizes),
    "heads": ("linear of heads", planted_sizes),
    "padding": ("padded conv", planted_padding),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, plant = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, LensError, StopIteration)):
        test_each_rule_against_its_operator(rule)
