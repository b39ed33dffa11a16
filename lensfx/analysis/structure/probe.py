"""What an operator without a rule mixes, asked of the operator: run on noise, one entry changed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.graph.node import schema_names
from lensfx.graph.opaque import is_opaque, opaque_of
from lensfx.graph.program import Program

__all__ = ["keeps_apart"]


def keeps_apart(program: Program, node: fx.Node, source: fx.Node, axes: Iterable[int]) -> bool:
    """Whether each entry of a value along these axes changes no other entry of the first result.

    False if the operator has no result of the same shape, or cannot be run on noise.
    """
    made = _Noise(program)
    # A module that is run as it stands keeps no trace of it.
    untouched = opaque_of(str(node.args[0])).call.undone(()) if is_opaque(node) else nullcontext()
    try:
        with untouched, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = made.arguments(node)
            return all(_apart(node, given, made.of[source], axis) for axis in axes)
    except Exception:
        # Whatever an operator does on noise, it says nothing of the model.
        return False


def _apart(node: fx.Node, given: Any, value: torch.Tensor, axis: int) -> bool:
    before = _run(node, given)
    changed = value.clone()
    changed.select(axis, 0).add_(1.0)
    after = _run(node, pytree.tree_map(lambda x: changed if x is value else x, given))
    if before.shape != value.shape or value.shape[axis] < 2:
        return False
    rest = [t.narrow(axis, 1, t.shape[axis] - 1) for t in (before, after)]
    return torch.equal(*rest) and not torch.equal(before, after)


def _run(node: fx.Node, given: Any) -> torch.Tensor:
    args, kwargs = given
    assert callable(node.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = pytree.tree_leaves(node.target(*args, **kwargs))[0]
    assert isinstance(found, torch.Tensor)
    return found


class _Noise:
    """Arguments for an operator: weights as they are, noise for values, sizes as in the example."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[fx.Node, torch.Tensor] = {}

    def arguments(self, node: fx.Node) -> Any:
        if _writes(node):
            raise ValueError("it writes to what it reads")
        return fx.map_arg((node.args, node.kwargs), self._value)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.program.tensors[str(node.target)]
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor):
            return _number(val)
        if node not in self.of:
            if not val.dtype.is_floating_point:
                raise ValueError("it reads integers")
            shape = [_number(size) for size in val.shape]
            self.of[node] = torch.randn(shape, dtype=val.dtype, device=val.device)
        return self.of[node]


def _number(size: Any) -> Any:
    return size if isinstance(size, (int, float, bool)) else int(size.node.hint)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return not schema_names(node.target) or schema is None or schema.is_mutable
