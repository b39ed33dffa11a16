"""What a stream starts from: token, position and other embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.axes import is_one
from lensfx.analysis.structure.facts import Embedding
from lensfx.analysis.structure.flow import Flow, lookup
from lensfx.analysis.structure.labels import Labels
from lensfx.analysis.structure.streams import Line
from lensfx.analysis.unembed import token_tables
from lensfx.graph.node import is_op, is_weight, op_name, shape_of
from lensfx.graph.ops import data_inputs
from lensfx.graph.program import Program

__all__ = ["embeddings"]

aten = torch.ops.aten

_KEEPS = frozenset({"where", "cat", "slice", "masked_fill", "clamp", "to", "reshape", "clone"})
_PICKS = frozenset({"gather", "index", "index_select", "slice", "expand", "select"})


def embeddings(program: Program, flow: Flow, labels: Labels, line: Line) -> tuple[Embedding, ...]:
    """The embeddings in the stem of a stream: tokens first, then positions, then others."""
    found = [*_tables(program, flow, line)]
    found += _added(program, flow, labels, line, {e.node for e in found})
    order = {"token": 0, "position": 1, "type": 2, "other": 3}
    return tuple(sorted(found, key=lambda e: order[e.kind]))


def _tables(program: Program, flow: Flow, line: Line) -> Iterator[Embedding]:
    """Tables indexed by ids: the one with the most rows among those added holds the tokens."""
    seeds = [
        n for n in flow.nodes if n in flow.seeds and line.stem >> flow.rank[n] & 1 and lookup(n)
    ]
    direct = set(token_tables(program)) & set(seeds)
    direct = direct or {n for n in seeds if _picked_from_input(lookup(n)[1])}  # type: ignore[index]
    mains = [n for n in seeds if n in direct]
    rows = {n: (shape_of(lookup(n)[0]) or (0,))[0] for n in seeds}  # type: ignore[index]
    token = max(mains, key=lambda n: (rows[n], -flow.rank[n]), default=None)
    for node in seeds:
        pair = lookup(node)
        assert pair is not None
        kind = "token" if node is token else ("type" if node in direct else "position")
        kind = "type" if kind == "position" and _is_constant(program, pair[1]) else kind
        yield Embedding(kind, node, pair[0], _scaled(flow, node))


def _picked_from_input(ids: fx.Node) -> bool:
    """Whether indices are entries of an input, some of them replaced or more put beside them."""
    seen, stack = {ids}, [ids]
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return True
        if op_name(node) not in _KEEPS:
            continue
        # The condition of a choice is made from ids where the result is not.
        inputs = node.args[1:] if op_name(node) == "where" else (node.args[:1] or ())
        new = [n for n in pytree.tree_leaves(inputs) if isinstance(n, fx.Node) and n not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _added(
    program: Program, flow: Flow, labels: Labels, line: Line, known: set[fx.Node]
) -> Iterator[Embedding]:
    """Values added in the stem that are no data: positions, if they vary along them."""
    for node in line.origin:
        for other in data_inputs(node) if is_op(node, aten.add.Tensor) else ():
            if other in flow.live or other in known or not shape_of(other):
                continue
            pair = lookup(other)
            kind = "position" if _along_positions(labels, node, other) else "other"
            if pair is not None and _is_constant(program, pair[1]):
                kind = "type"
            table = other if is_weight(other) else (pair[0] if pair is not None else None)
            yield Embedding(kind, other, table, other)


def _along_positions(labels: Labels, add: fx.Node, other: fx.Node) -> bool:
    """Whether a value that is added differs from position to position."""
    shape, axes = shape_of(other) or (), labels.of.get(add, [])
    offset = len(axes) - len(shape)
    return any(
        not is_one(size) and labels.has_positions(axes[offset + i])
        for i, size in enumerate(shape)
        if offset + i >= 0
    )


def _is_constant(program: Program, ids: fx.Node) -> bool:
    """Whether indices come from equal numbers alone: a type that nobody gave."""
    seen, stack = {ids}, [ids]
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or is_op(node, aten.arange.default, aten.arange.start):
            return False
        if node.op == "get_attr":
            held = program.tensors[str(node.target)]
            if held.is_meta or held.numel() == 0 or bool((held != held.flatten()[0]).any()):
                return False
        # Where rows are picked from a table of equal numbers, which ones does not matter.
        inputs = node.args[:1] if op_name(node) in _PICKS else data_inputs(node)
        new = [n for n in inputs if isinstance(n, fx.Node) and n not in seen]
        seen.update(new)
        stack.extend(new)
    return True


def _scaled(flow: Flow, node: fx.Node) -> fx.Node:
    """A lookup with the number it is multiplied by, where nobody reads it without."""
    while True:
        read = flow.readers[node]
        if len(read) != 1 or not is_op(read[0], aten.mul.Tensor) or len(flow.deps[read[0]]) != 1:
            return node
        other = read[0].args[1] if flow.rep(read[0].args[0]) is node else read[0].args[0]  # type: ignore[arg-type]
        number = not isinstance(other, fx.Node) or (is_weight(other) and not shape_of(other))
        if not number:
            return node
        node = read[0]
