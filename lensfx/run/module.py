"""A program as a GraphModule that is called and answers as the model does."""

from __future__ import annotations

from torch import fx

from lensfx.graph.program import Program, copy_graph

__all__ = ["as_module"]


def as_module(program: Program) -> fx.GraphModule:
    """A GraphModule with the example call's own split of positional and keyword arguments.

    It shares the program's tensors, holds hook points as identity calls, has no guards and is
    taken whole by torch.compile.
    """
    graph, _ = copy_graph(program.graph)
    placeholders = iter([n for n in graph.nodes if n.op == "placeholder"])
    signature = program.signature
    here = next(iter(graph.nodes), None)
    for leaf in signature.leaves:
        if leaf.is_tensor:
            here = next(placeholders)
            continue
        # A baked constant still takes its place in the argument tree.
        inserting = (
            graph.inserting_before(here) if _first(graph, here) else graph.inserting_after(here)
        )
        with inserting:
            here = graph.placeholder(f"constant_{len(graph.nodes)}")
    info = fx.graph._PyTreeInfo(
        [n.name for n in graph.nodes if n.op == "placeholder"],
        signature.in_spec,
        signature.out_spec,
    )
    named = {n.target: program.tensors[str(n.target)] for n in graph.nodes if n.op == "get_attr"}
    graph.set_codegen(fx.graph._PyTreeCodeGen(info))
    module = fx.GraphModule(named, graph)
    module.training = False
    return module


def _first(graph: fx.Graph, node: fx.Node | None) -> bool:
    return node is not None and node is next(iter(graph.nodes)) and node.op != "placeholder"
