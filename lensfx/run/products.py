"""Products of a numbered value with a weight: which axes are summed, and the matrix made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis.contraction import letters
from lensfx.graph.node import argument, is_op, is_weight

__all__ = ["Product", "columns", "product", "summed"]

aten = torch.ops.aten

Axes = list[str]
Weight = Callable[[fx.Node], torch.Tensor]


@dataclass(frozen=True)
class Product:
    """`einsum(xs, ws -> out)` of a value with `weight`; `adds` if the operator adds a bias too."""

    xs: Axes
    weight: torch.Tensor
    ws: Axes
    out: Axes
    adds: bool = False

    def run(
        self,
        idx: torch.Tensor,
        matrix: torch.Tensor | None,
        factor: torch.Tensor | None,
        count: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix of the result and the number of the channel that each entry of it is.

        Raises: ValueError where no such matrix exists.
        """
        data, kept, gone = self._roles(idx)
        order = [self.xs.index(c) for c in (*data, *kept, *gone)]
        lead = (0,) * len(data)
        rows = idx.permute(order)[lead]
        shared = [c for c in kept if c in self.ws]
        fresh = [c for c in self.ws if c not in self.xs and c in self.out]
        weight = self._ordered(shared, gone, fresh)
        many = rows.shape[: len(kept)].numel()
        rows = rows.reshape(many, -1)
        scale = None
        if factor is not None:
            scale = factor.expand(idx.shape).permute(order)[lead].reshape(many, -1)
            scale = scale.to(self.weight.dtype)
        sizes = dict(zip(self.ws, self.weight.shape, strict=True))
        each = self._matrices(weight, kept, shared, dict(zip(self.xs, idx.shape, strict=True)))
        found = [
            _applied(r, w if scale is None else w * scale[i][:, None], matrix, count)
            for i, (r, w) in enumerate(zip(rows, each, strict=True))
        ]
        result = found[0] if len(found) == 1 else torch.stack(found, 1).flatten(1)
        lengths = {**sizes, **dict(zip(self.xs, idx.shape, strict=True))}
        lengths.update({c: sizes[c] for c in fresh})
        return result, _numbers(data, [*kept, *fresh], self.out, lengths, idx.device)

    def _roles(self, idx: torch.Tensor) -> tuple[Axes, Axes, Axes]:
        """Axes of data, axes of channels that stay, axes that are summed."""
        shared = [c for c in self.xs if c in self.ws]
        gone = [c for c in shared if c not in self.out]
        rest = [c for c in self.xs if c not in shared]
        data = [c for c in rest if _is_constant(idx, self.xs.index(c))]
        kept = [c for c in self.xs if c not in data and c not in gone]
        if any(c not in self.out for c in kept):
            raise ValueError("sums an axis that the weight does not have")
        sizes = dict(zip(self.xs, idx.shape, strict=True))
        if any(sizes[c] != 1 for c in data if c not in self.out):
            raise ValueError("sums over positions")
        return data, kept, gone

    def _ordered(self, shared: Axes, gone: Axes, fresh: Axes) -> torch.Tensor:
        """The weight as [shared axes, summed channels, new channels]; its other axes summed."""
        known = [*shared, *gone, *fresh]
        extra = [i for i, c in enumerate(self.ws) if c not in known]
        weight = self.weight.sum(extra) if extra else self.weight
        names = [c for c in self.ws if c in known]
        weight = weight.permute([names.index(c) for c in known])
        a, b = len(shared), len(shared) + len(gone)
        shape = weight.shape
        return weight.reshape(*shape[:a], shape[a:b].numel(), shape[b:].numel())

    def _matrices(
        self, weight: torch.Tensor, kept: Axes, shared: Axes, sizes: dict[str, int]
    ) -> Sequence[torch.Tensor]:
        """The matrix for each entry of the axes that stay."""
        if not kept:
            return [weight]
        shape = [sizes[c] if c in shared else 1 for c in kept]
        wide = weight.reshape(*shape, *weight.shape[-2:])
        wide = wide.expand(*(sizes[c] for c in kept), *weight.shape[-2:])
        return list(wide.flatten(0, len(kept) - 1))


def columns(matrix: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """These columns of a matrix; a view of it where they follow one another."""
    count = int(numbers.numel())
    first = int(numbers[0]) if count else 0
    if bool((numbers == torch.arange(first, first + count, device=numbers.device)).all()):
        return matrix[:, first : first + count]
    return matrix.index_select(1, numbers)


def summed(
    idx: torch.Tensor,
    matrix: torch.Tensor | None,
    factor: torch.Tensor | None,
    count: int,
    axis: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix and the numbers of a value summed along one axis, which keeps size 1.

    Raises: ValueError where the axis is none of channels.
    """
    names = [str(i) for i in range(idx.ndim)]
    if _is_constant(idx, axis) and idx.shape[axis] != 1:
        raise ValueError("sums over positions")
    like = matrix if matrix is not None else torch.empty(0)
    ones = torch.ones(idx.shape[axis], dtype=like.dtype, device=idx.device)
    done = Product(names, ones, [names[axis]], [n for n in names if n != names[axis]])
    made, numbers = done.run(idx, matrix, factor, count)
    return made, numbers.unsqueeze(axis)


def product(node: fx.Node, source: fx.Node, shape: torch.Size, weight: Weight) -> Product | None:
    """The product of `source`, of this shape, with a weight that a node computes; None if none."""
    if is_op(node, aten.linear.default) and argument(node, "input") is source:
        lead = [f"d{i}" for i in range(len(shape) - 1)]
        bias = argument(node, "bias") is not None
        w = argument(node, "weight")
        if is_weight(w):
            return Product([*lead, "i"], weight(w), ["o", "i"], [*lead, "o"], bias)
    elif is_op(node, aten.einsum.default):
        return _einsum(node, source, shape, weight)
    elif is_op(node, aten.conv1d.default):
        return _pointwise(node, source, weight)
    elif node.target in _MATRICES:
        return _matrices(node, source, shape, weight)
    return None


_MATRICES: dict[Any, tuple[str, str]] = {
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}


def _matrices(node: fx.Node, source: fx.Node, shape: torch.Size, weight: Weight) -> Product | None:
    first, second = (argument(node, slot) for slot in _MATRICES[node.target])
    if first is source and is_weight(second):
        value, left = weight(second), True
    elif second is source and is_weight(first):
        value, left = weight(first), False
    else:
        return None
    adds = node.target in (aten.addmm.default, aten.baddbmm.default)
    if adds:
        alpha = argument(node, "alpha")
        value = value if alpha == 1 else value * alpha
    rank, other = len(shape), value.ndim
    xs = _ends(rank, "r" if left else "c", left)
    ws = _ends(other, "c" if left else "r", not left)
    xb = _batch(rank, shape, value.shape, "x")
    wb = _batch(other, value.shape, shape, "w")
    out = xb if len(xb) > len(wb) else wb
    out = [w if x.startswith("x") else x for x, w in _aligned(xb, wb)] or out
    rows, cols = (rank, other) if left else (other, rank)
    tail = ["r"] * (rows > 1) + ["c"] * (cols > 1)
    return Product([*xb, *xs], value, [*wb, *ws], [*out, *tail], adds)


def _ends(rank: int, outer: str, left: bool) -> Axes:
    """The last axes of a factor: the summed one is the last of the left, the first of the right."""
    if rank == 1:
        return ["k"]
    return [outer, "k"] if left else ["k", outer]


def _batch(rank: int, own: Sequence[int], other: Sequence[int], side: str) -> Axes:
    """The axes before the last two, counted from the right; a repeated one has its own name."""
    names = []
    for place in range(max(rank - 2, 0), 0, -1):
        at = -2 - place
        repeated = own[at] == 1 and len(other) >= -at and other[at] != 1
        names.append(f"{side}{place}" if repeated else f"b{place}")
    return names


def _aligned(xb: Axes, wb: Axes) -> list[tuple[str, str]]:
    size = max(len(xb), len(wb))
    left = [""] * (size - len(xb)) + xb
    right = [""] * (size - len(wb)) + wb
    pairs = [(x or w, w or x) for x, w in zip(left, right, strict=True)]
    return pairs


def _einsum(node: fx.Node, source: fx.Node, shape: torch.Size, weight: Weight) -> Product | None:
    operands = list(argument(node, "tensors"))
    sides = letters(str(argument(node, "equation")), operands)
    if len(operands) != 2 or sides is None or source not in operands:
        return None
    at = operands.index(source)
    if not is_weight(operands[1 - at]):
        return None
    xs, ws, out = sides[at], sides[1 - at], sides[2]
    value = weight(operands[1 - at])
    sizes = dict(zip(ws, value.shape, strict=True))
    xs = [
        f"x{c}" if size == 1 and sizes.get(c, 1) != 1 else c
        for c, size in zip(xs, shape, strict=True)
    ]
    return Product(xs, value, ws, out)


def _pointwise(node: fx.Node, source: fx.Node, weight: Weight) -> Product | None:
    """A convolution that sees one position at a time."""
    kernel = argument(node, "weight")
    plain = argument(node, "groups") == 1 and list(argument(node, "stride")) == [1]
    plain = plain and list(argument(node, "padding")) == [0] and is_weight(kernel)
    if not plain or argument(node, "input") is not source:
        return None
    value = weight(kernel)
    if value.shape[-1] != 1:
        return None
    bias = argument(node, "bias") is not None
    return Product(["b", "i", "p"], value, ["o", "i", "k"], ["b", "o", "p"], bias)


def _applied(
    rows: torch.Tensor, weight: torch.Tensor, matrix: torch.Tensor | None, count: int
) -> torch.Tensor:
    """The matrix whose columns `rows` are multiplied by `weight`."""
    plain = torch.arange(rows.numel(), device=rows.device)
    if matrix is not None:
        return columns(matrix, rows) @ weight
    if rows.numel() == count and bool((rows == plain).all()):
        return weight
    return weight.new_zeros(count, weight.shape[1]).index_add(0, rows, weight)


def _numbers(
    data: Axes, channels: Axes, out: Axes, sizes: dict[str, int], device: torch.device
) -> torch.Tensor:
    """The number of the channel of every entry of a result."""
    lengths = [sizes[c] for c in channels]
    total = int(torch.Size(lengths).numel())
    numbers = torch.arange(total, device=device).reshape(lengths)
    present = [c for c in out if c in channels]
    numbers = numbers.permute([channels.index(c) for c in present])
    for at, name in enumerate(out):
        if name not in channels:
            numbers = numbers.unsqueeze(at)
    return numbers.expand([sizes[c] for c in out])


def _is_constant(idx: torch.Tensor, axis: int) -> bool:
    return bool((idx == idx.narrow(axis, 0, 1)).all()) if idx.shape[axis] > 1 else True
