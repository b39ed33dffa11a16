"""Find the heads of a model: linear ops whose result only goes on to outputs and losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.graph.node import argument, dtype_of, is_op, is_weight, shape_of
from lensfx.graph.ops import CASTS, VIEWS, data_inputs, is_hook, readers
from lensfx.graph.program import Program
from lensfx.graph.views import carried_axis, same_shape, same_size

__all__ = ["Head", "heads", "table_and_ids", "token_tables", "unembedding"]

aten = torch.ops.aten

_MIXES = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.addmm.default,
        aten.einsum.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.scaled_dot_product_attention.default,
    }
)
_LOSSES = frozenset(
    {
        aten.softmax.int,
        aten.log_softmax.int,
        aten.cross_entropy_loss.default,
        aten.nll_loss_nd.default,
    }
)


@dataclass(frozen=True)
class Head:
    """A linear op from which every path leads to an output without another weight or norm.

    `outputs` are the flat outputs its result reaches, `logits` those whose last axis is still the
    rows of its weight. `evidence` says why these are a vocabulary; it is empty if nothing does.
    """

    linear: fx.Node
    outputs: tuple[int, ...]
    logits: tuple[int, ...]
    evidence: str


def heads(program: Program) -> list[Head]:
    """Every head of the program, in graph order."""
    found = []
    for linear in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = argument(linear, "weight")
        if not is_weight(weight) or len(shape_of(weight) or ()) != 2:
            continue
        reached = _forward(linear)
        if reached is not None:
            outputs, losses = reached
            evidence = _evidence(program, linear, outputs, losses)
            found.append(Head(linear, outputs, _logits(program, linear), evidence))
    return found


def unembedding(program: Program) -> fx.Node | None:
    """The head that gives the logits: the only one, or the only one with evidence for it."""
    found = heads(program)
    likely = [h for h in found if h.evidence] if len(found) > 1 else found
    return likely[0].linear if len(likely) == 1 else None


def _logits(program: Program, linear: fx.Node) -> tuple[int, ...]:
    """The outputs to which the rows of the weight come entry by entry, not summed or picked."""
    found = {linear: None}
    queue = [linear]
    for node in queue:
        new = [r for r in readers(node) if r not in found and _keeps_rows(r, node)]
        found.update(dict.fromkeys(new))
        queue.extend(new)
    flat = pytree.tree_leaves(program.graph.output_node().args[0])
    return tuple(k for k, leaf in enumerate(flat) if isinstance(leaf, fx.Node) and leaf in found)


def _keeps_rows(reader: fx.Node, value: fx.Node) -> bool:
    """Whether the last axis of the result is that of the value, or a part of it."""
    before, after = shape_of(value), shape_of(reader)
    if not before or not after:
        return False
    last = len(before) - 1
    if is_hook(reader) or is_op(reader, aten.detach.default):
        return True
    if is_op(reader, aten.index.Tensor):
        return reader.args[0] is value and len(argument(reader, "indices")) <= last
    if is_op(reader, aten.slice.Tensor) and argument(reader, "dim") % len(before) == last:
        return True
    if is_op(reader, *VIEWS, *CASTS):
        return reader.args[0] is value and carried_axis(reader, last) == len(after) - 1
    if is_op(reader, aten.mean.dim, aten.sum.dim_IntList):
        return all(d % len(before) != last for d in argument(reader, "dim") or [last])
    pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
    return pointwise and same_size(before[-1], after[-1])


def _forward(linear: fx.Node) -> tuple[tuple[int, ...], list[fx.Node]] | None:
    """The outputs and losses that a value ends in; None if anything else takes it up."""
    outputs: set[int] = set()
    losses: list[fx.Node] = []
    seen = {linear}
    stack = [linear]
    while stack:
        node = stack.pop()
        for reader in readers(node):
            if reader.op == "output":
                flat = pytree.tree_leaves(reader.args[0])
                outputs |= {i for i, leaf in enumerate(flat) if leaf is node}
                continue
            others = [n for n in data_inputs(reader) if n not in seen and not is_weight(n)]
            mixed = others and not is_op(reader, *_LOSSES) and not _picks(reader, node)
            if is_op(reader, *_MIXES) or mixed:
                return None
            if is_op(reader, *_LOSSES):
                losses.append(reader)
            if reader not in seen:
                seen.add(reader)
                stack.append(reader)
    return (tuple(sorted(outputs)), losses) if outputs else None


def _picks(reader: fx.Node, value: fx.Node) -> bool:
    """Whether the reader selects rows of the value by another one, as `logits[mask]` does."""
    return is_op(reader, aten.index.Tensor, aten.index_select.default, aten.gather.default) and (
        reader.args[0] is value
    )


def token_tables(program: Program) -> Iterator[fx.Node]:
    """The reads of a table by an integer input of the model: `embedding(W, ids)` or `W[ids]`."""
    for node in program.graph.nodes:
        found = table_and_ids(node)
        if found is None:
            continue
        source: object = found[1]
        while isinstance(source, fx.Node) and source.op == "call_function":
            source = source.args[0] if len(data_inputs(source)) == 1 else None
        if isinstance(source, fx.Node) and source.op == "placeholder":
            yield node


def table_and_ids(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The table and the indices of a lookup of rows, or None if the node is none."""
    if is_op(node, aten.embedding.default):
        table, ids = argument(node, "weight"), argument(node, "indices")
    elif is_op(node, aten.index.Tensor) and len(argument(node, "indices")) == 1:
        table, ids = argument(node, "self"), argument(node, "indices")[0]
    else:
        return None
    floating = dtype_of(table) is not None and dtype_of(table).is_floating_point  # type: ignore[union-attr]
    return (table, ids) if is_weight(table) and floating and not is_weight(ids) else None


def _evidence(
    program: Program, linear: fx.Node, outputs: tuple[int, ...], losses: list[fx.Node]
) -> str:
    """Why a head gives logits over a vocabulary, in words; empty if nothing shows it.

    That sizes coincide is a hint and no proof: it counts for the main table of ids only, for a
    result with one row a token, and never where the model gives the result another name.
    """
    weight = argument(linear, "weight")
    rows, width = (shape_of(weight) or (0, 0))[:2]
    if rows == 1:
        return ""
    if losses:
        return f"a {losses[0].target.overloadpacket.__name__} reads it"  # type: ignore[union-attr]
    stored = _root(weight)
    tables = list(_main_tables(program))
    for table, _ in tables:
        if stored is not None and _tensor(program, stored) is _tensor(program, table):
            return f"its weight is tied to {table.target}"
    names = [_last_key(program.signature.outputs[k]) for k in outputs]
    called = any("logit" in name for name in names)
    if any(name and "logit" not in name for name in names):
        return ""
    rank = len(shape_of(linear) or ())
    for table, ids in tables:
        by_token = rank == len(shape_of(ids) or ()) + 1 and rows != width
        if (shape_of(table) or (0,))[0] == rows and (called or by_token):
            words = "the model calls it logits, and " if called else ""
            return f"{words}it has one row for each row of {table.target}"
    return ""


def _last_key(name: str) -> str:
    """The word that the model calls an output by; empty for a place in a tuple or a bare tensor."""
    key = name.rpartition("[")[2].rpartition(".")[2].strip("'[]")
    return "" if key == "output" or key.isdigit() else key.lower()


def _main_tables(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each stored table of token ids with its ids, save those added to a larger one (segments)."""
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for lookup in token_tables(program):
        pair = table_and_ids(lookup)
        root = _root(pair[0]) if pair is not None else None
        if pair is not None and root is not None:
            found[lookup] = (root, pair[1])
    for lookup, (table, ids) in found.items():
        rows = (shape_of(table) or (0,))[0]
        partners = [p for p in _added_to(lookup) if p in found and p is not lookup]
        if all((shape_of(found[p][0]) or (0,))[0] <= rows for p in partners):
            yield table, ids


def _added_to(lookup: fx.Node) -> Iterator[fx.Node]:
    """The values that a lookup is summed with, directly or through other sums and scales."""
    up, seen = [lookup], set()
    while up:
        node = up.pop()
        for reader in readers(node):
            scale = is_op(reader, aten.mul.Tensor) and len(data_inputs(reader)) == 1
            if reader in seen or not (is_op(reader, aten.add.Tensor) or scale):
                continue
            seen.add(reader)
            up.append(reader)
            yield from data_inputs(reader)
            for other in data_inputs(reader):
                yield from data_inputs(other)


def _root(node: fx.Node) -> fx.Node | None:
    """The stored matrix that an expression is a changed copy of, as `W * g` and `W - mean` are."""
    while node.op == "call_function":
        shape = shape_of(node) or ()
        inputs = [
            n
            for n in node.all_input_nodes
            if len(shape) == 2
            and any(same_shape(shape_of(n) or (), s) for s in (shape, shape[::-1]))
        ]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    return node if node.op == "get_attr" else None


def _tensor(program: Program, node: fx.Node) -> torch.Tensor:
    return program.tensors[str(node.target)]
