"""Programs, node facts, op tables, names and the text form of a graph."""

from lensfx.graph.names import native_name
from lensfx.graph.node import (
    argument,
    arguments,
    dtype_of,
    is_op,
    is_weight,
    module_path,
    op_name,
    shape_of,
    source_line,
    value_of,
    where,
)
from lensfx.graph.ops import CASTS, VIEWS, data_inputs, hook_point, is_hook, readers
from lensfx.graph.program import Formula, Program, Rewrite, Source, Stage, copy_graph
from lensfx.graph.text import graph_diff, graph_text
from lensfx.graph.views import carried_axis, same_shape, same_size

__all__ = [
    "CASTS",
    "VIEWS",
    "Formula",
    "Program",
    "Rewrite",
    "Source",
    "Stage",
    "argument",
    "arguments",
    "carried_axis",
    "copy_graph",
    "data_inputs",
    "dtype_of",
    "graph_diff",
    "graph_text",
    "hook_point",
    "is_hook",
    "is_op",
    "is_weight",
    "module_path",
    "native_name",
    "op_name",
    "readers",
    "same_shape",
    "same_size",
    "shape_of",
    "source_line",
    "value_of",
    "where",
]
