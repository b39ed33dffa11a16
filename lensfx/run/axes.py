"""Which axis of a cached value is batch and which is position, from the symbols of its shape."""

from __future__ import annotations

from typing import Any

import torch

from lensfx.analysis.unembed import table_and_ids, token_tables
from lensfx.errors import LensError
from lensfx.graph.node import shape_of
from lensfx.graph.program import Program
from lensfx.run.names import Names

__all__ = ["Axes"]

BATCH, POSITION = 0, 1


class Axes:
    """The batch and position axes of every named value: those that have the size of the ids'."""

    def __init__(self, program: Program, names: Names) -> None:
        self._names = names
        table = next(token_tables(program), None)
        found = table_and_ids(table) if table is not None else None
        shape = (shape_of(found[1]) or ()) if found is not None else ()
        # Ids that the model flattened first no longer say which axis is which.
        self._ids = tuple(map(str, shape)) if len(shape) == 2 else ()

    def slice_positions(
        self, name: str, value: torch.Tensor, wanted: slice | int | tuple[int | None, ...]
    ) -> torch.Tensor:
        """The value at some positions; one position given as a number drops the axis.

        A value without a position axis is returned whole. Of queries and keys, the queries are
        sliced.
        """
        axis = self._axis(name, POSITION)
        if axis is None:
            return value
        index: list[Any] = [slice(None)] * value.ndim
        index[axis] = slice(*wanted) if isinstance(wanted, tuple) else wanted
        return value[tuple(index)]

    def drop_batch(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The value without its batch axis.

        Raises: LensError if the batch is larger than 1.
        """
        axis = self._axis(name, BATCH)
        if axis is None:
            return value
        if value.shape[axis] != 1:
            raise LensError(
                f"remove_batch_dim needs a batch of 1, and {name} has {value.shape[axis]}",
                hint="leave remove_batch_dim off",
            )
        return value.squeeze(axis)

    def _axis(self, name: str, place: int) -> int | None:
        """The axis of a named value that is axis `place` of the token ids; None if none is."""
        if not self._ids:
            return None
        name = name if name in self._names.places else name.removesuffix("_grad")
        at = self._names.places[name]
        if name in self._names.canonical and (at.part or at.layout.order):
            # Hooks that see other axes than the graph has see the canonical ones.
            scores = name.endswith(("hook_attn_scores", "hook_pattern"))
            return 2 * place if scores else place
        shape = [str(size) for size in shape_of(at.node) or ()]
        size = self._ids[place]
        if size.isdigit():
            # The same number may stand for something else: believe it only where names have axes.
            alone = place == BATCH or len(shape) == 3 or shape.count(size) == 1
            named = name in self._names.canonical and len(shape) > 2 and shape[place] == size
            return place if named and alone else None
        return shape.index(size) if size in shape else None
