"""What is contracted with what: products with a weight, and what keeps positions apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, is_op, is_weight, shape_of
from lensfx.graph.ops import CASTS, VIEWS, data_inputs, is_hook
from lensfx.graph.views import same_shape, same_size

__all__ = ["WeightEinsum", "is_weight_product", "keeps_positions_apart", "weight_einsum"]

aten = torch.ops.aten

_OVER_CHANNELS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.softmax.int,
    aten.topk.default,
    aten.gather.default,
    aten.var.correction,
    aten.var.dim,
)


@dataclass(frozen=True)
class WeightEinsum:
    """`einsum` as linear(x, W): W is `weight` permuted by `order`, flattened to [out, summed]."""

    x: fx.Node
    weight: fx.Node
    order: list[int]
    out_shape: tuple[int, ...]
    out: int
    summed: int
    summed_axes: int


def weight_einsum(node: fx.Node) -> WeightEinsum | str:
    """The einsum as a linear map, or why it is none: an empty string where no weight takes part."""
    operands = list(argument(node, "tensors"))
    if len(operands) != 2 or sum(is_weight(n) for n in operands) != 1:
        return ""
    sides = _letters(str(argument(node, "equation")), operands)
    if sides is None:
        return "its equation repeats or broadcasts letters"
    first, second, result = sides
    x, weight, xs, ws = operands[0], operands[1], first, second
    if is_weight(x):
        x, weight, xs, ws = operands[1], operands[0], second, first
    summed = [c for c in xs if c not in result]
    out = [c for c in ws if c in result]
    if not summed or not out:
        return ""
    if any(c in xs for c in out):
        return f"the weight shares the axis {next(c for c in out if c in xs)} with the result"
    if sorted(summed) != sorted(c for c in ws if c not in result):
        return "it sums over an axis that only one operand has"
    if xs[-len(summed) :] != summed or result != xs[: -len(summed)] + out:
        return "it sums over axes that are not the last, or moves axes of the result"
    sizes = {c: int(n) for c, n in zip(ws, shape_of(weight) or (), strict=True)}
    given = dict(zip(xs, shape_of(x) or (), strict=True))
    # An axis of size 1 is repeated to fit the other operand's.
    if not all(same_size(given[c], sizes[c]) for c in summed):
        return "it sums over an axis that has another size in each operand"
    return WeightEinsum(
        x,
        weight,
        [ws.index(c) for c in (*out, *summed)],
        tuple(sizes[c] for c in out),
        math.prod(sizes[c] for c in out),
        math.prod(sizes[c] for c in summed),
        len(summed),
    )


def _letters(
    equation: str, operands: list[fx.Node]
) -> tuple[list[str], list[str], list[str]] | None:
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return None
    if not arrow:
        used = left.replace(",", "").replace(".", "")
        right = "..." if "..." in left else ""
        right += "".join(sorted(c for c in set(used) if used.count(c) == 1))
    dots = 0
    for term, operand in zip(terms, operands, strict=True):
        if "..." in term:
            dots = max(dots, len(shape_of(operand) or ()) - len(term.replace("...", "")))
    named = [_spread(t, dots) for t in (*terms, right)]
    for letters, operand in zip(named[:2], operands, strict=True):
        if len(set(letters)) != len(letters) or len(letters) != len(shape_of(operand) or ()):
            return None
    return named[0], named[1], named[2]


def _spread(term: str, dots: int) -> list[str]:
    before, found, after = term.partition("...")
    middle = [f".{i}" for i in range(dots)] if found else []
    return [*before, *middle, *after]


def is_weight_product(node: fx.Node) -> bool:
    """Whether a node is `linear` or another spelling of it: a value times a weight matrix."""
    if is_op(node, aten.linear.default):
        return is_weight(argument(node, "weight"))
    if is_op(node, aten.addmm.default, aten.mm.default):
        return is_weight(argument(node, "mat2"))
    if is_op(node, aten.matmul.default):
        return is_weight(argument(node, "other"))
    return is_op(node, aten.einsum.default) and not isinstance(weight_einsum(node), str)


def keeps_positions_apart(node: fx.Node, lead: Sequence[Any], region: Collection[fx.Node]) -> bool:
    """Whether each position of the result comes from the same position of the operands alone.

    `lead` are the sizes of the batch and position axes of the stream. Every value in the region
    has to have them in front, or their product: both are the same rows in the same order.
    """
    if shape_of(node) is not None and _leading(node, lead) is None:
        return False
    operands = [n for n in data_inputs(node) if n in region or _leading(n, lead) is not None]
    operands = [n for n in operands if shape_of(n) is not None]
    fronts = [_leading(n, lead) for n in operands]
    if not operands or is_hook(node) or is_op(node, operator.getitem, *CASTS):
        return None not in fronts
    front, rank = fronts[0], len(shape_of(operands[0]) or ())
    if front is None or None in fronts:
        return False
    if is_op(node, *VIEWS):
        return _moves_no_row(node, front, rank)
    if is_op(node, *_OVER_CHANNELS):
        axes = argument(node, "dim")
        given = axes if isinstance(axes, (list, tuple)) else [axes]
        return all(isinstance(a, int) and a % rank >= front for a in given)
    if is_op(node, aten.layer_norm.default, aten.rms_norm.default):
        return rank - len(argument(node, "normalized_shape")) >= front
    if is_weight_product(node):
        return rank > front
    if is_op(node, aten.einsum.default, aten.matmul.default):
        return _pairs_rows(node, operands, front)
    aligned = all(len(shape_of(n) or ()) == len(shape_of(node) or ()) for n in operands)
    return aligned and torch.Tag.pointwise in getattr(node.target, "tags", ())


def _leading(node: fx.Node, lead: Sequence[Any]) -> int | None:
    """How many axes in front of a value are batch and position: all, or one that merges them."""
    shape = shape_of(node) or ()
    for start, size in enumerate(shape):
        if same_shape(shape[start : start + len(lead)], lead):
            return start + len(lead)
        if not same_size(size, 1):
            break
    return 1 if shape and same_size(shape[0], math.prod(lead)) else None


def _pairs_rows(product: fx.Node, operands: list[fx.Node], front: int) -> bool:
    """Whether each row of a product of two computed values is a product of the same rows."""
    if len(operands) != 2 or any(is_weight(n) for n in data_inputs(product)):
        return False
    if is_op(product, aten.matmul.default):
        return all(len(shape_of(n) or ()) > front + 1 for n in (*operands, product))
    letters = _letters(str(argument(product, "equation")), operands)
    return letters is not None and letters[0][:front] == letters[1][:front] == letters[2][:front]


def _moves_no_row(view: fx.Node, front: int, rank: int) -> bool:
    """Whether a view between two values with rows in front leaves each row where it is."""
    if is_op(view, aten.t.default):
        return False
    if is_op(view, aten.transpose.int):
        return all(argument(view, name) % rank >= front for name in ("dim0", "dim1"))
    if is_op(view, aten.permute.default):
        return [d % rank for d in argument(view, "dims")[:front]] == list(range(front))
    if is_op(view, aten.select.int, aten.slice.Tensor):
        return bool(argument(view, "dim") % rank >= front)
    if is_op(view, aten.index.Tensor):
        return all(i is None for i in argument(view, "indices")[:front])
    return True
