"""A program as a networkx graph: one node a value, one edge a read, labelled by argument name."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import fx

from lensfx.graph.names import native_name
from lensfx.graph.node import arguments, is_weight, module_path, op_name, source_line, value_of
from lensfx.graph.program import Program

__all__ = ["to_networkx"]


def to_networkx(program: Program) -> nx.MultiDiGraph:
    """The computation as a directed multigraph from inputs and parameters to outputs.

    Nodes carry `op`, `path`, `line`, `shape` (text, symbols where dynamic), `dtype` and `weight`;
    edges carry `argument`, the schema name by which the reader reads.
    """
    graph = nx.MultiDiGraph()
    names = {n: _name(n) for n in program.graph.nodes}
    for node, name in names.items():
        graph.add_node(name, **_facts(node))
    for node, name in names.items():
        for argument, source in _reads(node):
            graph.add_edge(names[source], name, argument=argument)
    return graph


def _name(node: fx.Node) -> str:
    if node.op in ("get_attr", "placeholder"):
        return str(node.target)
    return native_name(node) or node.name


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
        fx.node.map_arg(value, lambda n, name=name: found.append((name, n)))
    return found
