"""Tables of what operators do: commute, view, read only sizes, write, draw random numbers."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import torch
from torch import fx

from lensfx.graph.choice import is_choice
from lensfx.graph.layout import PLAIN, Layout
from lensfx.graph.node import argument, is_op, schema_names
from lensfx.graph.opaque import is_opaque

__all__ = [
    "CASTS",
    "COMMUTATIVE",
    "DROPOUTS",
    "METADATA_READS",
    "VIEWS",
    "constructs",
    "data_inputs",
    "hook_layout",
    "hook_point",
    "is_hook",
    "is_impure",
    "is_random",
    "readers",
    "reads_data",
    "writes",
    "written_tensors",
]

aten = torch.ops.aten
T = TypeVar("T")


def hook_point(value: T, name: str, layout: tuple[Any, ...] | None = None) -> T:
    """The value itself: an identity that gives a place in the graph the canonical name `name`.

    `layout` holds the splits and the order of a `Layout` where hooks see other axes.
    """
    return value


def hook_layout(node: fx.Node) -> Layout:
    """How the hooks at a hook point see its value."""
    given: Any = node.args[2] if len(node.args) > 2 else None
    if given is None:
        return PLAIN
    splits, order = given
    return Layout(tuple((axis, tuple(sizes)) for axis, sizes in splits), tuple(order))


COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.logical_and.default,
        aten.logical_or.default,
    }
)

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.index.Tensor,
        aten.contiguous.default,
        aten.alias.default,
    }
)

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten.type_as.default,
        aten._to_copy.default,
    }
)

DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)

# Operators that read an argument's sizes, dtype or device but none of its numbers.
_ALL = "*"
_METADATA_ARGUMENTS: dict[Any, str] = {
    aten.sym_size.int: _ALL,
    aten.sym_numel.default: _ALL,
    aten.sym_stride.int: _ALL,
    aten.sym_storage_offset.default: _ALL,
    aten.zeros_like.default: _ALL,
    aten.ones_like.default: _ALL,
    aten.full_like.default: "self",
    aten.empty_like.default: _ALL,
    aten.new_zeros.default: _ALL,
    aten.new_ones.default: _ALL,
    aten.new_full.default: "self",
    aten.new_empty.default: _ALL,
    aten.type_as.default: "other",
    aten.expand_as.default: "other",
    aten.view_as.default: "other",
    aten.reshape_as.default: "other",
    aten.to.other: "other",
}
METADATA_READS = frozenset(_METADATA_ARGUMENTS)


def reads_data(reader: fx.Node, value: fx.Node) -> bool:
    """Whether `reader` uses the numbers of `value`, not only its sizes, dtype or device."""
    blind = _METADATA_ARGUMENTS.get(reader.target)
    if blind is None:
        return True
    if blind == _ALL:
        return False
    return any(argument(reader, n) is value for n in schema_names(reader.target) if n != blind)


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this node's data, in graph order; reads of its size are left out."""
    return sorted(u for u in node.users if reads_data(u, node))


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose data (not only sizes) this node reads."""
    return [n for n in node.all_input_nodes if reads_data(node, n)]


def writes(node: fx.Node) -> tuple[str, ...]:
    """The schema names of the arguments that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )


def written_tensors(graph: fx.Graph) -> set[str]:
    """The names of the program's tensors that a run of the graph changes in place."""
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or not is_impure(node):
            continue
        # The schema of a batch norm does not say that it writes to its running statistics.
        names = [*writes(node), *(n for n in schema_names(node.target) if n.startswith("running_"))]
        for target in (argument(node, n) for n in names):
            if isinstance(target, fx.Node) and target.op == "get_attr":
                found.add(str(target.target))
    return found


def is_random(node: fx.Node) -> bool:
    """Whether running the node draws random numbers, decided from its arguments."""
    if node.op != "call_function":
        return False
    if is_opaque(node):
        # A call that drew nothing so far may draw on other values.
        return True
    if node.target in DROPOUTS:
        return bool(argument(node, "train"))
    names = schema_names(node.target)
    if "dropout_p" in names:
        return argument(node, "dropout_p") != 0.0
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def is_impure(node: fx.Node) -> bool:
    """Whether the node must stay although nobody reads it: it writes, draws, or is the interface.

    fx's own rule counts eval-mode dropout and fused attention as random and so keeps dead layers.
    """
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if writes(node) or is_random(node) or is_choice(node):
        return True
    if is_op(node, aten.batch_norm.default, aten.instance_norm.default):
        flag = "training" if is_op(node, aten.batch_norm.default) else "use_input_stats"
        return bool(argument(node, flag)) and argument(node, "running_mean") is not None
    return False


def is_hook(node: fx.Node) -> bool:
    """Whether the node is a named identity, put there by InsertHooks."""
    return node.op == "call_function" and node.target is hook_point


def constructs(node: fx.Node) -> bool:
    """Whether a node makes its value from Python numbers alone, as `arange(8)` does."""
    return (
        node.op == "call_function"
        and node.target is not operator.getitem
        and not node.all_input_nodes
        and isinstance(node.meta.get("val"), torch.Tensor)
        and not is_impure(node)
    )
