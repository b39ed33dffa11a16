"""Guards on the values that chose the captured path, placed in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lensfx.capture.decide import Decision
from lensfx.graph.choice import choices, decided, decided_size
from lensfx.graph.compiled import closure
from lensfx.graph.node import source_line
from lensfx.graph.ops import is_random

__all__ = ["drop_settled", "guard_path"]

# Torch's name for a tensor that was made from numbers in the code.
_LITERAL = "lifted_tensor_"


def guard_path(graph: fx.Graph, value: Any, decision: Decision, index: int) -> None:
    """Check right behind `value` that it is what the captured path was taken for."""
    if not isinstance(value, fx.Node):
        return
    target = decided if isinstance(value.meta.get("val"), torch.Tensor) else decided_size
    with graph.inserting_after(value):
        site = decision.site or source_line(value)
        node = graph.call_function(target, (value, decision.value, site, index))
    node.meta = {**value.meta, "val": None}


def drop_settled(graph: fx.Graph) -> None:
    """Take out the guards on values that every call computes from the same numbers.

    Numbers written into the code are no state, although torch keeps them as tensors.
    """
    for node in choices(graph):
        known = closure([node])
        if not any(n.op == "placeholder" or _is_state(n) or is_random(n) for n in known):
            graph.erase_node(node)


def _is_state(node: fx.Node) -> bool:
    return node.op == "get_attr" and not str(node.target).startswith(_LITERAL)
