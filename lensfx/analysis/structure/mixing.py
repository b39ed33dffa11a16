"""How the nodes of a branch join positions."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from lensfx.analysis.structure.labels import Labels
from lensfx.graph.node import op_name

__all__ = ["mixing"]

# Tokens sent to their experts and back again: each comes back to its own place.
_DISPATCH = frozenset({"index_add", "histc", "topk", "one_hot", "bincount"})
_ROUTED = frozenset({"sort", "gather", "scan", "reduce", "slice", "select", "split", "unknown"})


def mixing(labels: Labels, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """How the nodes of a branch join positions, each way once; empty if they do not.

    `batch` if they join examples, which is no work of a position alone either.
    """
    nodes = list(nodes)
    found = [m.kind for n in nodes for m in labels.position_mixes(n)]
    joined = [m for n in nodes for m in labels.mixed.get(n, []) if m.labels & labels.batch]
    if any(m.kind in ("softmax", "contract") for m in joined):
        found.append("batch")
    routed = any(op_name(n) in _DISPATCH or "grouped_mm" in str(n.target) for n in nodes)
    return tuple(dict.fromkeys(k for k in found if not (routed and k in (*_ROUTED, "batch"))))
