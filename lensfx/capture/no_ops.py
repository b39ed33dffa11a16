"""Drop what computes nothing: eval dropout, identity casts, full slices, views that keep shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lensfx.graph.node import argument, arguments, is_op, memory_of
from lensfx.graph.ops import DROPOUTS, writes

__all__ = ["drop_no_ops"]

aten = torch.ops.aten


def drop_no_ops(graph: fx.Graph) -> None:
    """Rewire the readers of every no-op to its input, and spell every view as `reshape`.

    The graph must be functional: then an alias and its base cannot be told apart, save by those
    who get a result, and where a trailing write changes the base before it is returned.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    written = {memory_of(n.args[0]) for n in calls if writes(n)}
    for node in calls:
        _respell(node)
        if node.target not in _COPIES and _is_no_op(node):
            _drop(node)
    for node in calls:
        if is_op(node, *_COPIES) and _is_no_op(node):
            returned = any(u.op == "output" for u in node.users)
            if returned or memory_of(node.args[0]) in written:
                node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
            else:
                _drop(node)


def _is_no_op(node: fx.Node) -> bool:
    rule = _NO_OPS.get(node.target)
    return rule is not None and rule(node)


def _drop(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _respell(node: fx.Node) -> None:
    if is_op(node, aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
    elif is_op(node, aten.to.dtype):
        # `copy` was asked for while tracing only, to keep identity casts apart.
        node.args = (node.args[0], argument(node, "dtype"))
        node.kwargs = {}


def _val(node: Any) -> torch.Tensor | None:
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def _unchanged(node: fx.Node) -> bool:
    """Whether output and input have the same shape, dtype and device."""
    a, b = _val(node), _val(node.args[0])
    if a is None or b is None or a.dtype != b.dtype or a.device != b.device or a.ndim != b.ndim:
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def _plain_copy(node: fx.Node) -> bool:
    if argument(node, "memory_format") not in (None, torch.preserve_format):
        return False
    a, b = _val(node), _val(node.args[0])
    if a is None or b is None or not _unchanged(node):
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.stride(), b.stride(), strict=True))


def _gradless(node: fx.Node) -> bool:
    source: Any = node.args[0]
    while is_op(source, *_COPIES):
        source = source.args[0]
    val = _val(source)
    return val is not None and source.op == "get_attr" and not val.requires_grad


def _always(node: fx.Node) -> bool:
    return True


def _eval_dropout(node: fx.Node) -> bool:
    return not argument(node, "train")


def _full_slice(node: fx.Node) -> bool:
    given = arguments(node)
    end = given["end"]
    whole = end is None or (isinstance(end, int) and end >= 2**62)
    return given["start"] in (0, None) and given["step"] == 1 and (whole or _unchanged(node))


_COPIES = (aten.clone.default, aten.lift_fresh_copy.default)
_NO_OPS: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(DROPOUTS, _eval_dropout),
    aten.alias.default: _always,
    aten.detach.default: _gradless,
    aten.lift_fresh_copy.default: _always,
    aten.lift_fresh.default: _always,
    aten.clone.default: _plain_copy,
    aten.to.dtype: _unchanged,
    aten.to.dtype_layout: _unchanged,
    aten.to.device: _unchanged,
    aten.to.other: _unchanged,
    aten._to_copy.default: _unchanged,
    aten.type_as.default: _unchanged,
    aten.reshape.default: _unchanged,
    aten.reshape_as.default: _unchanged,
    aten.view_as.default: _unchanged,
    aten.flatten.using_ints: _unchanged,
    aten.expand.default: _unchanged,
    aten.expand_as.default: _unchanged,
    aten.broadcast_to.default: _unchanged,
    aten.slice.Tensor: _full_slice,
}
