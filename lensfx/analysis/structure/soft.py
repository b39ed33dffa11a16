"""What a gated sum is made of: the values behind products entry by entry and mixes of copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis.structure.flow import Flow
from lensfx.analysis.structure.labels import Labels
from lensfx.graph.node import argument, is_op, op_name, shape_of
from lensfx.graph.ops import VIEWS

__all__ = ["Soft", "leaves"]

aten = torch.ops.aten

_GATES = frozenset({"mul", "div", "where", "lerp"})
_SHIFTS = frozenset({"add", "sub", "rsub", "neg"})
_MIXES = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.linear.default)
_MOST = 16


@dataclass(frozen=True)
class Soft:
    """A value that a gated one is made of, and the values on the way to it, the gated one first."""

    node: fx.Node
    path: tuple[fx.Node, ...]


def leaves(flow: Flow, labels: Labels, node: fx.Node) -> list[Soft]:
    """The values behind gates, scales, views and mixes of copies; at most a handful."""
    found: list[Soft] = []
    seen = {node}
    stack: list[tuple[fx.Node, ...]] = [(node,)]
    while stack and len(seen) <= _MOST:
        path = stack.pop()
        if not _passes(flow, labels, path[-1]):
            found.append(Soft(path[-1], path))
            continue
        for dep in flow.deps[path[-1]]:
            if dep not in seen:
                seen.add(dep)
                stack.append((*path, dep))
    return found


def _passes(flow: Flow, labels: Labels, node: fx.Node) -> bool:
    """Whether a value is another one, entry by entry scaled by others, or a mix of its copies."""
    if node in flow.seeds or not flow.deps[node]:
        return False
    if op_name(node) in _GATES:
        return True
    if is_op(node, *_MIXES):
        return _mixes_copies(labels, node)
    if op_name(node) in _SHIFTS:
        return len(node.all_input_nodes) == 1
    return node.target in VIEWS and len(flow.deps[node]) == 1


def _mixes_copies(labels: Labels, node: fx.Node) -> bool:
    """Whether a product keeps the features of an operand, and contracts no positions."""
    if labels.mixed.get(node):
        return False
    names = "tensors" if is_op(node, aten.einsum.default) else None
    operands = argument(node, names) if names else node.all_input_nodes
    last = labels.axes(node)[-1] if shape_of(node) else ()
    return bool(last) and any(
        labels.axes(n)[-1:] == [last] and len(shape_of(n) or ()) > 2 for n in operands
    )
