"""Native names: the module path and the operator of every value, given once and kept."""

from __future__ import annotations

from torch import fx

from lensfx.graph.node import module_path, op_name, value_of

__all__ = ["free_name", "name_nodes", "native_name"]


def native_name(node: fx.Node) -> str:
    """The node's own name, `h.0.attn.c_attn.linear`; empty for what is no value of the model."""
    return str(node.meta.get("native", ""))


def free_name(wanted: str, taken: dict[str, int]) -> str:
    """`wanted`, or `wanted_1`, `wanted_2` ... if it is taken; the result is added to `taken`.

    `taken` maps each name to the last number tried behind it, so that many nodes of one name cost
    no more than few.
    """
    name, i = wanted, taken.get(wanted, 0)
    while name in taken:
        i += 1
        name = f"{wanted}_{i}"
    taken[wanted] = i
    taken.setdefault(name, 0)
    return name


def name_nodes(graph: fx.Graph) -> None:
    """Give every unnamed operator node its native name; names that exist stay as they are."""
    taken = dict.fromkeys((native_name(n) for n in graph.nodes), 0)
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or native_name(node) or value_of(node) is None:
            continue
        path = module_path(node)
        wanted = f"{path}.{op_name(node)}" if path else op_name(node)
        seen = counts.get(wanted, 0)
        counts[wanted] = seen + 1
        node.meta["native"] = free_name(f"{wanted}_{seen}" if seen else wanted, taken)
