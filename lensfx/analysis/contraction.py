"""What an einsum contracts with what."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.graph.node import argument, is_weight, shape_of
from lensfx.graph.views import same_size

__all__ = ["WeightEinsum", "letters", "weight_einsum"]

aten = torch.ops.aten


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
    sides = letters(str(argument(node, "equation")), operands)
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


def letters(equation: str, operands: list[fx.Node]) -> list[list[str]] | None:
    """The axes of each operand of an einsum and of its result, by letter; None if one repeats."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
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
    for axes, operand in zip(named[:-1], operands, strict=True):
        if len(set(axes)) != len(axes) or len(axes) != len(shape_of(operand) or ()):
            return None
    return named


def _spread(term: str, dots: int) -> list[str]:
    before, found, after = term.partition("...")
    middle = [f".{i}" for i in range(dots)] if found else []
    return [*before, *middle, *after]
