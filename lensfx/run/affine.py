"""Linear maps of a program as matrices over its parameters: what lies between two of its values.

A value is followed by numbers of channels: an integer tensor of its shape that says which column
of a matrix each entry is. Views are executed on it, products with weights make a new matrix.
Sizes that a call decides are small stand-ins, and what differs between positions is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lensfx.analysis.structure.facts import Place
from lensfx.errors import LensError
from lensfx.graph.layout import Layout, as_stored, shown, shown_shape
from lensfx.graph.node import is_op, is_weight, op_name, value_of, where
from lensfx.graph.ops import CASTS, DROPOUTS, VIEWS, data_inputs, is_hook, is_random
from lensfx.graph.program import Program
from lensfx.run.products import Product, columns, product, summed

__all__ = ["Affine", "Maps", "bare", "plain_place"]

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_STAND_INS = (2, 3, 5, 7, 11, 13)
_SAME = frozenset(
    {*CASTS, *DROPOUTS, aten.alias.default, aten.contiguous.default, aten.clone.default,
     aten.detach.default, aten.lift_fresh_copy.default}
)  # fmt: skip
_MOVED = frozenset(
    {"split", "split_with_sizes", "chunk", "unbind", "tensor_split", "narrow", "repeat", "flip",
     "repeat_interleave", "movedim", "swapaxes", "expand_as", "view_as", "reshape_as", "roll"}
)  # fmt: skip


@dataclass(frozen=True)
class Affine:
    """`target = source @ matrix + shift`, at every position alike; `shift` None if there is none.

    `matrix` is [*channels of the source, *channels of the target]; `channels` those of the target.
    """

    matrix: torch.Tensor
    shift: torch.Tensor | None
    channels: tuple[int, ...]

    @property
    def bias(self) -> torch.Tensor:
        """The shift, as zeros where there is none."""
        return self.matrix.new_zeros(self.channels) if self.shift is None else self.shift


@dataclass(frozen=True)
class _Value:
    """An entry is `matrix[:, idx] * factor`, applied to the source, `+ shift`; None: one, zero.

    `count` is how many channels the numbers in `idx` count.
    """

    idx: torch.Tensor
    count: int
    matrix: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def each(self, move: Callable[[torch.Tensor], Any]) -> Any:
        """This value moved as `move` moves tensors; a list if it gives several."""
        idx = move(self.idx)
        parts = [None if t is None else move(t) for t in (self.factor, self.shift)]
        if isinstance(idx, torch.Tensor):
            return _Value(idx, self.count, self.matrix, *parts)
        return [
            _Value(idx[i], self.count, self.matrix, *(None if p is None else p[i] for p in parts))
            for i in range(len(idx))
        ]

    def grown(self, shape: torch.Size) -> _Value:
        """This value repeated to a larger shape."""
        grown: _Value = self.each(lambda t: t.expand(shape))
        return grown


def plain_place(node: fx.Node) -> Place:
    """A value whose last axis holds its channels, as it lies."""
    rank = len(value_of(node).shape)
    return Place(node, Layout((), tuple(range(rank))), rows=rank == 2)


def _seed(
    place: Place, shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The channel of every entry of a place's node, and the channels' own axes."""
    canonical = shown_shape(shape, place.layout)
    channels = tuple(canonical[_lead(place) :])
    numbers = torch.arange(_count(channels), device=device).reshape(channels)
    return as_stored(numbers.expand(canonical), place.layout), channels


def _lead(place: Place) -> int:
    return 1 if place.rows else 2


def _count(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


class Maps:
    """The linear maps of one program; what they hold is computed when it is asked for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._sizes: dict[Any, int] = {}

    def weight(self, node: fx.Node) -> torch.Tensor:
        """The value of a parameter expression, differentiable by the parameters."""
        if node.op == "get_attr":
            return self.program.tensors[str(node.target)]
        found: torch.Tensor = self._call(node, {})
        return found

    def between(self, source: Place, target: Place) -> Affine:
        """The map from one value to another.

        Raises: LensError naming the node that is in the way of one.
        """
        value, channels = self._followed(source, target)
        return self._read(value, target, channels)

    def is_linear(self, source: Place, target: Place) -> bool:
        """Whether there is a map from one value to another; it is not computed."""
        try:
            self._followed(source, target)
        except LensError:
            return False
        return True

    def _followed(self, source: Place, target: Place) -> tuple[_Value, tuple[int, ...]]:
        for sizes in ({}, self._captured()):
            self._sizes = sizes
            try:
                return self._steps(source, target)
            except (RuntimeError, IndexError) as error:
                # A model may need more positions than stand-ins give it.
                failed = error
        raise _in_the_way(target.node, f"cannot be followed back to %{source.node.name}: {failed}")

    def _steps(self, source: Place, target: Place) -> tuple[_Value, tuple[int, ...]]:
        shape = self._shape(source.node)
        first = next(iter(self.program.tensors.values()), torch.empty(0))
        idx, channels = _seed(source, shape, first.device)
        env: dict[fx.Node, Any] = {source.node: _Value(idx, _count(channels))}
        for node in _path(source.node, target.node):
            env[node] = self._step(node, env)
        return env[target.node], channels

    def _captured(self) -> dict[Any, int]:
        """The sizes of the call that was captured."""
        given = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        found: dict[Any, int] = {}
        for node, value in zip(given, self.program.example, strict=True):
            for size, number in zip(value_of(node).shape, value.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    found[size.node.expr] = int(number)
        return found

    def source_of(self, node: fx.Node, stops: frozenset[fx.Node]) -> fx.Node:
        """The value among `stops`, or norm of one, that a value is computed from by one path.

        Raises: LensError where it is computed from several, or from none of them.
        """
        while node not in stops:
            found = _data(node)
            if is_op(node, *_NORMS) and bare(found[0]) in stops:
                return node
            if len(found) != 1:
                raise _in_the_way(node, "joins several values" if found else "reads no stream")
            node = found[0]
        return node

    def operand(self, node: fx.Node) -> Any:
        """The value of a weight or the number of a size.

        Raises: LensError for anything else.
        """
        return self._argument(node, {})

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._size(n) for n in value_of(node).shape)

    def _size(self, size: Any) -> int:
        """A size as a number; one that a call decides is a small stand-in."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            used = len(self._sizes)
            self._sizes.setdefault(symbol, _STAND_INS[used % len(_STAND_INS)])
        return int(expr.subs(self._sizes))

    def _argument(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node in env:
            return env[node]
        val = value_of(node)
        if isinstance(val, torch.SymInt | int) and not isinstance(val, bool):
            return self._size(val)
        if is_weight(node):
            return self.weight(node)
        raise _in_the_way(node, "is no weight")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The node executed on what `env` gives, weights and sizes."""
        target: Any = node.target
        args = fx.node.map_arg(node.args, lambda n: self._argument(n, env))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self._argument(n, env))
        return target(*args, **kwargs)

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        live = [n for n in _data(node) if n in env]
        if len(live) != 1:
            raise _in_the_way(node, "joins several values of the stream")
        source = live[0]
        given = env[source]
        if node.target is operator.getitem:
            return given[node.args[1]]
        if is_hook(node) or (node.target in _SAME and not is_random(node)):
            return given
        if node.target in VIEWS or op_name(node) in _MOVED:
            return given.each(lambda t: self._call(node, {source: t}))
        rule = _ARITHMETIC.get(op_name(node))
        if rule is not None:
            return rule(self, node, source, given)
        made = product(node, source, given.idx.shape, self.weight)
        if made is None:
            raise _in_the_way(node, f"{op_name(node)} is no linear map of one value")
        return self._multiplied(node, source, given, made)

    def _shifted(self, node: fx.Node, source: fx.Node, given: _Value) -> torch.Tensor | None:
        """What the node makes of the shift; of zeros where it may add one of its own."""
        shift = given.shift
        if shift is None:
            like = value_of(source)
            device = given.idx.device
            shift = torch.zeros(given.idx.shape, dtype=like.dtype, device=device)
        found: torch.Tensor = self._call(node, {source: shift})
        return found

    def _multiplied(self, node: fx.Node, source: fx.Node, given: _Value, made: Product) -> _Value:
        own = given.shift is not None or made.adds
        shift = self._shifted(node, source, given) if own else None
        try:
            matrix, idx = made.run(given.idx, given.matrix, given.factor, given.count)
        except ValueError as error:
            raise _in_the_way(node, str(error)) from None
        return _Value(idx, int(matrix.shape[1]), matrix, None, shift)

    def _read(self, value: _Value, target: Place, channels: tuple[int, ...]) -> Affine:
        moved: _Value = value.each(lambda t: shown(t, target.layout))
        lead = (0,) * _lead(target)
        idx = moved.idx[lead]
        parts = [
            None if t is None else t.expand(moved.idx.shape) for t in (moved.factor, moved.shift)
        ]
        for t in (moved.idx, *parts):
            if t is not None and not bool((t.detach() == t.detach()[lead]).all()):
                raise _in_the_way(target.node, "what it does differs between positions")
        factor, shift = (None if t is None else t[lead] for t in parts)
        matrix = value.matrix
        total = _count(channels)
        if matrix is None:
            like = value_of(target.node)
            matrix = torch.eye(total, dtype=like.dtype, device=idx.device)
        matrix = columns(matrix, idx.reshape(-1))
        if factor is not None:
            matrix = matrix * factor.reshape(-1).to(matrix.dtype)
        return Affine(matrix.reshape(*channels, *idx.shape), shift, tuple(idx.shape))


def bare(node: fx.Node) -> fx.Node:
    """The value that a node is a cast, a hook or a copy of."""
    while is_hook(node) or (node.target in _SAME and not is_random(node)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _data(node: fx.Node) -> list[fx.Node]:
    """What a node reads that is neither a weight nor a size."""
    sizes = int | float | torch.SymInt | torch.SymFloat
    return [n for n in data_inputs(node) if not (is_weight(n) or isinstance(value_of(n), sizes))]


def _path(source: fx.Node, target: fx.Node) -> list[fx.Node]:
    """The nodes that lead from one value to another, in order, the first one left out.

    Raises: LensError if the one is not computed from the other.
    """
    seen, stack = {target}, [target]
    while stack:
        for node in _data(stack.pop()):
            if node not in seen and node > source:
                seen.add(node)
                stack.append(node)
    found: list[fx.Node] = []
    reached = {source}
    for node in sorted(seen):
        if node is not source and any(n in reached for n in _data(node)):
            reached.add(node)
            found.append(node)
    if target is not source and target not in reached:
        raise _in_the_way(target, f"is not computed from %{source.name}")
    return found


def _in_the_way(node: fx.Node, reason: str) -> LensError:
    return LensError(
        f"no linear map by weights alone: %{node.name} {reason}",
        at=where(node),
        hint="read the values around it: lens.hook_names lists them",
    )


def _operands(maps: Maps, node: fx.Node, source: fx.Node) -> tuple[Any, bool]:
    """The other operand as a number or tensor, and whether the source is the first one."""
    first = node.args[0] is source
    other = node.args[1] if first else node.args[0]
    return (maps.operand(other) if isinstance(other, fx.Node) else other), first


def _scaled(maps: Maps, node: fx.Node, source: fx.Node, given: _Value) -> _Value:
    name = op_name(node)
    if name == "neg":
        other: Any = -1.0
    else:
        other, first = _operands(maps, node, source)
        if name == "div" and (not first or node.kwargs.get("rounding_mode") is not None):
            raise _in_the_way(node, "divides by a value of the stream")
    wide = given.grown(_shape_with(given.idx, other))
    # In double precision: a factor in float32 would round the weights of a float64 model.
    one = torch.ones((), dtype=torch.float64, device=given.idx.device)
    factor = one if wide.factor is None else wide.factor
    operate = torch.div if name == "div" else torch.mul
    factor = operate(factor, other).expand(wide.idx.shape)
    shift = None if wide.shift is None else operate(wide.shift, other)
    return replace(wide, factor=factor, shift=shift)


def _moved(maps: Maps, node: fx.Node, source: fx.Node, given: _Value) -> _Value:
    """The sum or difference of a value and a weight or number."""
    other, first = _operands(maps, node, source)
    alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    sign = -1 if op_name(node) in ("sub", "rsub") else 1
    backwards = (op_name(node) == "rsub") is first
    wide = given.grown(_shape_with(given.idx, other))
    if (sign == -1 and backwards) or (not first and alpha != 1):
        raise _in_the_way(node, "takes a multiple of a value of the stream away")
    like = value_of(source)
    shift = wide.shift
    if shift is None:
        shift = torch.zeros(wide.idx.shape, dtype=like.dtype, device=wide.idx.device)
    return replace(wide, shift=shift + sign * alpha * other)


def _summed(maps: Maps, node: fx.Node, source: fx.Node, given: _Value) -> _Value:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, list | tuple) or len(dims) != 1:
        raise _in_the_way(node, "sums over several axes")
    axis = int(dims[0]) % given.idx.ndim
    like = value_of(source)
    matrix = given.matrix
    if matrix is None:
        matrix = torch.eye(given.count, dtype=like.dtype, device=given.idx.device)
    try:
        made, idx = summed(given.idx, matrix, given.factor, given.count, axis)
    except ValueError as error:
        raise _in_the_way(node, str(error)) from None
    shift = None if given.shift is None else given.shift.sum(axis, keepdim=True)
    value = _Value(idx, int(made.shape[1]), made, None, shift)
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    found: _Value = value if keep else value.each(lambda t: t.squeeze(axis))
    return found


def _shape_with(idx: torch.Tensor, other: Any) -> torch.Size:
    shape = other.shape if isinstance(other, torch.Tensor) else ()
    return torch.broadcast_shapes(idx.shape, shape)


_ARITHMETIC: dict[str, Callable[[Maps, fx.Node, fx.Node, _Value], _Value]] = {
    **dict.fromkeys(("mul", "div", "neg"), _scaled),
    **dict.fromkeys(("add", "sub", "rsub"), _moved),
    "sum": _summed,
}
