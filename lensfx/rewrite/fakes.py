"""Fake values of new calls: what they give on the fake values of their inputs, by shape."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from lensfx.errors import RewriteError
from lensfx.graph.node import value_of, where

__all__ = ["Fakes", "Unrunnable"]

# Torch chooses the kernel of a convolution by how large a size is; what is right does not depend
# on that. Of any other call it may be part of the result's shape.
_BOUNDS = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)


class Unrunnable(Exception):
    """A call that does not run on these values, in words."""


class Fakes:
    """Runs calls on the fake values of one graph, each kind of call once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._vals: dict[Any, Any] = {}
        modes = (getattr(value_of(n), "fake_mode", None) for n in graph.nodes)
        self._mode: Any = next((mode for mode in modes if mode is not None), None)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake value of a stored tensor; the tensor itself in a graph without fake values."""
        if self._mode is None:
            return tensor.detach()
        made: torch.Tensor = self._mode.from_tensor(tensor.detach(), static_shapes=True)
        return made

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The fake value of a call.

        Raises: Unrunnable, also where it would need sizes to be equal that the guards let differ.
        """
        vals = fx.node.map_arg((args, dict(kwargs)), _required_value)
        key = (target, _key(vals))
        if key not in self._vals:
            known = len(self._guards())
            try:
                with self._mode or contextlib.nullcontext(), torch.no_grad():
                    self._vals[key] = target(*vals[0], **vals[1])
            except Exception as error:
                raise Unrunnable(str(error)) from error
            free = _BOUNDS if "conv" in str(target) else ()
            if any(not isinstance(g.expr, free) for g in self._guards()[known:]):
                # Torch takes sizes that coincide in the example for equal; the guards do not.
                del self._vals[key]
                raise Unrunnable("two sizes that may differ would have to be equal")
        return self._vals[key]

    def _guards(self) -> list[Any]:
        return list(self._mode.shape_env.guards) if self._mode and self._mode.shape_env else []


def _required_value(node: fx.Node) -> Any:
    val = value_of(node)
    if val is None:
        raise RewriteError(f"{node.name} has no value to compute shapes from", at=where(node))
    return val


def _key(tree: Any) -> Any:
    """A hashable description of fake arguments: shapes, strides and dtypes, not identities."""
    if isinstance(tree, torch.Tensor):
        sizes = tuple(str(s) for s in (*tree.shape, *tree.stride()))
        return ("tensor", sizes, tree.ndim, tree.dtype, tree.device)
    if isinstance(tree, (list, tuple)):
        return tuple(_key(t) for t in tree)
    if isinstance(tree, Mapping):
        return tuple((k, _key(v)) for k, v in sorted(tree.items()))
    return (type(tree), str(tree))
