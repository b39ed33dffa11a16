"""Which values share one basis with a value: all that an orthogonal change of it must turn.

A change of basis goes along with everything that is added to the value, stands behind it, or is
made of it by what treats all directions alike. It ends in a product with a weight, which takes it
up; anything else would see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.errors import PipelineError
from lensfx.graph.node import argument, arguments, is_op, is_weight, op_name, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, VIEWS, is_hook, readers
from lensfx.graph.views import carried_axis, same_size

__all__ = ["Basis", "Bound", "basis_of", "orthogonal", "random_rotation"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Basis:
    """Everything that is written in the basis of one value, whose last axis has `width` entries.

    `values` are the computed values, in graph order. `reads` are linear ops with such an input,
    `writes` linear ops and tables with such a result; one op may be both. `vectors` are weights
    that are joined to it, each with the op that reads it there. `centring` are layer norms, which
    are the same in a new basis only if that keeps the direction (1, 1, ...).
    """

    width: int
    values: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    vectors: tuple[tuple[fx.Node, fx.Node], ...]
    centring: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Bound:
    """Who would see another basis, and why."""

    node: fx.Node
    reason: str


def orthogonal(Q: torch.Tensor) -> torch.Tensor:
    """Q in float64, its last rounding errors taken off.

    Raises: PipelineError if it is not square, or further from orthogonal than 1e-10.
    """
    if Q.ndim != 2 or Q.shape[0] != Q.shape[1]:
        raise PipelineError(
            f"a rotation is a square matrix, and Q has the shape {list(Q.shape)}",
            at="Q",
            hint="give one of [d_model, d_model], or `seed` for a random one",
        )
    wide = Q.detach().double()
    error = float((wide @ wide.T - torch.eye(len(wide), device=wide.device)).abs().max())
    if not error <= 1e-10:
        raise PipelineError(
            f"Q is not orthogonal: Q @ Q.T is {error:.1e} away from the identity",
            at="Q",
            hint="torch.linalg.qr(Q.double()).Q is, and spans the same directions",
        )
    U, _, V = torch.linalg.svd(wide)
    return U @ V


def random_rotation(width: int, seed: int, keeps_ones: bool = False) -> torch.Tensor:
    """An orthogonal matrix in float64; if asked for one that keeps the direction (1, ..., 1)."""
    random = torch.Generator().manual_seed(seed)
    free = torch.randn(width, width, dtype=torch.float64, generator=random)
    if not keeps_ones:
        return torch.linalg.qr(free).Q
    free[:, 0] = 1.0
    # In the basis `first`, whose first direction is (1, ..., 1), all but that one are turned.
    first = torch.linalg.qr(free).Q
    inner = torch.eye(width, dtype=torch.float64)
    inner[1:, 1:] = random_rotation(width - 1, seed)
    return first @ inner @ first.T


class _Halt(Exception):
    """The walk met a node that forbids a change of basis."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.bound = Bound(node, reason)


def basis_of(value: fx.Node) -> Basis | Bound:
    """All that is in the basis of the last axis of `value`, or what ties it to this basis."""
    shape = shape_of(value)
    width = shape[-1] if shape else 0
    if not isinstance(width, int) or width < 2:
        return Bound(value, "its last axis has no fixed number of channels, or one")
    walk = _Walk(width)
    try:
        walk.join(value)
        while walk.todo:
            walk.visit(walk.todo.pop())
    except _Halt as halt:
        return halt.bound
    return walk.found()


class _Walk:
    """Collects what is in the basis; each value is visited once, in both directions."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.todo: list[fx.Node] = []
        self._values: set[fx.Node] = set()
        self._reads: set[fx.Node] = set()
        self._writes: set[fx.Node] = set()
        self._vectors: set[tuple[fx.Node, fx.Node]] = set()
        self._centring: set[fx.Node] = set()

    def found(self) -> Basis:
        parts = (self._values, self._reads, self._writes)
        values, reads, writes = (tuple(sorted(p)) for p in parts)
        vectors = tuple(sorted(self._vectors))
        return Basis(self.width, values, reads, writes, vectors, tuple(sorted(self._centring)))

    def join(self, value: Any, reader: fx.Node | None = None) -> None:
        """Take a value into the basis; `reader` is the op that has it as an operand."""
        if not isinstance(value, fx.Node) or not same_size(_last(value), self.width):
            assert reader is not None
            raise _Halt(reader, f"{_name(value)} is the same number for all channels")
        if is_weight(value):
            assert reader is not None
            self._vectors.add((reader, value))
        elif value not in self._values:
            self._values.add(value)
            self.todo.append(value)

    def visit(self, value: fx.Node) -> None:
        if value.op == "placeholder":
            raise _Halt(value, "it is an input of the model, which comes in the basis it has")
        if _is_write(value):
            self._writes.add(value)
        else:
            for operand in self._carried(value):
                self.join(operand, value)
        for reader in readers(value):
            self._read(reader, value)

    def _read(self, reader: fx.Node, value: fx.Node) -> None:
        if reader.op == "output":
            flat: Any = reader.args[0]
            raise _Halt(reader, f"it is output {list(flat).index(value)} of the model")
        if is_op(reader, aten.linear.default) and argument(reader, "input") is value:
            if not is_weight(argument(reader, "weight")):
                raise _Halt(reader, "it is multiplied by a matrix computed from the input")
            self._reads.add(reader)
            return
        if value not in self._carried(reader):
            raise _Halt(reader, f"{op_name(reader)} reads it in another way than through its axes")
        self.join(reader)

    def _carried(self, node: fx.Node) -> list[Any]:
        """The operands that a node keeps in their basis.

        Raises: _Halt if it is no node that keeps one.
        """
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        rule = _first if is_hook(node) else rule
        if rule is None:
            raise _Halt(node, f"no rule says what {op_name(node)} makes of another basis")
        found = rule(node)
        if isinstance(found, str):
            raise _Halt(node, found)
        if is_op(node, aten.layer_norm.default):
            self._centring.add(node)
        return found


def _last(node: fx.Node) -> Any:
    shape = shape_of(node)
    return shape[-1] if shape else 1


def _name(value: Any) -> str:
    return f"%{value.name}" if isinstance(value, fx.Node) else repr(value)


def _is_write(node: fx.Node) -> bool:
    return is_op(node, aten.linear.default, aten.embedding.default) and is_weight(
        argument(node, "weight")
    )


_Rule = Callable[[fx.Node], "list[Any] | str"]


def _sum(node: fx.Node) -> list[Any] | str:
    pair = [argument(node, "self"), argument(node, "other")]
    return [v for v in pair if isinstance(v, fx.Node) or v != 0]


def _product(node: fx.Node) -> list[Any] | str:
    a, b = argument(node, "self"), argument(node, "other")
    wide = [v for v in (a, b) if isinstance(v, fx.Node) and not same_size(_last(v), 1)]
    if len(wide) == 2:
        weights = [v for v in wide if is_weight(v)]
        if weights:
            return f"multiplied by {_name(weights[0])}, which varies along the channels"
        return "two values with channels are multiplied"
    if is_op(node, aten.div.Tensor) and wide and wide[0] is b:
        return "it divides by it, channel by channel"
    return wide


def _view(node: fx.Node) -> list[Any] | str:
    source: Any = node.args[0]
    shape = shape_of(source)
    if shape and carried_axis(node, len(shape) - 1) == len(shape_of(node) or ()) - 1:
        return [source]
    return "it takes the channels apart or moves them to another axis"


def _first(node: fx.Node) -> list[Any] | str:
    return [node.args[0]]


def _dropout(node: fx.Node) -> list[Any] | str:
    return "it drops out single channels" if argument(node, "train") else [node.args[0]]


def _norm(node: fx.Node) -> list[Any] | str:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1:
        return "it normalises over more axes than the channels"
    if given["weight"] is not None or given.get("bias") is not None:
        return "it has a scale or a shift for each channel; fold it into what reads it first"
    return [given["input"]]


def _joined(node: fx.Node) -> list[Any] | str:
    operands: Any = node.args[0]
    rank = len(shape_of(node) or ())
    if argument(node, "dim") % rank == rank - 1:
        return "it joins channels of several values"
    return list(operands)


def _reduced(node: fx.Node) -> list[Any] | str:
    source: Any = argument(node, "self")
    axes, rank = argument(node, "dim"), len(shape_of(source) or ())
    if not axes or any(a % rank == rank - 1 for a in axes):
        return "it sums over the channels"
    return [source]


def _masked(node: fx.Node) -> list[Any] | str:
    mask, value = argument(node, "mask"), argument(node, "value")
    if value != 0 or not same_size(_last(mask), 1):
        return "it overwrites channels"
    return [argument(node, "self")]


def _added_rows(node: fx.Node) -> list[Any] | str:
    rank = len(shape_of(node) or ())
    if argument(node, "dim") % rank == rank - 1:
        return "it adds to channels that an index picks"
    return [argument(node, "self"), argument(node, "source")]


_RULES: dict[Any, _Rule] = {
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _product,
    aten.mul.Scalar: _first,
    aten.div.Scalar: _first,
    aten.neg.default: _first,
    aten.clone.default: _first,
    aten.detach.default: _first,
    **dict.fromkeys(VIEWS | CASTS, _view),
    **dict.fromkeys(DROPOUTS, _dropout),
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.cat.default: _joined,
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten.masked_fill.Scalar: _masked,
    aten.index_add.default: _added_rows,
}
