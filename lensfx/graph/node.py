"""Read-only facts of one node: arguments by schema name, shape, dtype, module path, source line."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import torch
from torch import fx

__all__ = [
    "argument",
    "arguments",
    "dtype_of",
    "is_op",
    "is_weight",
    "memory_of",
    "module_path",
    "op_name",
    "outputs_of",
    "schema_names",
    "shape_of",
    "source_line",
    "value_of",
    "where",
]

_TORCH_HOME = os.path.dirname(torch.__file__)
_TORCH_MODULES = os.path.join(_TORCH_HOME, "nn", "modules")
_CAPTURE_HOME = os.path.join(os.path.dirname(os.path.dirname(__file__)), "capture")
_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n\s+(?!File ")(?P<code>.*))?'
)


@cache
def _schema(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple((a.name, a.default_value, a.kwarg_only) for a in schema.arguments)


def schema_names(target: Any) -> tuple[str, ...]:
    """The argument names of an operator in schema order; empty for a plain Python function."""
    return tuple(name for name, _, _ in _schema(target))


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator node by schema name, defaults filled in."""
    found: dict[str, Any] = {}
    for i, (name, default, kwarg_only) in enumerate(_schema(node.target)):
        if not kwarg_only and i < len(node.args):
            found[name] = node.args[i]
        else:
            found[name] = node.kwargs.get(name, default)
    return found


def argument(node: fx.Node, name: str) -> Any:
    """One argument of an operator node by schema name, or its default.

    Raises: KeyError if the operator has no such argument.
    """
    for i, (known, default, kwarg_only) in enumerate(_schema(node.target)):
        if known == name:
            if not kwarg_only and i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, default)
    raise KeyError(f"{node.target} has no argument {name!r}")


def is_op(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of these operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def op_name(node: fx.Node) -> str:
    """The short name of what a node does: `layer_norm`, `add`, `getitem`, `placeholder`."""
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else getattr(target, "__name__", str(target))
    return str(name)


def outputs_of(graph: fx.Graph) -> list[Any]:
    """The flat results of a graph: nodes, or constants where a result is none."""
    results: Any = graph.output_node().args[0]
    return list(results)


def value_of(node: fx.Node) -> Any:
    """The fake value that stands for what the node computes, or None."""
    return node.meta.get("val")


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of the node's value, symbolic where it is dynamic; None if it is no tensor."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of the node's value; None if it is no tensor."""
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) else None


def memory_of(node: Any) -> int | None:
    """Which memory the node's fake value lies in, the same for all its views; None if no tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(val, torch.Tensor):
        return None
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(val):
        # Inside vmap a tensor wraps another, which is the one that has memory.
        val = functorch.get_unwrapped(val)
    return int(val.untyped_storage()._cdata)


def is_weight(node: Any) -> bool:
    """Whether a value depends on parameters and constants only; capture and Edit keep the mark."""
    return isinstance(node, fx.Node) and bool(node.meta.get("weight"))


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made the node, `h.0.attn`; empty for the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return str(next(reversed(stack.values()))[0])


def source_line(node: fx.Node) -> str:
    """The user's own line that made the node, `model.py:42  x = self.ln(x)`; empty if unknown."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [f for f in frames if not f["file"].startswith((_TORCH_HOME, _CAPTURE_HOME))]
    own = own or [f for f in frames if f["file"].startswith(_TORCH_MODULES)]
    if not own:
        return ""
    frame = own[-1]
    code = (frame["code"] or "").strip()
    return f"{os.path.basename(frame['file'])}:{frame['line']}  {code}".rstrip()


def where(node: fx.Node) -> str:
    """One line that says which node this is: name, module path, the user's source line."""
    parts = (f"%{node.name}", module_path(node), source_line(node))
    return "  ".join(p for p in parts if p)
