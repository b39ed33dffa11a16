"""Which axis of a cached value is batch and which is position, from the symbols of its shape."""

from __future__ import annotations

from typing import Any

import torch

from lensfx.analysis.unembed import token_tables
from lensfx.errors import LensError
from lensfx.graph.node import argument, shape_of
from lensfx.graph.program import Program
from lensfx.run.names import Names

__all__ = ["drop_batch", "slice_positions"]


def _axis(program: Program, names: Names, name: str, place: int) -> int | None:
    """The axis of a named value that carries axis `place` of the token ids; None if none does."""
    name = name.removesuffix("_grad")
    table = next(token_tables(program), None)
    if table is None:
        return None
    if name in names.canonical:
        return place
    ids = _shape(argument(table, "indices") if "indices" in table.kwargs else table.args[1])
    shape = _shape(names.places[name].node)
    symbol = str(ids[place]) if len(ids) > place else ""
    if not symbol or symbol.isdigit():
        return None
    return next((i for i, size in enumerate(shape) if str(size) == symbol), None)


def _shape(node: Any) -> tuple[Any, ...]:
    if isinstance(node, (list, tuple)):
        node = node[0]
    return tuple(shape_of(node) or ())


def slice_positions(
    program: Program, names: Names, name: str, value: torch.Tensor, wanted: slice | int | None
) -> torch.Tensor:
    """The value at some positions; one position given as a number drops the axis.

    A value without a position axis is returned whole.
    """
    if wanted is None:
        return value
    axis = _axis(program, names, name, 1)
    if axis is None or axis >= value.ndim:
        return value
    index: list[Any] = [slice(None)] * value.ndim
    index[axis] = wanted
    return value[tuple(index)]


def drop_batch(program: Program, names: Names, name: str, value: torch.Tensor) -> torch.Tensor:
    """The value without its batch axis.

    Raises: LensError if the batch is larger than 1.
    """
    axis = _axis(program, names, name, 0)
    if axis is None or axis >= value.ndim:
        return value
    if value.shape[axis] != 1:
        raise LensError(
            f"remove_batch_dim needs a batch of 1, and {name} has {value.shape[axis]}",
            hint="leave remove_batch_dim off",
        )
    return value.squeeze(axis)
