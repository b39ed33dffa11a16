"""Attention in a branch: a softmax along the keys, the values it weighs, and what it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis.contraction import letters
from lensfx.analysis.structure.flow import Flow, is_weight_linear
from lensfx.analysis.structure.labels import Atom, Labels
from lensfx.graph.node import argument, is_op, op_name, schema_names, shape_of
from lensfx.graph.ops import VIEWS

__all__ = ["Core", "cores", "is_product"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.mul.Tensor,
)
_ON_THE_WAY = frozenset(
    {"mul", "div", "add", "sub", "masked_fill", "where", "nan_to_num", "slice", "cat", "getitem"}
    | {"tanh", "dropout", "neg", "clamp", "to", "maximum", "pad", "constant_pad_nd", "split"}
    | {"sigmoid", "narrow", "split_with_sizes", "tril", "masked_scatter", "float_power", "amax"}
    | {"max", "min", "minimum"}
)


def is_product(flow: Flow, node: fx.Node) -> bool:
    """Whether a node contracts two live values with each other."""
    return is_op(node, *_PRODUCTS[:4], SDPA) and len(flow.deps.get(node, ())) > 1


@dataclass(frozen=True)
class Core:
    """One attention: the product of `query` and `key`, its softmax, and the weighed `value`.

    `fused` is the operator that does it all; else `scores` are what the softmax reads, `keys` the
    axis of them it runs along, `pattern` what weighs the values and `pattern_keys` that axis of it,
    `product` = query times key.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    z: fx.Node
    fused: fx.Node | None = None
    product: fx.Node | None = None
    scores: fx.Node | None = None
    softmax: fx.Node | None = None
    pattern: fx.Node | None = None
    keys: int = -1
    pattern_keys: int = -1
    mask: fx.Node | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: fx.Node | None = None
    causal: bool | None = None
    nodes: tuple[fx.Node, ...] = ()


def cores(flow: Flow, labels: Labels, nodes: list[fx.Node]) -> Iterator[Core]:
    """Every attention among the nodes of a branch."""
    inside = set(nodes)
    for node in nodes:
        if is_op(node, SDPA):
            if _along_positions(labels, node):
                yield _fused(flow, node)
        elif _is_softmax(flow, labels, node):
            found = _Written(flow, labels, inside, node).core()
            if found is not None:
                yield found


def _along_positions(labels: Labels, node: fx.Node) -> bool:
    """Whether the keys are positions, not something that each position has several of."""
    *lead, keys, _ = labels.axes(argument(node, "key"))
    return labels.has_positions(keys) or not any(map(labels.has_positions, lead))


def _fused(flow: Flow, node: fx.Node) -> Core:
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    width = (shape_of(query) or (1,))[-1]
    scale = argument(node, "scale")
    if scale is None and isinstance(width, int):
        scale = width**-0.5
    causal = True if argument(node, "is_causal") else None
    mask = argument(node, "attn_mask")
    return Core(
        flow.rep(query),
        flow.rep(key),
        flow.rep(value),
        node,
        fused=node,
        mask=mask if isinstance(mask, fx.Node) else None,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        causal=causal,
        nodes=(node,),
    )


def _is_softmax(flow: Flow, labels: Labels, node: fx.Node) -> bool:
    """A softmax along positions, as an operator or as a value over its own sum."""
    if is_op(node, *_SOFTMAX):
        return bool(labels.position_mixes(node))
    if not is_op(node, aten.div.Tensor) or len(flow.deps[node]) != 2:
        return False
    top, below = (flow.rep(n) for n in node.args[:2])  # type: ignore[arg-type]
    sums = [
        n for n in _behind(flow, below, top) if op_name(n) == "sum" and labels.position_mixes(n)
    ]
    return bool(sums) and op_name(top) in ("exp", "mul", "masked_fill", "where", "relu", "square")


def _behind(flow: Flow, node: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    """The single-input nodes from a value back to another one."""
    for _ in range(8):
        if node is stop:
            return
        yield node
        deps = flow.deps[node]
        if len(deps) != 1:
            return
        node = deps[0]


class _Written:
    def __init__(self, flow: Flow, labels: Labels, inside: set[fx.Node], node: fx.Node) -> None:
        self.flow, self.labels, self.inside, self.softmax = flow, labels, inside, node
        self.passed: list[fx.Node] = []

    def core(self) -> Core | None:
        after = self._forward()
        if after is None:
            return None
        pattern, product, value = after
        scores = self._scores()
        before = self._backward(scores)
        if before is None:
            return None
        keys = self._keys()
        query, key = self._sides(before, keys)
        mask = [n for n in self.passed if op_name(n) in ("masked_fill", "where", "add", "maximum")]
        sinks = [n for n in self.passed if op_name(n) == "cat"]
        caps = [n for n in self.passed if op_name(n) == "tanh"]
        return Core(
            query,
            key,
            value,
            product,
            product=before,
            scores=scores,
            softmax=self.softmax,
            pattern=pattern,
            keys=keys,
            pattern_keys=_contracted_axis(product, pattern),
            mask=mask[0] if mask else None,
            scale=self._scale(before),
            softcap=self._cap() if caps else None,
            sinks=sinks[0] if sinks else None,
            nodes=tuple(sorted({self.softmax, before, product, *self.passed})),
        )

    def _forward(self) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """The pattern as it weighs the values, the product that does, and the values."""
        seen, queue = {self.softmax}, [self.softmax]
        for node in queue:
            for reader in self.flow.readers[node]:
                if reader not in self.inside or reader in seen:
                    continue
                contracts = any(m.kind == "contract" for m in self.labels.position_mixes(reader))
                if contracts and is_product(self.flow, reader):
                    others = [n for n in self.flow.deps[reader] if n not in seen]
                    return (node, reader, others[-1]) if others else None
                if op_name(reader) in _ON_THE_WAY or reader.target in VIEWS:
                    seen.add(reader)
                    queue.append(reader)
        return None

    def _scores(self) -> fx.Node:
        node = self.flow.rep(self.softmax.args[0])  # type: ignore[arg-type]
        if not is_op(self.softmax, *_SOFTMAX):
            while op_name(node) != "exp" and len(self.flow.deps[node]) == 1:
                node = self.flow.deps[node][0]
            node = self.flow.deps[node][0] if op_name(node) == "exp" else node
        if op_name(node) == "sub" and len(self.flow.deps[node]) == 2:
            # The largest score is taken off first, so that nothing overflows.
            top, largest = (self.flow.rep(n) for n in node.args[:2])  # type: ignore[arg-type]
            if any(op_name(n) in ("max", "amax") for n in _behind(self.flow, largest, top)):
                self.passed.append(node)
                node = top
        if op_name(node) == "cat" and len(self.flow.deps[node]) == 1:
            # A sink is one more column of the softmax, and no key.
            self.passed.append(node)
            node = self.flow.deps[node][0]
        return node

    def _backward(self, scores: fx.Node) -> fx.Node | None:
        """The product of two live values that the scores come from."""
        queue, seen = [scores], {scores}
        for node in queue:
            if node not in self.inside:
                continue
            if is_product(self.flow, node):
                return node
            if op_name(node) in _ON_THE_WAY or node.target in VIEWS:
                self.passed.append(node)
                new = [n for n in self.flow.deps[node] if n not in seen]
                seen.update(new)
                queue.extend(new)
        return None

    def _keys(self) -> int:
        if not is_op(self.softmax, *_SOFTMAX):
            return len(shape_of(self.softmax) or ()) - 1
        rank = len(shape_of(self.softmax) or ())
        return int(argument(self.softmax, "dim")) % max(rank, 1)

    def _sides(self, product: fx.Node, keys: int) -> tuple[fx.Node, fx.Node]:
        """Query and key: the key is the side that brings the axis of the softmax."""
        if is_op(product, aten.einsum.default):
            return self._einsum_sides(product, keys)
        names = ("batch1", "batch2") if is_op(product, aten.baddbmm.default) else None
        names = names or (
            ("self", "mat2") if is_op(product, aten.bmm.default) else ("self", "other")
        )
        left, right = (self.flow.rep(argument(product, n)) for n in names)
        rank = len(shape_of(self.softmax) or ())
        return (left, right) if keys == rank - 1 else (right, left)

    def _einsum_sides(self, product: fx.Node, keys: int) -> tuple[fx.Node, fx.Node]:
        operands = list(argument(product, "tensors"))
        found = letters(str(argument(product, "equation")), operands)
        first, second = (self.flow.rep(n) for n in operands[:2])
        if found is None or keys >= len(found[-1]):
            return first, second
        return (second, first) if found[-1][keys] in found[0] else (first, second)

    def _scale(self, product: fx.Node) -> float | None:
        """What the product is multiplied by on its way to the scores, if these are numbers."""
        total = 1.0
        for node in self.passed:
            total *= scaled_by(node)
        if is_op(product, aten.baddbmm.default):
            alpha: Any = argument(product, "alpha")
            total *= float(alpha) if isinstance(alpha, (int, float)) else 1.0
        return total

    def _cap(self) -> float | None:
        """The bound of a tanh cap: the number its result is multiplied by."""
        for node in self.passed:
            factor = node.args[1] if len(node.args) > 1 else None
            if op_name(node) == "mul" and isinstance(factor, (int, float)):
                return float(factor)
        return None


def scaled_by(node: fx.Node) -> float:
    """The number that a node multiplies its operand by; 1 if it does something else."""
    factor = node.args[1] if len(node.args) > 1 else None
    if op_name(node) not in ("mul", "div") or not isinstance(factor, (int, float)):
        return 1.0
    return float(factor) if op_name(node) == "mul" else 1.0 / float(factor)


def _contracted_axis(product: fx.Node, operand: fx.Node) -> int:
    """The axis of an operand that a product of two values sums over."""
    rank = len(shape_of(operand) or ())
    if is_op(product, aten.einsum.default):
        operands = list(argument(product, "tensors"))
        found = letters(str(argument(product, "equation")), operands)
        at = next((i for i, n in enumerate(operands) if _same(n, operand)), 0)
        gone = [] if found is None else [k for k, c in enumerate(found[at]) if c not in found[-1]]
        return gone[0] if gone else rank - 1
    first = next(n for n in product.args[:3] if isinstance(n, fx.Node) and len(shape_of(n) or ()))
    if is_op(product, aten.baddbmm.default):
        first = argument(product, "batch1")
    return rank - 1 if _same(first, operand) else rank - 2


def _same(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node is a value or a copy of it."""
    while node is not value and node.args and isinstance(node.args[0], fx.Node):
        if shape_of(node) != shape_of(node.args[0]):
            return False
        node = node.args[0]
    return node is value


def linear_behind(flow: Flow, above: dict[Any, Any], node: fx.Node) -> list[fx.Node]:
    """The path from a value back to the linear it is a projection by, through dominators.

    Both ends included; it ends where the dominators do if there is none.
    """
    path = [node]
    while not is_weight_linear(node):
        up = above.get(node)
        if not isinstance(up, fx.Node):
            break
        node = up
        path.append(node)
    return path


def turns(flow: Flow, labels: Labels, below: fx.Node, above: fx.Node) -> bool:
    """Whether positions enter between two values of a path by a product: rotary."""
    between = flow.above[below] & ~(flow.above[above] | 1 << flow.rank[above])
    for node in (*flow.members(between), below):
        if op_name(node) != "mul":
            continue
        for other in node.all_input_nodes:
            if other in flow.live or not shape_of(other):
                continue
            atoms: list[Atom] = [a for axis in labels.axes(other) for a in axis]
            # A number per position is a mask or a temperature.
            wide = not all(map(labels.is_sequence, atoms))
            if wide and any(map(labels.is_position, atoms)) and "self" in schema_names(node.target):
                return True
    return False
