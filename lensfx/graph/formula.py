"""A parameter expression of a graph on its own: what it reads, and how it follows from that."""

from __future__ import annotations

from torch import fx

from lensfx.graph.program import Formula
from lensfx.graph.text import expression_text

__all__ = ["formula_of"]


def formula_of(name: str, root: fx.Node) -> Formula:
    """The expression that `root` computes from stored tensors, as a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed: dict[fx.Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed[node] = None
            stack.extend(node.all_input_nodes)
    for node in sorted(needed):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output((copies[root],))
    sources = tuple(dict.fromkeys(str(n.target) for n in sorted(needed) if n.op == "get_attr"))
    return Formula(name, expression_text(root), sources, graph)
