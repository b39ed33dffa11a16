"""Which einsum is a linear map by a weight: its equation read as x over trailing axes times W."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from lensfx.graph.node import argument, is_weight, shape_of

__all__ = ["WeightEinsum", "weight_einsum"]


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
    shape = shape_of(weight) or ()
    sizes = {c: int(n) for c, n in zip(ws, shape, strict=True)}
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
    if not arrow or len(terms) != 2:
        return None
    dots = 0
    for term, operand in zip(terms, operands, strict=True):
        if "..." in term:
            dots = max(dots, len(shape_of(operand) or ()) - len(term.replace("...", "")))
    named = [_spread(t, dots) for t in (*terms, right)]
    for term, operand in zip(named[:2], operands, strict=True):
        if len(set(term)) != len(term) or len(term) != len(shape_of(operand) or ()):
            return None
    return named[0], named[1], named[2]


def _spread(term: str, dots: int) -> list[str]:
    before, found, after = term.partition("...")
    middle = [f".{i}" for i in range(dots)] if found else []
    return [*before, *middle, *after]
