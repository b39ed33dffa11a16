"""How each operator moves the labels of axes, and what it mixes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import is_one
from lensfx.analysis.contraction import letters
from lensfx.analysis.structure.label_common import (
    Rule,
    broadcast,
    dims,
    operand,
    shape_before,
    shortened,
)
from lensfx.analysis.structure.label_views import VIEW_RULES
from lensfx.analysis.structure.labels import Axes, Axis, Labels
from lensfx.analysis.structure.probe import keeps_apart
from lensfx.graph.node import argument, is_op, schema_names, shape_of
from lensfx.graph.ops import CASTS, is_hook

__all__ = ["RULES", "other"]

aten = torch.ops.aten


def other(labels: Labels, node: fx.Node) -> Any:
    """An operator without a rule: entry by entry if torch says so, else all that it reads mixes."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return broadcast(labels, node)
    if "grouped_mm" in str(node.target):
        return _grouped(labels, node)
    if node.op != "call_function" or node.target is operator.getitem or is_hook(node):
        return broadcast(labels, node)
    if node in labels.flow.given:
        return _asked(labels, node)
    return None


def _asked(labels: Labels, node: fx.Node) -> Any:
    """An operator nothing is known about: what it does to noise, or all that it reads mixes."""
    live = [n for n in node.all_input_nodes if n in labels.flow.live]
    axes = labels.axes(live[0]) if live else []
    along = [d for d, axis in enumerate(axes) if any(map(labels.is_sequence, axis))]
    if len(live) == 1 and along and keeps_apart(labels.flow.program, node, live[0], along):
        kept = [axis if d in along else () for d, axis in enumerate(axes)]
        many = node.meta["val"]
        return kept if isinstance(many, torch.Tensor) else [kept, *map(labels.unknown, many[1:])]
    for n in node.all_input_nodes:
        labels.mix(node, "unknown", (a for axis in labels.axes(n) for a in axis))
    return None


def _lookup(labels: Labels, node: fx.Node) -> Axes:
    ids = argument(node, "indices")
    return [*labels.axes(ids), *labels.unknown(argument(node, "weight").meta["val"])[1:]]


def _linear(labels: Labels, node: fx.Node) -> Axes | None:
    x, weight = argument(node, "input"), argument(node, "weight")
    axes = labels.axes(x)
    rank = len(shape_of(node) or ())
    if not axes or not rank:
        return None
    labels.mix(node, "contract", axes[-1])
    rows = [] if len(shape_of(weight) or ()) == 1 else [labels.axes(weight)[0]]
    return [*axes[:-1], *rows]


def _matmul(labels: Labels, node: fx.Node) -> Axes | None:
    a, b = [n for n in node.args if isinstance(n, fx.Node)][-2:]
    left, right = labels.axes(a), labels.axes(b)
    if not left or not right:
        return None
    labels.mix(node, "contract", left[-1])
    labels.mix(node, "contract", right[-2] if len(right) > 1 else right[-1])
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else []
    lead = _lead(labels, (a, left[:-2]), (b, right[:-2]))
    return [*lead, *rows, *columns]


def _lead(labels: Labels, *sides: tuple[fx.Node, Axes]) -> Axes:
    """The batch axes of a product, from the side that has them; the left one names them."""
    rank = max(len(axes) for _, axes in sides)
    found: Axes = []
    for i in range(rank):
        options = [axes[i - rank + len(axes)] for _, axes in sides if i - rank + len(axes) >= 0]
        known = [o for o in options if any(map(labels.is_sequence, o))]
        found.append(next(iter([*known, *(o for o in options if o)]), ()))
    return found


def _sdpa(labels: Labels, node: fx.Node) -> Axes:
    query, key, value = (labels.axes(argument(node, n)) for n in ("query", "key", "value"))
    labels.mix(node, "contract", key[-2])
    labels.mix(node, "contract", value[-2])
    return [*query[:-1], value[-1]]


def _einsum(labels: Labels, node: fx.Node) -> Axes | None:
    operands = list(argument(node, "tensors"))
    parsed = letters(str(argument(node, "equation")), operands)
    if parsed is None:
        return None
    *terms, out = parsed
    named: dict[str, Axis] = {}
    for term, value in zip(terms, operands, strict=True):
        for letter, axis in zip(term, labels.axes(value), strict=True):
            known = any(map(labels.is_sequence, named.get(letter, ())))
            if not named.get(letter) or (not known and any(map(labels.is_sequence, axis))):
                named[letter] = axis
            if letter not in out:
                labels.mix(node, "contract", axis)
    return [named[letter] for letter in out]


def _reduce(kind: str) -> Rule:
    def rule(labels: Labels, node: fx.Node) -> Any:
        axes, over = labels.axes(operand(node)), dims(node)
        for d in over:
            labels.mix(node, kind, axes[d])
        kept = bool(argument(node, "keepdim")) if "keepdim" in schema_names(node.target) else False
        found = [() if d in over else a for d, a in enumerate(axes) if kept or d not in over]
        return (
            found if isinstance(node.meta["val"], torch.Tensor) else [found] * len(node.meta["val"])
        )

    return rule


def _along(kind: str) -> Rule:
    """Softmax, scans, shifts: the same axes, joined along one."""

    def rule(labels: Labels, node: fx.Node) -> Any:
        axes = labels.axes(operand(node))
        for d in dims(node, "dims" if "dims" in schema_names(node.target) else "dim"):
            if axes:
                labels.mix(node, kind, axes[d])
        if isinstance(node.meta["val"], torch.Tensor):
            return axes
        shapes = [tuple(v.shape) for v in node.meta["val"]]
        return [
            [
                a if str(s) == str(b) else labels.by_size(s)
                for a, s, b in zip(axes, shape, shape_before(node), strict=True)
            ]
            for shape in shapes
        ]

    return rule


def _gather(labels: Labels, node: fx.Node) -> Axes:
    index = argument(node, "index")
    at = dims(node)[0]
    axes = labels.axes(operand(node))
    labels.mix(node, "gather", axes[at])
    if is_op(node, aten.index_select.default):
        return [*axes[:at], *labels.axes(index), *axes[at + 1 :]]
    picked = labels.axes(index)
    return [a if d != at else picked[d] for d, a in enumerate(axes)]


def _index(labels: Labels, node: fx.Node) -> Axes | None:
    source = operand(node)
    axes, given = labels.axes(source), argument(node, "indices")
    picked = [(d, i) for d, i in enumerate(given) if i is not None]
    if not picked or any(i.meta["val"].dtype in (torch.bool, torch.uint8) for _, i in picked):
        return None
    for d, _ in picked:
        labels.mix(node, "gather", axes[d])
    width = max(len(shape_of(i) or ()) for _, i in picked)
    block: Axes = [()] * width
    for _, i in picked:
        for k, axis in enumerate(labels.axes(i)):
            block[k + width - len(labels.axes(i))] = block[k + width - len(labels.axes(i))] or axis
    places = [d for d, _ in picked]
    rest = [a for d, a in enumerate(axes) if d not in places]
    adjacent = places == list(range(places[0], places[0] + len(places)))
    at = places[0] if adjacent else 0
    return [*rest[:at], *block, *rest[at:]]


def _written(labels: Labels, node: fx.Node) -> Axes:
    """scatter, index_put, slice_scatter: the axes of what is written into."""
    axes = list(labels.axes(operand(node)))
    for n in ("src", "values", "source"):
        given = argument(node, n) if n in schema_names(node.target) else None
        if isinstance(given, fx.Node):
            other = labels.axes(given)
            if len(other) == len(axes):
                for d, axis in enumerate(other):
                    if any(map(labels.is_sequence, axis)) and not any(
                        map(labels.is_sequence, axes[d])
                    ):
                        axes[d] = axis
    return axes


def _convolve(labels: Labels, node: fx.Node) -> Axes | None:
    x = argument(node, "input")
    weight = argument(node, "weight")
    axes, kernel = labels.axes(x), (shape_of(weight) or ())[2:]
    out = shape_of(node) or ()
    lead = len(out) - len(kernel) - 1
    for k, size in enumerate(kernel):
        if not is_one(size):
            labels.mix(node, "conv", axes[lead + 1 + k])
    labels.mix(node, "contract", axes[lead])
    moved = [
        axes[lead + 1 + k] if any(map(labels.is_sequence, axes[lead + 1 + k])) else ()
        for k in range(len(kernel))
    ]
    moved = [m or labels.by_size(out[lead + 1 + k]) for k, m in enumerate(moved)]
    kept = [_resized(labels, m, out[lead + 1 + k]) for k, m in enumerate(moved)]
    return [*axes[:lead], (labels.fresh(out[lead]),), *kept]


def _resized(labels: Labels, axis: Axis, size: Any) -> Axis:
    return (
        axis
        if len(axis) == 1 and not is_one(size) and axis[0].size == labels.fresh(size).size
        else shortened(labels, axis, size)
    )


def _shift(labels: Labels, node: fx.Node) -> Axes:
    """Padding: the axes it makes longer are mixed, if they run along positions."""
    axes, before, after = (
        labels.axes(operand(node)),
        shape_before(node),
        shape_of(node) or (),
    )
    found = []
    for axis, a, b in zip(axes, before, after, strict=True):
        same = str(a) == str(b)
        if not same:
            labels.mix(node, "pad", axis)
        found.append(axis if same else shortened(labels, axis, b))
    return found


def _pooled(labels: Labels, node: fx.Node) -> Axes:
    """Pooling and resampling: neighbours along the last axes are joined."""
    axes, after = list(labels.axes(operand(node))), shape_of(node) or ()
    for d in range(2, len(axes)) if len(axes) > 2 else ():
        labels.mix(node, "conv", axes[d])
        axes[d] = _resized(labels, axes[d], after[d])
    return axes


def _norm(labels: Labels, node: fx.Node) -> Axes:
    axes = labels.axes(operand(node))
    if "normalized_shape" in schema_names(node.target):
        for axis in axes[len(axes) - len(argument(node, "normalized_shape")) :]:
            labels.mix(node, "reduce", axis)
    return axes


def _same(labels: Labels, node: fx.Node) -> Axes:
    return labels.axes(operand(node))


def _grouped(labels: Labels, node: fx.Node) -> Axes:
    rows = labels.axes(operand(node))
    return [*rows[:-1], labels.by_size((shape_of(node) or ())[-1])]


def _table() -> dict[Any, Rule]:
    found: dict[Any, Rule] = dict.fromkeys(CASTS, _same)
    for packet, rule in _BY_NAME.items():
        op = getattr(aten, packet, None)
        for overload in op.overloads() if op is not None else ():
            # The larger of two tensors is taken entry by entry.
            found[getattr(op, overload)] = broadcast if overload == "other" else rule
    return found


_BY_NAME: dict[str, Rule] = {
    **VIEW_RULES,
    "embedding": _lookup,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _matmul),
    "scaled_dot_product_attention": _sdpa,
    "einsum": _einsum,
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod"),
        _reduce("reduce"),
    ),
    **dict.fromkeys(
        ("argmax", "argmin", "norm", "linalg_vector_norm", "any", "all"), _reduce("reduce")
    ),
    "logsumexp": _reduce("reduce"),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_safe_softmax"), _along("softmax")),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "logcumsumexp"), _along("scan")),
    **dict.fromkeys(("flip", "roll"), _along("shift")),
    **dict.fromkeys(("sort", "topk", "argsort"), _along("sort")),
    **dict.fromkeys(("gather", "index_select", "take_along_dim"), _gather),
    "index": _index,
    **dict.fromkeys(
        ("scatter", "scatter_add", "index_put", "index_add", "index_copy", "slice_scatter"),
        _written,
    ),
    **dict.fromkeys(("select_scatter", "masked_scatter", "scatter_reduce", "index_fill"), _written),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolve),
    **dict.fromkeys(("pad", "constant_pad_nd"), _shift),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"), _pooled),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _pooled),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d"), _pooled),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d"), _pooled),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("group_norm", "batch_norm", "instance_norm", "masked_fill"), _same),
    **dict.fromkeys(("tril", "triu", "dropout", "feature_dropout", "alpha_dropout"), _same),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias", "lift_fresh_copy"), _same),
    **dict.fromkeys(("where", "nan_to_num", "gelu", "prelu", "softplus", "_to_copy"), broadcast),
    **dict.fromkeys(("leaky_relu", "elu", "celu", "mish", "hardtanh", "clamp"), broadcast),
    **dict.fromkeys(("hardswish", "hardsigmoid", "logsigmoid", "log_sigmoid"), broadcast),
    **dict.fromkeys(("_grouped_mm",), _grouped),
}
RULES: dict[Any, Rule] = _table()
