"""A program as a GraphModule that is called and answers as the model does."""

from __future__ import annotations

import re

from torch import fx

from lensfx.graph.names import free_name
from lensfx.graph.program import Program, copy_graph

__all__ = ["as_module"]


def as_module(program: Program) -> fx.GraphModule:
    """A GraphModule with the example call's own split of positional and keyword arguments.

    It shares the program's tensors, holds hook points as identity calls, has no guards and is
    taken whole by torch.compile.
    """
    graph, _ = copy_graph(program.graph)
    signature = program.signature
    _take_constants(graph, [leaf.is_tensor for leaf in signature.leaves])
    taken: dict[str, int] = {}
    names = [
        # `*args[0]` is no name that a function can have.
        free_name(re.sub(r"\W+", "_", name).strip("_"), taken)
        for name in (*signature.positional, *signature.keywords)
    ]
    info = fx.graph._PyTreeInfo(names, signature.in_spec, signature.out_spec)
    named = {n.target: program.tensors[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    graph.set_codegen(fx.graph._PyTreeCodeGen(info))
    module = fx.GraphModule(named, graph)
    module.training = False
    return module


def _take_constants(graph: fx.Graph, tensors: list[bool]) -> None:
    """Give the leaves that were baked in their places in the argument tree."""
    inputs = iter([n for n in graph.nodes if n.op == "placeholder"])
    here = graph._root
    for i, is_tensor in enumerate(tensors):
        if is_tensor:
            here = next(inputs)
        else:
            with graph.inserting_after(here):
                here = graph.placeholder(f"constant_{i}")
