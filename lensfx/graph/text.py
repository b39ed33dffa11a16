"""A stable text form of a graph: one line a node, names renumbered, arguments by schema name."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from lensfx.graph.node import arguments, module_path, op_name, schema_names, value_of

__all__ = ["expression_text", "graph_diff", "graph_text"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}
_SIZE = partial(sympy.Symbol, integer=True, positive=True)


def graph_text(graph: fx.Graph) -> str:
    """The graph as text that is the same for the same computation, whatever its node names.

    Example line: `%3 = layer_norm(%1, normalized_shape=[8], weight=%2)  # f64[1,4,8]  h.0.ln_1`.
    """
    numbers: dict[fx.Node, str] = {}
    symbols: dict[str, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {_form(node.args[0], numbers)}")
            continue
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{numbers[node]} = {_call(node, numbers)}{_tail(node, symbols)}")
    return "\n".join(lines)


def graph_diff(before: fx.Graph, after: fx.Graph) -> str:
    """The lines that differ between two graphs, as a unified diff of their texts."""
    a, b = graph_text(before).splitlines(), graph_text(after).splitlines()
    return "\n".join(difflib.unified_diff(a, b, "before", "after", lineterm=""))


def expression_text(root: fx.Node) -> str:
    """A parameter expression in one line: `mul(h.0.attn.weight, h.0.ln.weight)`."""
    if root.op == "get_attr":
        return str(root.target)
    names: dict[fx.Node, str] = {}
    for node in root.all_input_nodes:
        names[node] = expression_text(node)
    given = [_form(a, names) for a in root.args]
    given += [f"{k}={_form(v, names)}" for k, v in root.kwargs.items()]
    return f"{op_name(root)}({', '.join(given)})"


def _call(node: fx.Node, numbers: dict[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return f"input {node.target}"
    if node.op == "get_attr":
        return str(node.target)
    if not schema_names(node.target):
        given = [_form(a, numbers) for a in node.args]
        given += [f"{k}={_form(v, numbers)}" for k, v in node.kwargs.items()]
        return f"{op_name(node)}({', '.join(given)})"
    shown: list[str] = []
    schema: Any = node.target
    for declared, (name, value) in zip(
        schema._schema.arguments, arguments(node).items(), strict=True
    ):
        default = declared.has_default_value() and _plain(value, declared.default_value)
        if default:
            continue
        text = _form(value, numbers)
        leading = len(shown) == 0 and isinstance(value, fx.Node)
        shown.append(text if leading else f"{name}={text}")
    return f"{op_name(node)}({', '.join(shown)})"


def _plain(value: Any, default: Any) -> bool:
    return not isinstance(value, fx.Node) and type(value) is type(default) and value == default


def _form(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_form(v, numbers) for v in value) + "]"
    return repr(value)


def _tail(node: fx.Node, symbols: dict[str, str]) -> str:
    val = value_of(node)
    parts = []
    if isinstance(val, torch.Tensor):
        sizes = ",".join(_size(s, symbols) for s in val.shape)
        parts.append(f"{_DTYPES.get(val.dtype, str(val.dtype))}[{sizes}]")
    path = module_path(node)
    if path:
        parts.append(path)
    return "  # " + "  ".join(parts) if parts else ""


def _size(size: Any, symbols: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    expr = size.node.expr
    given = sorted(expr.free_symbols, key=str)
    # Renamed before it is printed: sympy orders a product by the names of its factors.
    renamed = {s: _SIZE(symbols.setdefault(str(s), f"n{len(symbols)}")) for s in given}
    text = str(expr.xreplace(renamed))
    return text if text.isidentifier() else f"({text})"
