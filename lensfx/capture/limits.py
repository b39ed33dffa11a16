"""Limits on sizes that operators imply and torch finds no guard for.

Positions counted from a size index a learned table of so many rows: an input that is too long would
die of an IndexError inside. Attention reads as many values as there are keys, whether or not there
are so many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from lensfx.graph.guards import Guards, Limit
from lensfx.graph.node import argument, is_op, schema_names, shape_of, source_line
from lensfx.graph.ops import CASTS, VIEWS

__all__ = ["attention_lengths", "index_limits"]

aten = torch.ops.aten
# A slice of a count ends earlier than the count does.
_CUTS = (aten.slice.Tensor, aten.select.int, aten.index.Tensor)
_VIEWS = tuple(v for v in VIEWS if v not in _CUTS)
_SAME = (*CASTS, *_VIEWS, aten.clone.default, aten.repeat.default, aten.expand_as.default)
_ATTENTION = aten.scaled_dot_product_attention.default
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def index_limits(graph: fx.Graph, guards: Guards) -> list[Limit]:
    """A limit for each table indexed by a count that a call's sizes decide."""
    places = {str(a.symbol): f"t[{a.leaf}].shape[{a.axis}]" for a in reversed(guards.dynamic)}
    found: dict[str, Limit] = {}
    for node in graph.nodes:
        for table, index in _lookups(node):
            count, rows = _count(index), (shape_of(table) or (None,))[0]
            if not isinstance(count, torch.SymInt) or not isinstance(rows, int):
                continue
            symbols = {str(s) for s in count.node.expr.free_symbols}
            if not symbols or not symbols <= places.keys():
                continue
            code = PythonPrinter().doprint(count.node.expr)
            for symbol in symbols:
                code = code.replace(symbol, places[symbol])
            name = str(table.target) if table.op == "get_attr" else f"%{table.name}"
            found.setdefault(f"{code} {name}", Limit(code, rows, name, source_line(node)))
    return list(found.values())


def attention_lengths(graph: fx.Graph) -> list[str]:
    """That values are as many as keys, where they were: torch's shape rule never compares them."""
    found = []
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        keys, values = (_length(argument(node, name)) for name in ("key", "value"))
        if keys[0] != values[0] and keys[1] == values[1] is not None:
            left, right = (PythonPrinter().doprint(n) for n in (keys[0], values[0]))
            found.append(f"{left} == {right}")
    return list(dict.fromkeys(found))


def _length(node: fx.Node) -> tuple[Any, int | None]:
    """How many rows the value has, over torch's symbols and in the example that was traced."""
    size = (shape_of(node) or ())[-2]
    return (size.node.expr, size.node.hint) if isinstance(size, torch.SymInt) else (size, size)


def _lookups(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Tables and what indexes their rows."""
    if is_op(node, aten.embedding.default):
        pair = argument(node, "weight"), argument(node, "indices")
    elif is_op(node, aten.index_select.default) and argument(node, "dim") == 0:
        pair = argument(node, "self"), argument(node, "index")
    elif is_op(node, aten.index.Tensor) and argument(node, "indices"):
        pair = argument(node, "self"), argument(node, "indices")[0]
    else:
        return
    if all(isinstance(n, fx.Node) for n in pair):
        yield pair


def _count(node: fx.Node) -> Any:
    """One more than the largest number in `node`, where it is counted off from a size."""
    plus: Any = 0
    while True:
        if is_op(node, *_ARANGES):
            step = argument(node, "step") if "step" in schema_names(node.target) else 1
            end = argument(node, "end")
            end = end.meta.get("val") if isinstance(end, fx.Node) else end
            return end + plus if step == 1 and isinstance(end, (int, torch.SymInt)) else None
        if is_op(node, aten.add.Tensor) and _is_whole(node.args[1]):
            plus = plus + node.args[1]
        elif not is_op(node, *_SAME):
            return None
        inner: Sequence[Any] = node.args
        if not inner or not isinstance(inner[0], fx.Node):
            return None
        node = inner[0]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
