"""A graph as a plain function, its weights among the arguments: nothing is left behind by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lensfx.graph.node import outputs_of
from lensfx.graph.ops import is_impure

__all__ = ["closure", "compiled", "effects_until", "probe"]


def compiled(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """The graph as a function of its placeholders; call it as `f(None, *values)`.

    Compiled here and not as a GraphModule: each of those leaves an entry in linecache for good.
    """
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<lensfx run>", "exec"), namespace)
    forward: Callable[..., tuple[Any, ...]] = namespace["forward"]
    return forward


def closure(roots: Sequence[fx.Node]) -> set[fx.Node]:
    """The roots and every node they depend on."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def probe(
    graph: fx.Graph, names: Sequence[str], effects: bool = False
) -> tuple[Callable[..., tuple[Any, ...]], tuple[str, ...]]:
    """A function `f(None, *inputs, *weights)` that gives the flat outputs, then the named values.

    Returns it with the names of the weights it takes, in order. With `effects` it also writes and
    draws random numbers as the graph does; without, it does only what its results ask for.
    """
    nodes = list(graph.nodes)
    wanted = {n.name: n for n in nodes}
    results = outputs_of(graph)
    roots = [r for r in results if isinstance(r, fx.Node)] + [wanted[n] for n in names]
    if effects:
        roots += [n for n in nodes if n.op == "call_function" and is_impure(n)]
    return _lifted(graph, closure(roots), (*results, *(wanted[n] for n in names)))


def effects_until(
    graph: fx.Graph, last: fx.Node
) -> tuple[Callable[..., tuple[Any, ...]], tuple[str, ...]]:
    """As `probe`, a function of all that the graph writes, draws and checks up to `last`."""
    nodes = list(graph.nodes)
    before = nodes[: nodes.index(last) + 1]
    return _lifted(graph, closure([n for n in before if n.op != "output" and is_impure(n)]), ())


def _lifted(
    graph: fx.Graph, needed: set[fx.Node], results: Sequence[Any]
) -> tuple[Callable[..., tuple[Any, ...]], tuple[str, ...]]:
    """The needed nodes as a function of the inputs and of the weights they read."""
    nodes, env = list(graph.nodes), {}
    new = fx.Graph()
    for node in nodes:
        if node.op == "placeholder":
            env[node] = new.placeholder(node.name)
    weights = [n for n in nodes if n.op == "get_attr" and n in needed]
    for node in weights:
        env[node] = new.placeholder(node.name)
    for node in nodes:
        if node.op == "call_function" and node in needed:
            env[node] = new.node_copy(node, lambda n: env[n])
    new.output(tuple(env[r] if isinstance(r, fx.Node) else r for r in results))
    return compiled(new), tuple(str(n.target) for n in weights)
