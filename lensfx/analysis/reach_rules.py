"""What one operator makes of a scale, and of a shift, of the channels of its operands.

A rule gets a `Reading` and says what channels the result has, that the operator is a sink, or in
words why it forbids a scale or shift. It must hold for every value of the other operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lensfx.analysis.channels import FILL, Channels, broadcast, fixed, joined, through
from lensfx.analysis.reach_products import Carried, Reading, product_rule
from lensfx.analysis.sinks import Sink
from lensfx.analysis.transfer import FILLED
from lensfx.graph.node import argument, is_op, is_weight, op_name, schema_names, shape_of
from lensfx.graph.ops import data_inputs

__all__ = ["Carried", "Reading", "follow"]

aten = torch.ops.aten

_Rule = Callable[[Reading], Channels | Carried | Sink | str]


def follow(read: Reading) -> Carried | Sink | str:
    """What the node of a reading makes of the channels it reads."""
    rule = _RULES.get(read.node.target) or product_rule(read.node)
    if rule is not None:
        found = rule(read)
    else:
        found = _view(read)
    return Carried(found) if isinstance(found, Channels) else found


def _view(read: Reading) -> Channels | str:
    node = read.node
    held = [n for n in data_inputs(node) if n in read.carried]
    if len(held) > 1:
        return f"%{node.name} ({op_name(node)}) reads it twice"
    found = through(node, held[0], read.carried[held[0]])
    if not isinstance(found, str) or not found.startswith("no rule"):
        return found
    if "norm" in op_name(node):
        return f"%{node.name} ({op_name(node)}) normalises it"
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        what = "a shift" if read.shift and not read.scale else "a scale"
        return f"%{node.name} reads it non-linearly ({op_name(node)}): {what} would be seen"
    return found


def _at(read: Reading, arg: Any) -> Channels | None:
    """The channels of an operand, broadcast to the result."""
    channels = read.held(arg)
    if channels is None:
        return None
    return broadcast(channels, shape_of(arg) or (), read.out)


def _added(read: Reading) -> Channels | str:
    node, alpha = read.node, read.arg("alpha", 1)
    a, b = _at(read, read.arg("self")), _at(read, read.arg("other"))
    signs = {"sub": (1, -alpha), "rsub": (-alpha, 1)}.get(op_name(node), (1, alpha))
    if a is not None and b is not None:
        met = _meet(node, a, b)
        if isinstance(met, str):
            return met
        if read.shift and (a.factors != b.factors or not isinstance(alpha, int | float)):
            return f"%{node.name} adds it to itself times another factor"
        total = sum(signs) if isinstance(alpha, int | float) else 1
        return a if total == 1 else a.times(total)
    found = a if a is not None else b
    assert found is not None
    if read.scale:
        other = read.arg("other" if a is not None else "self")
        words = f"the stream %{other.name}" if isinstance(other, fx.Node) else str(other)
        return f"%{node.name} also adds it to {words}; only linear readers can absorb the gain"
    factor = signs[0] if a is not None else signs[1]
    return found if isinstance(factor, int) and factor == 1 else found.times(factor)


def _meet(node: fx.Node, a: Channels, b: Channels) -> str | None:
    """Why two operands with channels cannot be joined entry by entry; None if they can."""
    i, j = torch.broadcast_tensors(a.idx, b.idx) if a.idx.ndim == b.idx.ndim else (a.idx, b.idx)
    differ = (i != j).nonzero()
    if len(differ):
        at = tuple(differ[0].tolist())
        names = f"channels {int(i[at])} and {int(j[at])} meet"
        return f"joined with a rotated copy of itself at %{node.name}: {names}"
    return None if a.axes == b.axes else f"%{node.name} joins it with one channel of itself"


def _single(arg: Any) -> bool:
    """Whether an operand is one number that does not depend on the inputs."""
    if isinstance(arg, fx.Node):
        return is_weight(arg) and all(fixed(n) == 1 for n in shape_of(arg) or ())
    return isinstance(arg, int | float)


def _product(read: Reading) -> Channels | str:
    node, first, second = read.node, read.arg("self"), read.arg("other")
    a, b = _at(read, first), _at(read, second)
    if a is not None and b is not None:
        return f"%{node.name} multiplies it by itself"
    divides = op_name(node) in ("div", "true_divide")
    if divides and a is None:
        return f"%{node.name} divides by it"
    if divides and read.arg("rounding_mode") is not None:
        return f"%{node.name} rounds it"
    found, other = (a, second) if a is not None else (b, first)
    assert found is not None
    if not read.shift:
        return found
    if _single(other):
        if isinstance(other, fx.Node):
            return f"multiplied by %{other.name}" if divides else found.times(other)
        return found.times(1 / other if divides else other)
    name = other.name if isinstance(other, fx.Node) else str(other)
    if is_weight(other):
        vector = other.target if other.op == "get_attr" else f"%{name}"
        words = "which varies along the channels; fold the scale first"
        return f"%{node.name} multiplies it by the vector {vector}, {words}"
    words = "computed from the input: the shift would follow the gate"
    return f"%{node.name} multiplies it by %{name}, {words}"


def _negative(read: Reading) -> Channels | str:
    return read.carried[read.arg("self")].times(-1)


def _zero(arg: Any) -> bool:
    """Whether a value is 0 everywhere."""
    if not isinstance(arg, fx.Node):
        return isinstance(arg, int | float) and arg == 0
    if arg.target not in FILLED:
        return False
    names = [n for n in ("fill_value", "s") if n in schema_names(arg.target)]
    return _zero(argument(arg, names[0])) if names else "zeros" in op_name(arg)


def _masked(read: Reading) -> Channels | str:
    node = read.node
    mask = read.arg("mask", read.arg("condition"))
    value = read.arg("value") if "value" in schema_names(node.target) else read.arg("other")
    a, b = _at(read, read.arg("self")), _at(read, value)
    if read.held(mask) is not None:
        return f"%{node.name} decides by it"
    if a is not None and b is not None:
        same = a.factors == b.factors or not read.shift
        return _meet(node, a, b) or (a if same else f"%{node.name} joins it with a multiple")
    found, other = (a, value) if a is not None else (b, read.arg("self"))
    if read.shift or not _zero(other) or found is None:
        return f"%{node.name} keeps it only where %{mask.name} says so"
    return found


def _total(read: Reading) -> Channels | str:
    value = read.arg("self")
    shape, channels = shape_of(value) or (), read.carried[value]
    given = read.arg("dim")
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given or ())}
    dims = dims or set(range(len(shape)))
    if dims & channels.axes:
        return f"%{read.node.name} ({op_name(read.node)}) mixes its channels"
    if op_name(read.node) == "sum" and read.shift:
        for d in dims:
            size = fixed(shape[d])
            if size is None:
                return f"%{read.node.name} sums over axis {d} of unknown size"
            channels = channels.times(size)
    if read.arg("keepdim", False):
        return replace(channels, parts=())
    sizes = [n for a, n in enumerate(channels.idx.shape) if a not in dims]
    return channels.shaped(sizes, [a - sum(d < a for d in dims) for a in channels.axes])


def _joined(read: Reading) -> Channels | str:
    """`cat`, and `stack` as one along a new axis."""
    node, values = read.node, list(read.arg("tensors"))
    rank = len(read.out)
    axis = read.arg("dim", 0) % rank
    parts = [read.held(v) for v in values]
    if is_op(node, aten.stack.default):
        parts = [None if p is None else _new_axis(p, axis) for p in parts]
    known = [p for p in parts if p is not None]
    same = all(p.axes == known[0].axes and torch.equal(p.idx, known[0].idx) for p in known)
    if read.shift and any(p.factors != known[0].factors for p in known):
        return f"%{node.name} joins it with multiples of itself"
    if len(known) == len(parts) and same and axis not in known[0].axes:
        return known[0]
    if is_op(node, aten.stack.default):
        known = [replace(p, axes=p.axes | {axis}) for p in known]
        parts = [None if p is None else replace(p, axes=p.axes | {axis}) for p in parts]
    if any(axis not in p.axes for p in known):
        return f"%{node.name} joins it with other values along axis {axis}"
    return _side_by_side(read, parts, axis)


def _new_axis(channels: Channels, axis: int) -> Channels:
    sizes = list(channels.idx.shape)
    sizes.insert(axis, 1)
    return channels.shaped(sizes, {a + (a >= axis) for a in channels.axes})


def _side_by_side(read: Reading, parts: list[Channels | None], axis: int) -> Channels | str:
    """The parts along one axis; entries of other values belong to no channel."""
    run: list[Channels] = []
    before = 0
    stacked = is_op(read.node, aten.stack.default)
    for value, part in zip(read.arg("tensors"), parts, strict=True):
        size = 1 if stacked else fixed((shape_of(value) or ())[axis])
        if size is None:
            return f"%{read.node.name} joins it with a value of unknown size"
        if part is not None:
            run.append(_padded_by(part, axis, before, 0))
            before = 0
        elif run:
            run[-1] = _padded_by(run[-1], axis, 0, size)
        else:
            before += size
    if len({tuple(n for a, n in enumerate(p.idx.shape) if a != axis) for p in run}) > 1:
        return f"%{read.node.name} joins parts of other channels"
    return joined(run, axis) if len(run) > 1 else run[0]


def _padded_by(channels: Channels, axis: int, before: int, after: int) -> Channels:
    if not before and not after:
        return channels
    pads = [0] * (2 * (channels.idx.ndim - axis))
    pads[-2:] = [before, after]
    return channels.call(aten.constant_pad_nd.default, pads, FILL, axes=channels.axes)


def _padded(read: Reading) -> Channels | str:
    node, value, pads = read.node, read.arg("self"), read.arg("pad")
    channels, rank = read.carried[value], len(read.out)
    held = read.arg("value", 0)
    zero = read.arg("mode", "constant") == "constant" and (held is None or held == 0)
    for i in range(len(pads) // 2):
        axis, before, after = rank - 1 - i, pads[2 * i], pads[2 * i + 1]
        if before == 0 and after == 0:
            continue
        if axis in channels.axes:
            if not zero or not (isinstance(before, int) and isinstance(after, int)):
                return f"%{node.name} pads its channels"
            if before < 0 or after < 0:
                return f"%{node.name} cuts its channels"
            channels = _padded_by(channels, axis, before, after)
        elif read.shift or not zero:
            return f"%{node.name} pads rows that do not carry the shift"
    return replace(channels, parts=())


def _triangle(read: Reading) -> Channels | str:
    channels = read.carried[read.arg("self")]
    if read.shift or {a - len(read.out) for a in channels.axes} & {-1, -2}:
        return f"%{read.node.name} keeps a part of it only"
    return channels


def _running(read: Reading) -> Channels | str:
    channels = read.carried[read.arg("self")]
    if read.shift or read.arg("dim") % len(read.out) in channels.axes:
        return f"%{read.node.name} adds it up"
    return channels


def _ops(names: str) -> tuple[Any, ...]:
    pairs = (name.partition(".") for name in names.split())
    return tuple(getattr(getattr(aten, op), overload or "default") for op, _, overload in pairs)


_FAMILIES: tuple[tuple[_Rule, tuple[Any, ...]], ...] = (
    (
        _added,
        _ops("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar"),
    ),
    (
        _product,
        _ops(
            "mul.Tensor mul.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode "
            "true_divide.Tensor true_divide.Scalar"
        ),
    ),
    (_negative, _ops("neg")),
    (
        _masked,
        _ops("masked_fill.Scalar masked_fill.Tensor where.self where.ScalarSelf where.ScalarOther"),
    ),
    (_total, _ops("sum sum.dim_IntList mean mean.dim")),
    (_joined, _ops("cat concat stack")),
    (_padded, _ops("pad constant_pad_nd")),
    (_triangle, _ops("tril triu")),
    (_running, _ops("cumsum")),
)

_RULES: Mapping[Any, _Rule] = {op: rule for rule, ops in _FAMILIES for op in ops}
