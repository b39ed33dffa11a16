"""What flows where: values computed from the model's data, and what stands for the same value."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import is_one, same_size
from lensfx.graph.node import argument, dtype_of, is_op, is_weight, schema_names, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, data_inputs, is_hook, readers
from lensfx.graph.program import Program

__all__ = ["Flow", "is_weight_linear", "lookup"]

aten = torch.ops.aten

_COPIES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.lift_fresh_copy.default,
        *CASTS,
        *DROPOUTS,
    }
)
_RESHAPES = frozenset(
    {aten.reshape.default, aten.view.default, aten.expand.default, aten._unsafe_view.default}
)
_CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.convolution.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
    }
)
_WEIGHT_SLOTS: dict[Any, tuple[str, ...]] = {
    aten.linear.default: ("weight",),
    aten.addmm.default: ("mat2", "mat1"),
    aten.mm.default: ("mat2", "self"),
    aten.matmul.default: ("other", "self"),
    aten.bmm.default: ("mat2", "self"),
    aten.baddbmm.default: ("batch2", "batch1"),
    **{op: ("weight",) for op in _CONVOLUTIONS},
}


def is_weight_linear(node: fx.Node) -> bool:
    """Whether a node contracts a computed value with a weight."""
    slots = _WEIGHT_SLOTS.get(node.target)
    if slots is not None:
        return any(_from_weight(argument(node, s)) for s in slots)
    if is_op(node, aten.einsum.default):
        return any(_from_weight(n) for n in argument(node, "tensors"))
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return "grouped_mm" in str(node.target) and any(_from_weight(n) for n in node.all_input_nodes)


def _from_weight(node: Any) -> bool:
    """Whether an operand is a weight, or the slices of one that an index picks (experts)."""
    while isinstance(node, fx.Node) and not is_weight(node):
        if not is_op(node, aten.index.Tensor, aten.index_select.default, aten.select.int, *_VIEWS):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


_VIEWS = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.t.default)


def lookup(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The table and the indices of a lookup of rows of a weight, or None."""
    if is_op(node, aten.embedding.default):
        pair = argument(node, "weight"), argument(node, "indices")
    elif is_op(node, aten.index.Tensor) and len(argument(node, "indices")) == 1:
        pair = argument(node, "self"), argument(node, "indices")[0]
    elif is_op(node, aten.index_select.default) and argument(node, "dim") == 0:
        pair = argument(node, "self"), argument(node, "index")
    elif is_op(node, aten.embedding_bag.default, aten._embedding_bag.default):
        pair = argument(node, "weight"), argument(node, "indices")
    else:
        return None
    table, ids = pair
    if not is_weight(table) or is_weight(ids) or not isinstance(ids, fx.Node):
        return None
    kind, many = dtype_of(table), shape_of(table)
    return pair if kind is not None and kind.is_floating_point and many and len(many) > 1 else None


class Flow:
    """The dataflow of a program: which values are live, their live inputs, and their ancestors.

    A value is live if it is computed from the model's data, not from sizes, masks or positions
    alone. No-ops do not count: `rep` gives the value that a copy or cast of it stands for.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = [n for n in program.graph.nodes if n.op != "output"]
        self.rank = {n: i for i, n in enumerate(self.nodes)}
        self.outputs = _outputs(program.graph)
        self.given = self._from_inputs()
        self.seeds = self._seeds()
        self.live: set[fx.Node] = set()
        self._rep: dict[fx.Node, fx.Node] = {}
        self.deps: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.above: dict[fx.Node, int] = {}
        for node in self.nodes:
            self._add(node)

    def _add(self, node: fx.Node) -> None:
        seed = node in self.seeds
        inputs = [] if seed else [n for n in data_inputs(node) if n in self.live]
        if not inputs and not seed:
            return
        self.live.add(node)
        deps = tuple(dict.fromkeys(self.rep(n) for n in inputs))
        self.deps[node] = deps
        bits = 0
        for n in deps:
            bits |= self.above[n] | (1 << self.rank[n])
        self.above[node] = bits
        source = self._copied(node) if inputs else None
        if source is not None:
            self._rep[node] = self.rep(source)

    def rep(self, node: fx.Node) -> fx.Node:
        """The value that a node is a copy of, or the node."""
        return self._rep.get(node, node)

    def reaches(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether a live value is computed from another one, or is it."""
        a, b = self.rep(source), self.rep(node)
        return a is b or bool(self.above.get(b, 0) >> self.rank[a] & 1)

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a set of ancestors, latest first."""
        while bits:
            at = bits.bit_length() - 1
            yield self.nodes[at]
            bits &= ~(1 << at)

    @cached_property
    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """The live readers of each live value, reads of its copies counted as reads of it."""
        found: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.live}
        for node in self.nodes:
            if node in self.live and self.rep(node) is node:
                for source in self.deps[node]:
                    found[source].append(node)
        return found

    @cached_property
    def wanted(self) -> int:
        """The set of live values that some output is computed from."""
        bits = 0
        for node in self.outputs:
            if node in self.live:
                bits |= self.above[self.rep(node)] | (1 << self.rank[self.rep(node)])
        return bits

    def _from_inputs(self) -> set[fx.Node]:
        """Every node whose numbers, not only sizes, come from an input of the call."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(n in found for n in data_inputs(node)):
                found.add(node)
        return found

    def _seeds(self) -> set[fx.Node]:
        """Where data enters: rows looked up by ids, one-hot ids, and inputs of numbers."""
        found = set()
        for node in self.nodes:
            pair = lookup(node)
            known = pair is not None and pair[1] in self.given
            if known or (is_op(node, aten.one_hot.default) and node in self.given):
                found.add(node)
            kind = dtype_of(node)
            if node.op == "placeholder" and kind is not None and _enters(node, kind):
                found.add(node)
        return found

    def _copied(self, node: fx.Node) -> fx.Node | None:
        """The input that a node copies without changing anything but its dtype or memory."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.live:
            return None
        if is_hook(node):
            return source
        if node.target in _COPIES:
            a, b = dtype_of(source), dtype_of(node)
            return source if a and b and a.is_floating_point == b.is_floating_point else None
        if node.target in _RESHAPES or is_op(node, aten.slice.Tensor):
            return source if _same_shape(source, node) and not _skips(node) else None
        if is_op(node, aten.mul.Tensor, aten.div.Tensor):
            return source if node.args[1] in (1, 1.0) and _same_shape(source, node) else None
        if is_op(node, aten.add.Tensor, aten.sub.Tensor):
            return source if node.args[1] in (0, 0.0) and _same_shape(source, node) else None
        return None


def _skips(node: fx.Node) -> bool:
    if not is_op(node, aten.slice.Tensor):
        return False
    return argument(node, "start") not in (None, 0) or argument(node, "step") != 1


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = shape_of(a), shape_of(b)
    if x is None or y is None or len(x) != len(y):
        return False
    return all(same_size(i, j) for i, j in zip(x, y, strict=True))


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    flat = torch.utils._pytree.tree_leaves(graph.output_node().args[0])
    return [n for n in flat if isinstance(n, fx.Node)]


def _enters(given: fx.Node, kind: torch.dtype) -> bool:
    """Whether an input of numbers is data, and not a mask or bias that only steers attention."""
    shape = shape_of(given) or ()
    if not kind.is_floating_point or sum(not is_one(s) for s in shape) < 2:
        return False
    seen, stack = {given}, [given]
    while stack:
        node = stack.pop()
        for reader in readers(node):
            sdpa = is_op(reader, aten.scaled_dot_product_attention.default)
            norm = "normalized_shape" in schema_names(reader.target)
            if (
                norm
                or is_weight_linear(reader)
                or (sdpa and argument(reader, "attn_mask") is not node)
            ):
                return True
            pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
            if reader not in seen and (pointwise or reader.target in _RESHAPES | set(_VIEWS)):
                seen.add(reader)
                stack.append(reader)
    return False
