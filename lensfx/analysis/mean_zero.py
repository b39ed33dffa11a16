"""What has mean zero along an axis, or where its mean comes from: a fact that flows forward.

A layer norm without scale and shift takes the mean out, and so does x - mean(x); sums, products
with what does not vary along the axis, views and linear maps into it keep it out. What nothing is
known of is a source of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis.axes import (
    Axes,
    Carry,
    Read,
    carry_identity,
    groups,
    indexed,
    is_one,
    lifted,
    order_of,
    same_size,
)
from lensfx.analysis.constants import Constants, owner_of, sizes
from lensfx.analysis.gauge import is_copy
from lensfx.analysis.products import product
from lensfx.analysis.transfer import FILLED, TABLE, number
from lensfx.graph.node import argument, is_op, is_weight, schema_names
from lensfx.graph.program import Formula

__all__ = ["Part", "mean_parts", "mean_sources"]

aten = torch.ops.aten

Part = tuple[fx.Node, int]
Parts = list[Part] | None


def mean_sources(
    value: fx.Node,
    axis: int,
    *,
    formulas: Mapping[str, Formula] | None = None,
    centred: Collection[tuple[fx.Node, fx.Node]] = (),
) -> tuple[fx.Node, ...]:
    """The values that bring a mean along `axis` into `value`; none if its mean there is zero.

    A weight that does is named by the first node that computes with it. `formulas`: stored weights
    are taken for what they were folded from. `centred` holds (weight, its reader) or (value, value)
    that are to be taken for centred.
    """
    const, taken = Constants(), frozenset(centred)
    start = (value, axis % len(sizes(value)), value)
    seen, stack = {start}, [start]
    found: dict[fx.Node, None] = {}
    while stack:
        node, at, owner = stack.pop()
        if (node, owner) in taken:
            continue
        stored = node.op == "get_attr" and node.graph is value.graph
        formula = formulas.get(str(node.target)) if formulas and stored else None
        if formula is not None:
            parts: Parts = [(formula.graph.output_node().all_input_nodes[0], at)]
        else:
            parts = mean_parts(node, at, const)
        for part, where in parts or ():
            entry = (part, where, owner if is_weight(part) else part)
            if entry not in seen:
                seen.add(entry)
                stack.append(entry)
        if parts is None:
            found[owner] = None
    return tuple(found)


def mean_parts(node: fx.Node, axis: int, const: Callable[[fx.Node], Axes] | None = None) -> Parts:
    """What must have mean zero, and along which axis, for `node` to have it along `axis`.

    None if nothing is known to be enough. `const` gives the axes along which a value is constant.
    """
    owner, part = owner_of(node)
    if owner.op != "call_function" or not node.meta["val"].is_floating_point():
        return None
    if owner.target in _ZEROS or (owner.target in FILLED and number(owner) == 0):
        return []
    family = TABLE.get(owner.target)
    rule = None if family is None else _RULES.get(family.name)
    if rule is None or not sizes(node):
        return None
    return rule(_Ask(node, owner, axis, Constants() if const is None else const, part))


_ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})


@dataclass(frozen=True)
class _Ask:
    """Whether `node` has mean zero along `axis`; `call` is the operator that it is a result of."""

    node: fx.Node
    call: fx.Node
    axis: int
    const: Callable[[fx.Node], Axes]
    item: int | None

    def arg(self, name: str, default: Any = None) -> Any:
        known = name in schema_names(self.call.target)
        return argument(self.call, name) if known else default

    @property
    def source(self) -> fx.Node:
        first: Any = self.call.args[0]
        return first

    @property
    def rank(self) -> int:
        return len(sizes(self.source))

    def dims(self, name: str = "dim") -> Axes | None:
        dim = self.arg(name)
        if dim is None or dim == []:
            return None
        return frozenset(d % self.rank for d in ((dim,) if isinstance(dim, int) else dim))

    def of(self, operand: Any) -> Parts:
        """The operand itself, if it is not broadcast along the axis; a number must be 0."""
        if not isinstance(operand, fx.Node):
            return [] if operand in (None, 0) else None
        own = self.axis - len(sizes(self.node)) + len(sizes(operand))
        if own < 0 or (is_one(sizes(operand)[own]) and not is_one(sizes(self.node)[self.axis])):
            return [] if number(operand) == 0 else None
        return [(operand, own)]

    def same(self, operand: Any) -> bool:
        """Whether an operand does not vary along the axis."""
        if not isinstance(operand, fx.Node):
            return True
        return self.axis in lifted(self.const(operand), sizes(operand), sizes(self.node))


def _all(parts: Iterable[Parts]) -> Parts:
    found: list[Part] = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _identity(ask: _Ask) -> Parts:
    read = Read(ask.call, "self", ask.source, frozenset(), ask.const)
    return [(ask.source, ask.axis)] if isinstance(carry_identity(read), Carry) else None


def _reshape(ask: _Ask) -> Parts:
    # The mean over merged axes is zero if it is along one of them.
    for ins, outs in groups(sizes(ask.source), sizes(ask.node)):
        if outs == (ask.axis,) and ins:
            return [(ask.source, ins[-1])]
    return None


def _permute(ask: _Ask) -> Parts:
    return [(ask.source, order_of(ask.call, ask.rank)[ask.axis])]


def _select(ask: _Ask) -> Parts:
    dim = ask.arg("dim") % ask.rank
    return [(ask.source, ask.axis + (ask.axis >= dim))]


def _same_axes(ask: _Ask) -> Parts:
    dims = ask.dims("dims" if "dims" in schema_names(ask.call.target) else "dim")
    moved = is_op(ask.call, aten.flip.default, aten.roll.default)
    if dims is None or (ask.axis in dims and not moved):
        return None
    return [(ask.source, ask.axis)]


def _expand(ask: _Ask) -> Parts:
    own = ask.axis - len(sizes(ask.node)) + ask.rank
    if own < 0 or is_one(sizes(ask.source)[own]):
        return None
    repeats = is_op(ask.call, aten.repeat.default, aten.tile.default)
    kept = repeats or same_size(sizes(ask.source)[own], sizes(ask.node)[ask.axis])
    return [(ask.source, own)] if kept else None


def _index(ask: _Ask) -> Parts:
    old = indexed(ask.arg("indices"), ask.rank, len(sizes(ask.node))).order[ask.axis]
    return None if old is None else [(ask.source, old)]


def _embedding(ask: _Ask) -> Parts:
    last = ask.axis == len(sizes(ask.node)) - 1
    return [(ask.arg("weight"), 1)] if last else None


def _add(ask: _Ask) -> Parts:
    if is_op(ask.call, aten.neg.default):
        return [(ask.source, ask.axis)]
    x, mean = ask.arg("self"), ask.arg("other")
    if is_op(ask.call, aten.sub.Tensor) and ask.arg("alpha") == 1 and _is_mean(ask, mean, x):
        return []
    return _all((ask.of(x), ask.of(mean)))


def _is_mean(ask: _Ask, mean: Any, x: fx.Node) -> bool:
    while isinstance(mean, fx.Node) and mean.args and isinstance(mean.args[0], fx.Node):
        if not is_copy(mean, mean.args[0]):
            break
        mean = mean.args[0]
    if not is_op(mean, aten.mean.dim) or mean.args[0] is not x or not argument(mean, "keepdim"):
        return False
    rank = len(sizes(x))
    dims = {d % rank for d in argument(mean, "dim") or range(rank)}
    same = rank == len(sizes(ask.node))
    return same and {d for d in dims if not is_one(sizes(x)[d])} == {ask.axis}


def _mul(ask: _Ask) -> Parts:
    x, y = ask.arg("self"), ask.arg("other")
    if ask.same(y):
        return ask.of(x)
    return ask.of(y) if ask.same(x) else None


def _div(ask: _Ask) -> Parts:
    if ask.arg("rounding_mode") is not None or not ask.same(ask.arg("other")):
        return None
    return ask.of(ask.arg("self"))


def _mask(ask: _Ask) -> Parts:
    if not ask.same(ask.arg("mask", ask.arg("condition"))):
        return None
    return _all((ask.of(ask.arg("self")), ask.of(ask.arg("other", ask.arg("value")))))


def _cat(ask: _Ask) -> Parts:
    return [(t, ask.axis) for t in ask.arg("tensors")]


def _stack(ask: _Ask) -> Parts:
    dim = ask.arg("dim") % len(sizes(ask.node))
    if dim == ask.axis:
        return None
    return [(t, ask.axis - (ask.axis > dim)) for t in ask.arg("tensors")]


def _pad(ask: _Ask) -> Parts:
    behind = 2 * (ask.rank - 1 - ask.axis)
    own = ask.arg("pad")[behind : behind + 2]
    plain = ask.arg("mode", "constant") == "constant" and not ask.arg("value")
    kept = all(isinstance(n, int) and n >= 0 for n in own)
    return [(ask.source, ask.axis)] if plain and kept else None


def _sum(ask: _Ask) -> Parts:
    dims = ask.dims()
    if dims is None:
        return None
    left = [a for a in range(ask.rank) if a not in dims or ask.arg("keepdim")]
    own = left[ask.axis]
    return None if own in dims else [(ask.source, own)]


def _normed(ask: _Ask) -> set[int]:
    first = ask.rank - len(ask.arg("normalized_shape"))
    return {a for a in range(first, ask.rank) if not is_one(sizes(ask.source)[a])}


def _layer_norm(ask: _Ask) -> Parts:
    over = _normed(ask)
    if ask.arg("weight") is not None or ask.axis not in over:
        return None
    x: Parts = [] if over == {ask.axis} else [(ask.source, ask.axis)]
    return _all((x, ask.of(ask.arg("bias"))))


def _rms_norm(ask: _Ask) -> Parts:
    kept = ask.arg("weight") is None and ask.axis in _normed(ask)
    return [(ask.source, ask.axis)] if kept else None


def _attention(ask: _Ask) -> Parts:
    value = ask.arg("value")
    last = ask.axis == len(sizes(ask.node)) - 1
    return [(value, len(sizes(value)) - 1)] if last else None


def _product(ask: _Ask) -> Parts:
    found = product(ask.call)
    if found is None:
        return None
    label = found.out[ask.axis]
    having = [(x, labels.index(label)) for x, labels in found.terms if labels.count(label)]
    if any(labels.count(label) > 1 for _, labels in found.terms):
        return None
    varied = [(x, a) for x, a in having if a not in ask.const(x)]
    if len(varied) != 1:
        return None
    target: Any = ask.call.target
    added = [ask.arg(name) for name in _ADDED.get(target, ())]
    return _all((list(varied), *map(ask.of, added)))


_ADDED = {
    aten.linear.default: ("bias",),
    aten.addmm.default: ("self",),
    aten.baddbmm.default: ("self",),
}
_RULES: dict[str, Callable[[_Ask], Parts]] = {
    "identity": _identity,
    "reshape": _reshape,
    "permute": _permute,
    "select": _select,
    "same axes": _same_axes,
    "expand": _expand,
    "index": _index,
    "embedding": _embedding,
    "add": _add,
    "mul": _mul,
    "div": _div,
    "mask": _mask,
    "cat": _cat,
    "stack": _stack,
    "pad": _pad,
    "sum": _sum,
    "layer norm": _layer_norm,
    "rms norm": _rms_norm,
    "attention": _attention,
    **dict.fromkeys(("linear", "matmul", "addmm", "baddbmm", "einsum"), _product),
}
