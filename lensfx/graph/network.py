"""A program as a networkx graph: one node a value, one edge a read, labelled by argument name."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import fx

from lensfx.graph.names import free_name, native_name
from lensfx.graph.node import arguments, is_weight, module_path, op_name, source_line, value_of
from lensfx.graph.ops import is_hook
from lensfx.graph.program import Program

__all__ = ["to_networkx"]


def to_networkx(program: Program) -> nx.MultiDiGraph:
    """The computation as a directed multigraph from inputs and parameters to outputs.

    Nodes carry `op`, `path`, `line`, `shape` (text, symbols where dynamic), `dtype` and `weight`;
    edges carry `argument`, the schema name by which the reader reads.
    """
    graph = nx.MultiDiGraph()
    names = _names(program.graph)
    for node in program.graph.nodes:
        graph.add_node(names[node], **_facts(node))
    for node in program.graph.nodes:
        for argument, source in _reads(node):
            graph.add_edge(names[source], names[node], argument=argument)
    return graph


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A name for every value: an operator's own, and for an input one that no operator has."""
    names: dict[fx.Node, str] = {}
    stored: dict[str, str] = {}
    taken: dict[str, int] = {}
    for node in sorted(graph.nodes, key=lambda n: n.op != "call_function"):
        if node.op == "call_function":
            own = str(node.args[1]) if is_hook(node) else native_name(node) or node.name
        else:
            own = str(node.target)
        if node.op == "get_attr" and own in stored:
            names[node] = stored[own]
            continue
        names[node] = free_name(own, taken)
        if node.op == "get_attr":
            stored[own] = names[node]
    return names


def _facts(node: fx.Node) -> dict[str, Any]:
    val = value_of(node)
    tensor = isinstance(val, torch.Tensor)
    return {
        "op": op_name(node),
        "path": module_path(node),
        "line": source_line(node),
        "shape": "[" + ", ".join(str(s) for s in val.shape) + "]" if tensor else "",
        "dtype": str(val.dtype) if tensor else "",
        "weight": is_weight(node),
    }


def _reads(node: fx.Node) -> list[tuple[str, fx.Node]]:
    given: dict[str, Any] = arguments(node) if node.op == "call_function" else {}
    if not given:
        given = {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    found: list[tuple[str, fx.Node]] = []
    for name, value in given.items():
        nodes: list[fx.Node] = []
        fx.node.map_arg(value, nodes.append)
        found += [(name, n) for n in nodes]
    return found
