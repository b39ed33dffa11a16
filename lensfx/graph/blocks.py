"""Evaluate a parameter expression in float64 without holding large float64 copies of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, is_op

__all__ = ["evaluate"]

aten = torch.ops.aten
BLOCK = 1 << 18

_POINTWISE = frozenset(
    {
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.div.Tensor,
        aten.neg.default,
        aten.to.dtype,
    }
)


@dataclass(frozen=True)
class _Rows:
    """A large matrix given by its rows: `rows(a, b)` makes rows a to b in float64."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]

    def blocks(self) -> list[tuple[int, int]]:
        step = max(1, BLOCK // max(1, self.shape[1]))
        return [(a, min(a + step, self.shape[0])) for a in range(0, self.shape[0], step)]


def evaluate(
    root: fx.Node, leaf: Callable[[fx.Node], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """The value of a parameter expression, computed in float64 and rounded once to `dtype`.

    Matrices of more than BLOCK entries go through in blocks of rows where every operator on
    the way works row by row, so that beside the result only one block is held in float64.
    """
    memo: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            for node in _ordered(root):
                memo[node] = _value(node, memo, leaf)
            return _rounded(root, memo[root], dtype)
    finally:
        # Rows know the memo they are made from, and that circle would keep every input alive.
        memo.clear()


def _rounded(root: fx.Node, value: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(value, _Rows):
        out = value.rows(0, 1).new_empty(value.shape, dtype=dtype)
        for a, b in value.blocks():
            out[a:b] = value.rows(a, b)
        return out
    if isinstance(value, torch.Tensor):
        return value.to(dtype).clone(memory_format=torch.contiguous_format)
    raise TypeError(f"{root} is not a tensor")


def _ordered(root: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _value(node: fx.Node, memo: Mapping[fx.Node, Any], leaf: Callable[..., Any]) -> Any:
    if node.op == "get_attr":
        return _stored(leaf(node))
    if is_op(node, aten.t.default) and argument(node, "self").op == "get_attr":
        # A transposed stored matrix is still a stored matrix: no float64 copy of the whole.
        return _stored(leaf(argument(node, "self")).t())
    by_rows = _by_rows(node, memo)
    if by_rows is not None:
        return by_rows
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _whole(memo[n]))
    return node.target(*_wide(args), **_wide(kwargs))  # type: ignore[operator]


def _stored(tensor: torch.Tensor) -> Any:
    """A stored tensor: widened at once if it is small, by rows if it is a large matrix."""
    if tensor.ndim != 2 or tensor.numel() <= BLOCK:
        return _widen(tensor)
    return _Rows(tuple(tensor.shape), lambda a, b: _widen(tensor[a:b]))


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128)
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _wide(tree: Any) -> Any:
    """Arguments with every smaller floating dtype replaced: a cast in a formula rounds nothing."""
    if isinstance(tree, torch.dtype) and tree.is_floating_point:
        return torch.float64
    if isinstance(tree, (list, tuple)):
        return type(tree)(_wide(t) for t in tree)
    if isinstance(tree, dict):
        return {k: _wide(v) for k, v in tree.items()}
    return tree


def _whole(value: Any) -> Any:
    if isinstance(value, _Rows):
        return torch.cat([value.rows(a, b) for a, b in value.blocks()])
    return value


def _by_rows(node: fx.Node, memo: Mapping[fx.Node, Any]) -> Any:
    large = [n for n in node.all_input_nodes if isinstance(memo[n], _Rows)]
    if not large:
        return None
    first = memo[large[0]]
    if is_op(node, *_POINTWISE) and all(memo[n].shape == first.shape for n in large):
        return _pointwise(node, memo, first)
    if is_op(node, aten.mv.default) and large == [node.args[0]]:
        vector = memo[argument(node, "vec")]
        return _gathered(first, lambda block: block @ vector, (first.shape[0],))
    if is_op(node, aten.mean.dim):
        return _mean(node, first)
    return None


def _gathered(
    matrix: _Rows, of_block: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """What is made of each block of rows, one under the other.

    Written into one tensor: small results that stay alive between the blocks would cut up the
    memory that the blocks leave behind.
    """
    out: torch.Tensor | None = None
    for a, b in matrix.blocks():
        part = of_block(matrix.rows(a, b))
        out = part.new_empty(shape) if out is None else out
        out[a:b] = part
    assert out is not None
    return out


def _pointwise(node: fx.Node, memo: Mapping[fx.Node, Any], like: _Rows) -> _Rows | None:
    small = [memo[n] for n in node.all_input_nodes if not isinstance(memo[n], _Rows)]
    fits = all(
        s.ndim <= 2
        and (s.ndim == 0 or s.shape[-1] in (1, like.shape[1]))
        and (s.ndim < 2 or s.shape[0] in (1, like.shape[0]))
        for s in small
    )
    if not fits:
        return None

    def part(value: Any, a: int, b: int) -> Any:
        if isinstance(value, _Rows):
            return value.rows(a, b)
        by_row = value.ndim == 2 and value.shape[0] == like.shape[0] and like.shape[0] > 1
        return value[a:b] if by_row else value

    def rows(a: int, b: int) -> torch.Tensor:
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda n: part(memo[n], a, b)
        )
        made: torch.Tensor = node.target(*_wide(args), **_wide(kwargs))  # type: ignore[operator]
        return made

    return _Rows(like.shape, rows)


def _mean(node: fx.Node, matrix: _Rows) -> torch.Tensor | None:
    axes = argument(node, "dim")
    keep = bool(argument(node, "keepdim"))
    if axes is None or len(axes) != 1:
        return None
    if axes[0] % 2 == 1:
        shape = (matrix.shape[0], 1) if keep else (matrix.shape[0],)
        return _gathered(matrix, lambda block: block.mean(1, keepdim=keep), shape)
    total = sum(matrix.rows(a, b).sum(0, keepdim=keep) for a, b in matrix.blocks())
    return torch.as_tensor(total) / matrix.shape[0]
