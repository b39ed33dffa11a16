"""Whether the entries of a value along an axis add up to one, as the weights of attention do."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis.masks import may_forbid_all
from lensfx.analysis.products import product
from lensfx.graph.node import argument, dtype_of, is_op, is_weight, op_name, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, data_inputs, is_hook
from lensfx.graph.views import carried_axis

__all__ = ["Cut", "Rows", "attended", "attends_fully", "rows"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """Why the entries along an axis add up to one: `path` leads back to the softmax."""

    value: fx.Node
    axis: int
    softmax: fx.Node
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Cut:
    """Why the entries along an axis need not add up to one, and the node that makes it so."""

    value: fx.Node
    axis: int
    node: fx.Node
    reason: str


_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
_PARTS = (aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.narrow.default)
_SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
)


def rows(value: fx.Node, axis: int) -> Rows | Cut:
    """Whether the entries of `value` along `axis` add up to one, for all inputs and parameters.

    A row of a written softmax in which every score is -inf is not a number, before and after.
    """
    path = [value]
    at = axis % max(1, len(shape_of(value) or ()))
    while not is_op(path[-1], *_SOFTMAX):
        node = path[-1]
        if not isinstance(node.args[0] if node.args else None, fx.Node):
            return _not_one(value, axis, node, path)
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        before = _before(node, at)
        if before is None:
            return _not_one(value, axis, node, path)
        if is_op(node, operator.getitem):
            source = source.args[0]  # type: ignore[assignment]
        at = before
        path.append(source)
    softmax = path[-1]
    rank = len(shape_of(softmax) or ())
    over = argument(softmax, "dim") % max(1, rank)
    if over != at:
        words = f"%{softmax.name} adds up to one along axis {over}, not along axis {at}"
        return Cut(value, axis, softmax, words)
    return Rows(value, axis, softmax, tuple(path))


def _before(node: fx.Node, axis: int) -> int | None:
    """The axis of the first operand that lies whole along `axis` of the result; None if none."""
    source = node.args[0]
    if is_op(node, operator.getitem):
        split: fx.Node = source  # type: ignore[assignment]
        if not is_op(split, *_SPLITS):
            return None
        dim = argument(split, "dim") % max(1, len(shape_of(node) or ()))
        return None if dim == axis else axis
    if is_hook(node) or is_op(node, *_SAME):
        return axis
    if is_op(node, *DROPOUTS):
        return None if argument(node, "train") else axis
    if is_op(node, *CASTS):
        kind = dtype_of(node)
        return axis if kind is not None and kind.is_floating_point else None
    if is_op(node, aten.narrow.default):
        return None if argument(node, "dim") % len(shape_of(node) or ()) == axis else axis
    rank = len(shape_of(source) or ())  # type: ignore[arg-type]
    return next((a for a in range(rank) if carried_axis(node, a) == axis), None)


def _not_one(value: fx.Node, axis: int, node: fx.Node, path: list[fx.Node]) -> Cut:
    softmax = _softmax_behind(node)
    if softmax is None:
        words = f"%{node.name} ({op_name(node)}) is no softmax: its rows need not add up to one"
    elif is_op(node, *_PARTS, operator.getitem):
        words = f"rows of %{softmax.name} are cut at %{node.name}: they no longer sum to one"
    else:
        what = f"changed by %{node.name} ({op_name(node)})"
        words = f"rows of %{softmax.name} are {what}: they no longer sum to one"
    return Cut(value, axis, node, words)


def _softmax_behind(node: fx.Node) -> fx.Node | None:
    """The softmax that a value was made of, if there is one a few nodes back."""
    seen = [node]
    for n in seen:
        if is_op(n, *_SOFTMAX):
            return n
        if len(seen) < 40:
            seen.extend(m for m in n.all_input_nodes if m not in seen)
    return None


def attends_fully(node: fx.Node) -> str:
    """Why some row of a fused attention may not add up to one; empty if all do."""
    if argument(node, "dropout_p") != 0.0:
        return f"%{node.name} drops attention weights at random"
    mask = argument(node, "attn_mask")
    # Causal or not, the first key is allowed for every row.
    return "" if mask is None else may_forbid_all(mask)


def attended(graph: fx.Graph) -> list[fx.Node]:
    """The linear ops whose result is mixed by computed weights, as the values of attention are.

    In graph order. Between the two there is neither a norm nor another linear op.
    """
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [n for node in graph.nodes for n in _mixed_by(node)]
    while stack:
        node = stack.pop()
        if node in seen or is_weight(node) or "norm" in op_name(node):
            continue
        seen.add(node)
        if is_op(node, aten.linear.default):
            found.add(node)
        elif not is_op(node, *_SOFTMAX):
            stack.extend(data_inputs(node))
    return [n for n in graph.nodes if n in found]


def _mixed_by(node: fx.Node) -> list[fx.Node]:
    """What a product of computed values, or a fused attention, mixes."""
    if is_op(node, aten.scaled_dot_product_attention.default):
        return [argument(node, "value")]
    found = product(node)
    operands = [x for x, _ in found.terms if isinstance(x, fx.Node)] if found is not None else []
    return operands if operands and not any(map(is_weight, operands)) else []
