"""Calls that a captured program accepts and that are hard on a rewrite, from a few integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lensfx.errors import GuardError
from lensfx.graph.program import Program
from lensfx.verify.inputs import LARGEST, _table_rows

__all__ = ["KINDS", "call_of", "sizes_of"]

# The first is the plainest: a failing call shrinks to it.
KINDS = (
    "random",
    "constant rows",
    "zero row",
    "outlier row",
    "outlier channel",
    "tiny",
    "large",
)


def sizes_of(program: Program) -> dict[str, tuple[int, int]]:
    """The range of each size that is free, by symbol; large ones are cut."""
    found: dict[str, tuple[int, int]] = {}
    for axis in program.guards.dynamic:
        low, high = found.get(str(axis.symbol), (1, LARGEST))
        # What starts above the cut has its own range, however large.
        low = max(low, axis.low)
        found[str(axis.symbol)] = low, max(low, min(high, axis.high))
    return found


def call_of(
    program: Program, sizes: dict[str, int], kind: str, seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of these sizes, or of the nearest that the program accepts.

    Inputs that belong together may have sizes of their own that must agree: the sizes of the first
    are then those of all, and where that is refused too, the example's.
    """
    generator = torch.Generator().manual_seed(seed)
    for chosen in _candidates(program, sizes):
        tensors = _drawn(program, chosen, kind, generator)
        try:
            program.guards.check(tensors)
        except GuardError:
            continue
        return program.signature.arguments(tensors)
    return program.signature.arguments([t.clone() for t in program.example])


def _candidates(program: Program, sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    dynamic = program.guards.dynamic
    own = {str(a.symbol): program.example[a.leaf].shape[a.axis] for a in dynamic}
    by_axis: dict[int, int] = {}
    by_size: dict[int, int] = {}
    for axis in dynamic:
        by_axis.setdefault(axis.axis, sizes[str(axis.symbol)])
        by_size.setdefault(own[str(axis.symbol)], sizes[str(axis.symbol)])
    yield sizes
    yield {str(a.symbol): by_size[own[str(a.symbol)]] for a in dynamic}
    yield {str(a.symbol): by_axis[a.axis] for a in dynamic}
    for symbol in own:
        yield {**own, symbol: sizes[symbol]}
    yield own


def _drawn(
    program: Program, sizes: dict[str, int], kind: str, generator: torch.Generator
) -> list[Tensor]:
    rows = _table_rows(program)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    drawn = []
    for leaf, (node, example) in enumerate(zip(placeholders, program.example, strict=True)):
        shape = list(example.shape)
        for axis in program.guards.axes:
            if axis.leaf == leaf and axis.symbol:
                shape[axis.axis] = sizes.get(axis.symbol, shape[axis.axis])
        if example.is_floating_point():
            drawn.append(_numbers(example, shape, kind, generator))
        elif node in rows:
            drawn.append(_ids(example, shape, rows[node], kind, generator))
        else:
            drawn.append(_others(example, shape, generator))
    return drawn


def _numbers(
    example: Tensor, shape: Sequence[int], kind: str, generator: torch.Generator
) -> Tensor:
    """Noise at the example's scale; a row is what lies along the last axis."""
    scale = float(example.double().std()) if example.numel() > 1 else 1.0
    made = torch.randn(list(shape), generator=generator, dtype=torch.float64) * (scale or 1.0)
    if made.ndim and made.numel():
        flat = made.view(-1, made.shape[-1])
        if kind == "constant rows":
            flat[:] = flat[:, :1].clone()
        elif kind == "zero row":
            flat[0] = 0.0
        elif kind == "outlier row":
            flat[-1] *= 500
        elif kind == "outlier channel":
            flat[:, 0] *= 500
    made = made * {"tiny": 1e-3, "large": 30.0}.get(kind, 1.0)
    return made.to(example.dtype)


def _ids(
    example: Tensor, shape: Sequence[int], rows: int, kind: str, generator: torch.Generator
) -> Tensor:
    """Rows of the table, its first and last among them; one repeated throughout an example."""
    made = torch.randint(0, rows, list(shape), generator=generator)
    if made.numel():
        flat = made.view(-1)
        if kind == "constant rows":
            made[:] = flat[0].clone()
        elif kind in ("zero row", "tiny"):
            flat[0] = 0
        elif kind in ("outlier row", "large"):
            flat[-1] = rows - 1
    return made.to(example.dtype)


def _others(example: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A mask with padding at one end if it is one, two-dimensional; else the example, resized."""
    values = set(example.unique().tolist()) if example.numel() else set()
    if len(shape) == 2 and values and values <= {0, 1} and shape[1]:
        kept = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        mask = torch.arange(shape[1])[None] < kept
        at_front = bool(example.shape[1] and not example[:, 0].all())
        return (mask.flip(1) if at_front else mask).to(example.dtype)
    resized = example
    for axis, size in enumerate(shape):
        if example.shape[axis]:
            resized = resized.index_select(axis, torch.arange(size) % example.shape[axis])
    return resized.clone()
