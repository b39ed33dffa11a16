"""What a sum of products makes of a scale, and of a shift, of the channels of one factor.

A sum over other axes carries them, if a shift is to pass with weights that add up to one. A sum
over the channels with a weight is a sink; with a computed factor it forbids both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import fingerprint
from lensfx.analysis.channels import Channels, broadcast, fixed
from lensfx.analysis.contraction import letters
from lensfx.analysis.products import FACTORS, Product, product
from lensfx.analysis.rows import Cut, attends_fully, rows
from lensfx.analysis.sinks import Sink
from lensfx.analysis.weights import CONVS
from lensfx.graph.node import (
    argument,
    arguments,
    is_op,
    is_weight,
    op_name,
    schema_names,
    shape_of,
)
from lensfx.graph.ops import CASTS, data_inputs
from lensfx.graph.views import carried_axis

__all__ = ["Carried", "Reading", "Uneven", "product_rule"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """A node, the channels of all values so far, and whether a scale or a shift is asked about."""

    node: fx.Node
    carried: Mapping[fx.Node, Channels]
    scale: bool
    shift: bool

    def held(self, arg: Any) -> Channels | None:
        """The channels of an operand; None if it carries none."""
        return self.carried.get(arg) if isinstance(arg, fx.Node) else None

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument of the node by schema name, `default` if it has no such argument."""
        return arguments(self.node).get(name, default)

    @property
    def out(self) -> tuple[int | torch.SymInt, ...]:
        """The shape of the result."""
        return shape_of(self.node) or ()

    def says(self, words: str) -> str:
        """Words about the node, with its name and operator."""
        return f"%{self.node.name} ({op_name(self.node)}) {words}"


class Uneven(str):
    """Words that say why a sum over rows does not add up to one, and the node that makes it so."""

    node: fx.Node

    @classmethod
    def at(cls, node: fx.Node, words: str) -> Uneven:
        """The words, with the node they are about."""
        made = cls(words)
        made.node = node
        return made


@dataclass(frozen=True)
class Carried:
    """The channels of a result; `mixes` if it is a sum with weights that add up to one.

    It is right only if the values `beside` keep their channels, because of the words there.
    """

    channels: Channels
    mixes: bool = False
    beside: tuple[tuple[fx.Node, str], ...] = ()


def _multiplied(read: Reading) -> Carried | Sink | str:
    node = read.node
    found = _product_of(node)
    if found is None:
        return read.says("has an equation that is not followed; nothing is assumed")
    factors = [operand for operand, _ in found.terms]
    held = [i for i, f in enumerate(factors) if read.held(f) is not None]
    if len(held) != 1 or sum(n in read.carried for n in data_inputs(node)) > 1:
        return read.says("reads it twice, or beside its factors")
    value, labels = found.terms[held[0]]
    channels = read.carried[value]
    if len(set(labels)) < len(labels):
        return read.says("takes a diagonal")
    if any(labels[a] not in found.out for a in channels.axes):
        return _sink(read, found, held[0])
    return _passed(read, found, held[0])


def _product_of(node: fx.Node) -> Product | None:
    if not is_op(node, aten.einsum.default) or "." not in str(argument(node, "equation")):
        return product(node)
    operands = list(argument(node, "tensors"))
    named = letters(str(argument(node, "equation")), operands)
    if named is None:
        return None
    *terms, out = map(tuple, named)
    return Product(tuple(zip(operands, terms, strict=True)), out)


def _added_to(node: fx.Node) -> fx.Node | None:
    """What a product is added to, if the operator adds it to anything."""
    if is_op(node, aten.addmm.default, aten.baddbmm.default):
        found: fx.Node = argument(node, "self")
        return found
    return argument(node, "bias") if is_op(node, aten.linear.default) else None


def _alpha(node: fx.Node) -> Any:
    added = is_op(node, aten.addmm.default, aten.baddbmm.default)
    return argument(node, "alpha") if added else 1


def _passed(read: Reading, found: Product, place: int) -> Carried | str:
    """A sum over axes without channels."""
    node, (value, labels) = read.node, found.terms[place]
    channels = read.carried[value]
    if read.scale and _added_to(node) is not None:
        return read.says(f"also adds it to %{_added_to(node).name}")  # type: ignore[union-attr]
    if read.shift:
        if _alpha(node) != 1:
            return read.says("multiplies the product by a number")
        words = _weighted(read, found, place)
        if words is not None:
            return words
    at = [labels.index(label) if label in labels else None for label in found.out]
    order = [a for a in range(len(labels)) if a not in at] + [a for a in at if a is not None]
    axes = [order.index(a) for a in channels.axes]
    turned = channels
    if order != sorted(order):
        turned = channels.call(aten.permute.default, order, axes=axes)
    sizes = [1 if a is None else channels.idx.shape[a] for a in at]
    moved = turned.shaped(sizes, [i for i, a in enumerate(at) if a in channels.axes])
    before = [1 if a is None else (shape_of(value) or ())[a] for a in at]
    return Carried(broadcast(moved, before, read.out), mixes=True)


def _weighted(read: Reading, found: Product, place: int) -> str | None:
    """Why the other factor does not add up to one over what is summed; None if it does."""
    labels = found.terms[place][1]
    others = [term for i, term in enumerate(found.terms) if i != place]
    summed = {label for _, names in found.terms for label in names if label not in found.out}
    if len(others) != 1 or len(summed) != 1 or not summed <= set(labels):
        return read.says("sums over more than one axis, or over none")
    other, names = others[0]
    if not summed <= set(names) or len(set(names)) < len(names):
        return read.says("adds up its rows")
    (label,) = summed
    value = found.terms[place][0]
    mine, theirs = (shape_of(n) or () for n in (value, other))
    if fingerprint(mine[labels.index(label)]) != fingerprint(theirs[names.index(label)]):
        return read.says("repeats one factor along what it sums")
    proof = rows(other, names.index(label))
    return Uneven.at(proof.node, proof.reason) if isinstance(proof, Cut) else None


def _sink(read: Reading, found: Product, place: int) -> Sink | str:
    """A sum over the channels."""
    node, (value, labels) = read.node, found.terms[place]
    channels = read.carried[value]
    if len(found.terms) != 2:
        return read.says("multiplies it by several values")
    other, names = found.terms[1 - place]
    from_weight = _parameter(other)
    if from_weight is None:
        return read.says(f"multiplies it by %{other.name}, computed from the input")
    P, path = from_weight
    words = _unfit(read, found, place)
    if words is not None:
        return read.says(words)
    axes = [labels.index(label) if label in labels else None for label in names]
    gone = [i for i, label in enumerate(names) if label not in found.out]
    out = tuple(names.index(label) if label in names else None for label in found.out)
    if path:
        moved = _at_parameter(P, path, axes, gone, channels) if _is_matmul(node) else None
        if moved is None:
            return read.says(f"multiplies it by %{other.name}, whose parameter is not followed")
        axes, gone = moved
    slot = FACTORS[node.target][1 - place] if node.target in FACTORS else str(1 - place)
    return Sink(node, value, channels, P, slot, tuple(axes), tuple(gone), out, path)


def _unfit(read: Reading, found: Product, place: int) -> str | None:
    """Why a weight with these axes cannot take up the channels."""
    node, (value, labels), (other, names) = read.node, found.terms[place], found.terms[1 - place]
    channels, shape, there = read.carried[value], shape_of(value) or (), shape_of(other) or ()
    held = {labels[a]: shape[a] for a in channels.axes}
    if not set(held) <= set(names) or len(set(names)) < len(names):
        return "sums over channels that its weight does not have"
    if is_op(node, aten.linear.default) and (len(names) != 2 or place != 0):
        return "has no weight of two axes that could take it up"
    if any(fingerprint(there[names.index(k)]) != fingerprint(n) for k, n in held.items()):
        return "repeats its weight along the channels"
    summed = {label for label in labels if label not in found.out}
    both = [k for k in summed if k in names]
    if any(fingerprint(there[names.index(k)]) != fingerprint(shape[labels.index(k)]) for k in both):
        return "repeats its weight over what it sums"
    if read.shift and (_alpha(node) != 1 or not summed <= set(names)):
        return "sums over rows as well, or multiplies by a number"
    return None


def _is_matmul(node: fx.Node) -> bool:
    return is_op(node, aten.matmul.default, aten.bmm.default, aten.mm.default)


_PICKS = (
    aten.index.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.contiguous.default,
    *CASTS,
)


def _parameter(other: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The weight behind a factor, and the nodes by which rows of it are picked and turned."""
    path: list[fx.Node] = []
    while isinstance(other, fx.Node) and not is_weight(other):
        if not is_op(other, *_PICKS) or not isinstance(other.args[0], fx.Node):
            return None
        path.append(other)
        other = other.args[0]
    return (other, tuple(reversed(path))) if isinstance(other, fx.Node) else None


def _at_parameter(
    P: fx.Node,
    path: Sequence[fx.Node],
    axes: Sequence[int | None],
    gone: Sequence[int],
    channels: Channels,
) -> tuple[list[int | None], list[int]] | None:
    """Which axes of the parameter hold the channels and are summed, or None."""
    found: list[int | None] = []
    for start in range(len(shape_of(P) or ())):
        end: int | None = start
        for view in path:
            end = None if end is None else carried_axis(view, end)
        found.append(end)
    if len(channels.axes) != 1 or any(i not in found for i in gone):
        return None
    mapped = [axes[i] if i is not None else None for i in found]
    # An axis of picked rows has no place of its own in the parameter.
    kept = [a if a in channels.axes else None for a in mapped]
    return (kept, [found.index(i) for i in gone]) if any(a is not None for a in kept) else None


def _attended(read: Reading) -> Carried | str:
    node, value = read.node, read.arg("value")
    slots = [name for name in ("query", "key", "attn_mask") if read.held(read.arg(name))]
    beside = tuple((read.arg(name), read.says(f"reads it as its {name}")) for name in slots)
    if read.held(value) is None:
        return beside[0][1]
    channels = read.carried[value]
    shape, rank = shape_of(value) or (), len(read.out)
    if read.arg("dropout_p") != 0.0:
        return read.says("drops entries at random")
    if len(shape) - 2 in channels.axes:
        return read.says("mixes its channels")
    if read.shift:
        words = attends_fully(node)
        if words:
            return Uneven.at(node, words)
    if read.arg("enable_gqa") and len(shape) - 3 in channels.axes:
        heads, out = fixed(shape[-3]), fixed(read.out[-3])
        if heads is None or out is None:
            return read.says("repeats an unknown number of heads")
        axis = len(shape) - 3
        if out != heads:
            again = aten.repeat_interleave.self_int
            channels = channels.call(again, out // heads, axis, axes=channels.axes)
            shape = (*shape[:-3], out, *shape[-2:])
    new = rank - len(shape)
    sizes = [1] * new + list(channels.idx.shape)
    moved = channels.shaped(sizes, {a + new for a in channels.axes})
    return Carried(broadcast(moved, [1] * new + list(shape), read.out), True, beside)


def _convolved(read: Reading) -> Channels | Sink | str:
    node, value, W = read.node, read.arg("input"), read.arg("weight")
    channels = read.carried.get(value)
    if channels is None or not is_weight(W) or read.held(read.arg("bias")):
        return read.says("reads it as its weight, or has a computed one")
    taps = len(shape_of(W) or ()) - 2
    axis = len(shape_of(value) or ()) - taps - 1
    if channels.axes != {axis}:
        return read.says("slides over its channels")
    padding = read.arg("padding")
    padded = (
        any(n != 0 for n in padding)
        if isinstance(padding, list | tuple)
        else (padding not in (0, "valid"))
    )
    if read.shift and padded:
        return read.says("pads rows that do not carry the shift")
    groups, inputs = read.arg("groups"), fixed((shape_of(value) or ())[axis])
    if groups == 1:
        axes = (None, axis, *[None] * taps)
        summed = tuple(range(1, taps + 2))
        return Sink(node, value, channels, W, "weight", axes, summed, (0,))
    if groups != inputs or read.shift or read.arg("bias") is not None:
        return read.says("works on groups of channels")
    times = int((shape_of(W) or ())[0]) // groups
    if times == 1:
        return channels
    return channels.call(aten.repeat_interleave.self_int, times, axis, axes={axis})


def _by_group(read: Reading) -> Sink | str:
    """Rows in groups, each times its own matrix."""
    node, slots = read.node, schema_names(read.node.target)
    value, W = read.arg(slots[0]), read.arg(slots[1])
    channels = read.carried.get(value)
    shapes = len(shape_of(value) or ()), len(shape_of(W) or ())
    if channels is None or not is_weight(W) or shapes != (2, 3) or channels.axes != {1}:
        return read.says("is no product of rows with a weight for each group")
    if read.shift or ("bias" in slots and read.arg("bias") is not None):
        return read.says("has no bias that differs from group to group")
    return Sink(node, value, channels, W, slots[1], (None, 1, None), (1,), (None, None))


def product_rule(node: fx.Node) -> Callable[[Reading], Any] | None:
    """The rule of an operator that is a product, None for any other."""
    # Libraries register it under names of their own where torch has no kernel.
    by_group = "grouped_mm" in op_name(node) and len(schema_names(node.target)) > 1
    return _by_group if by_group else PRODUCTS.get(node.target)


PRODUCTS: Mapping[Any, Callable[[Reading], Any]] = {
    **dict.fromkeys((*FACTORS, aten.einsum.default), _multiplied),
    aten.scaled_dot_product_attention.default: _attended,
    **dict.fromkeys(CONVS, _convolved),
}
