"""Products of tensors that sum over axes: their factors, and a label for each axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, shape_of

__all__ = ["FACTORS", "Labels", "Product", "product"]

aten = torch.ops.aten

Labels = tuple[Any, ...]

# The two factors of each operator, by schema name; what else it reads is added to the product.
FACTORS: dict[Any, tuple[str, str]] = {
    aten.linear.default: ("input", "weight"),
    aten.matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.mv.default: ("self", "vec"),
    aten.dot.default: ("self", "tensor"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}


@dataclass(frozen=True)
class Product:
    """Each factor with a label for each of its axes, and the labels of the result.

    Axes that share a label have one index; labels that the result lacks are summed over.
    """

    terms: tuple[tuple[Any, Labels], ...]
    out: Labels


def product(node: fx.Node) -> Product | None:
    """The product that a node computes, or None if it is none or an einsum with an ellipsis."""
    if node.target is aten.einsum.default:
        return _einsum(node)
    target: Any = node.target
    names = FACTORS.get(target)
    if names is None:
        return None
    first, second = operands = [argument(node, name) for name in names]
    n, m = (len(shape_of(x) or ()) for x in operands)
    batch: Labels = tuple(range(2 - max(n, m), 0))
    if node.target is aten.linear.default:
        batch, right = tuple(range(1 - n, 0)), ("o", "k")[-m:]
        left: Labels = (*batch, "k")
        out: Labels = (*batch, *right[:-1])
    else:
        row, column = ("r",)[: n - 1], ("c",)[: m - 1]
        left = (*range(2 - n, 0), *row, "k")
        right = (*range(2 - m, 0), "k", *column)
        out = (*batch, *row, *column)
    return Product(((first, left), (second, right)), out)


def _einsum(node: fx.Node) -> Product | None:
    left, arrow, out = str(argument(node, "equation")).replace(" ", "").partition("->")
    if "." in left:
        return None
    letters = left.replace(",", "")
    out = out if arrow else "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    terms = zip(argument(node, "tensors"), map(tuple, left.split(",")), strict=True)
    return Product(tuple(terms), tuple(out))
