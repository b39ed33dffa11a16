"""Which channel of a vector each entry of a view belongs to: views are run on the numbers.

`numbering.py` has the numbers themselves, and how a vector is spread over a value by them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.axes import Shape, fingerprint, groups, is_one
from lensfx.analysis.numbering import (
    FILL,
    Channels,
    broadcast,
    fixed,
    joined,
    replay,
    seed,
)
from lensfx.graph.node import arguments, dtype_of, is_op, op_name, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, METADATA_READS, hook_point

__all__ = ["FILL", "Channels", "broadcast", "fixed", "joined", "replay", "seed", "through"]

aten = torch.ops.aten


def through(reader: fx.Node, source: fx.Node, channels: Channels) -> Channels | str:
    """The channels of a view, cast or part of `source`, or why they cannot be told."""
    unknown = f"no rule for {op_name(reader)} at %{reader.name}; nothing is assumed"
    if not reader.args or reader.args[0] is not source or _read_otherwise(reader, source):
        return f"%{reader.name} ({op_name(reader)}) reads it in another way than as its first input"
    if is_op(reader, operator.getitem):
        part = reader.args[1]
        known = isinstance(part, int) and channels.parts
        return channels.parts[part] if known else unknown  # type: ignore[index]
    rule = _RULES.get(reader.target)
    if rule is None:
        return unknown
    return rule(_View(reader, shape_of(source) or (), shape_of(reader) or (), channels))


def _read_otherwise(reader: fx.Node, source: fx.Node) -> bool:
    # `x.type_as(x)`, `x.expand_as(x)` read only the sizes or the dtype of the second.
    rest = pytree.tree_leaves((reader.args[1:], reader.kwargs))
    return source in rest and reader.target not in METADATA_READS


@dataclass(frozen=True)
class _View:
    """A reader of a value with known channels, its shape before and after."""

    node: fx.Node
    before: Shape
    after: Shape
    channels: Channels

    def arg(self, name: str, default: Any = None) -> Any:
        return arguments(self.node).get(name, default)

    def dim(self, name: str = "dim") -> int:
        return int(self.arg(name, 0)) % max(1, len(self.before))

    def says(self, words: str) -> str:
        return f"%{self.node.name} {words}"


_Rule = Callable[[_View], Channels | str]


def _same(view: _View) -> Channels | str:
    node = view.node
    if node.target in DROPOUTS and view.arg("train"):
        return view.says("drops entries at random")
    kind = dtype_of(node)
    if kind is not None and not (kind.is_floating_point or kind.is_complex):
        return view.says(f"turns it into {kind}")
    return replace(view.channels, parts=())


def _reshape(view: _View) -> Channels | str:
    """Groups of axes that hold channels keep their numbers, all others stay of size 1."""
    channels, old = view.channels, set(view.channels.axes)
    wide, sizes, axes = list(channels.idx.shape), [1] * len(view.after), set[int]()
    for ins, outs in groups(view.before, view.after):
        if old.isdisjoint(ins):
            continue
        for a in ins:
            size = fixed(view.before[a])
            if size is None:
                words = f"merges the channels with axis {a} of unknown size {view.before[a]}"
                return view.says(words)
            wide[a] = size
        for a in outs:
            size = fixed(view.after[a])
            if size is None:
                return view.says(f"splits the channels into axis {a} of unknown size")
            sizes[a] = size
        axes.update(outs)
    if any(is_one(view.before[a]) for a in old):
        # A channel axis of size 1 may be any of those that are of size 1 afterwards.
        axes.update(a for a, size in enumerate(view.after) if is_one(size))
    if wide != list(channels.idx.shape):
        channels = channels.call(aten.expand.default, wide, axes=old)
    return channels.shaped(sizes, axes)


def _permute(view: _View) -> Channels | str:
    args = list(arguments(view.node).values())[1:]
    # Tried once on a tensor whose sizes tell its axes apart.
    told_apart = torch.empty(tuple(range(2, len(view.before) + 2)), device="meta")
    order = [size - 2 for size in view.node.target(told_apart, *args).shape]  # type: ignore[operator]
    axes = [i for i, a in enumerate(order) if a in view.channels.axes]
    return view.channels.call(aten.permute.default, order, axes=axes)


def _kept(view: _View, axis: int) -> frozenset[int]:
    return frozenset(a - (a > axis) for a in view.channels.axes if a != axis)


def _select(view: _View) -> Channels | str:
    dim, index = view.dim(), view.arg("index")
    if dim not in view.channels.axes:
        return view.channels.call(aten.select.int, dim, 0, axes=_kept(view, dim))
    if not isinstance(index, int):
        return view.says("selects a channel by a computed number")
    return view.channels.call(aten.select.int, dim, index, axes=_kept(view, dim))


def _on_axis(*names: str) -> _Rule:
    """The rule of operators that work along `dim`; `names` are their arguments in order."""

    def rule(view: _View) -> Channels | str:
        if view.arg("dim") is None:
            return view.says("works on all entries in a row")
        if view.dim() not in view.channels.axes:
            return replace(view.channels, parts=())
        given = [view.arg(name) for name in names]
        if any(isinstance(g, fx.Node | torch.SymInt) for g in given):
            return view.says("picks channels by computed numbers")
        return view.channels.call(view.node.target, *given, axes=view.channels.axes)

    return rule


def _on_data(view: _View) -> Channels | str:
    """Rows picked or moved by a tensor along axes without channels."""
    dims = view.arg("dims", view.arg("dim"))
    if dims is None or dims == []:
        return view.says("works on all entries in a row")
    many = {d % len(view.before) for d in ([dims] if isinstance(dims, int) else dims)}
    if many & view.channels.axes:
        return view.says("picks or moves channels")
    for a in view.channels.axes:
        if fingerprint(view.before[a]) != fingerprint(view.after[a]):
            return view.says("leaves out channels")
    return replace(view.channels, parts=())


def _flip(view: _View) -> Channels | str:
    dims = [d % len(view.before) for d in view.arg("dims")]
    return view.channels.call(aten.flip.default, dims, axes=view.channels.axes)


def _split(view: _View) -> Channels | str:
    dim, channels, parts = view.dim(), view.channels, []
    sizes = [part.shape[dim] for part in view.node.meta["val"]]
    if dim not in channels.axes:
        return replace(channels, parts=(replace(channels, parts=()),) * len(sizes))
    start = 0
    for size in map(fixed, sizes):
        if size is None:
            return view.says("splits the channels into parts of unknown size")
        parts.append(channels.call(aten.slice.Tensor, dim, start, start + size, axes=channels.axes))
        start += size
    return replace(channels, parts=tuple(parts))


def _unbind(view: _View) -> Channels | str:
    dim, channels = view.dim(), view.channels
    axes, held = _kept(view, dim), dim in channels.axes
    places = [i if held else 0 for i, _ in enumerate(view.node.meta["val"])]
    parts = [channels.call(aten.select.int, dim, i, axes=axes) for i in places]
    return replace(channels, parts=tuple(parts))


def _expand(view: _View) -> Channels | str:
    return broadcast(view.channels, view.before, view.after)


def _repeat(view: _View) -> Channels | str:
    given = list(view.arg("repeats", view.arg("dims")))
    repeats = [1] * (len(view.after) - len(given)) + given
    new = len(view.after) - len(view.before)
    axes = {a + new for a in view.channels.axes}
    if any(not isinstance(repeats[a], int) for a in axes):
        return view.says("repeats the channels a computed number of times")
    counts = [n if a in axes else 1 for a, n in enumerate(repeats)]
    return view.channels.call(aten.repeat.default, counts, axes=axes)


def _index(view: _View) -> Channels | str:
    """Rows picked by tensors: the axes of those tensors stand in for the axes they pick from."""
    axis, kept, places = 0, list[int](), list[int]()
    for given in view.arg("indices"):
        if given is None:
            kept.append(axis)
            axis += 1
            continue
        masks = dtype_of(given) in (torch.bool, torch.uint8)
        width = len(shape_of(given) or ()) if masks else 1
        if not view.channels.axes.isdisjoint(range(axis, axis + width)):
            return view.says("picks channels by a tensor")
        places.append(len(kept))
        axis += width
    kept.extend(range(axis, len(view.before)))
    new = len(view.after) - len(kept)
    # Indices that are not side by side put their axes first.
    at = places[0] if len(set(places)) == 1 else 0
    order: list[int | None] = [*kept[:at], *([None] * new), *kept[at:]]
    sizes = [1 if a is None else view.channels.idx.shape[a] for a in order]
    return view.channels.shaped(sizes, [i for i, a in enumerate(order) if a in view.channels.axes])


def _ops(names: str) -> tuple[Any, ...]:
    pairs = (name.partition(".") for name in names.split())
    return tuple(getattr(getattr(aten, op), overload or "default") for op, _, overload in pairs)


_FAMILIES: tuple[tuple[_Rule, tuple[Any, ...]], ...] = (
    (_same, (*CASTS, *DROPOUTS, hook_point)),
    (_same, _ops("contiguous clone alias detach lift_fresh_copy")),
    (
        _reshape,
        _ops(
            "reshape view _unsafe_view view_as reshape_as flatten.using_ints unflatten.int "
            "unsqueeze squeeze squeeze.dim squeeze.dims"
        ),
    ),
    (
        _permute,
        _ops("transpose.int permute t mT numpy_T swapaxes swapdims movedim.int movedim.intlist"),
    ),
    (_select, _ops("select.int")),
    (_on_axis("dim", "start", "end", "step"), _ops("slice.Tensor")),
    (_on_axis("dim", "start", "length"), _ops("narrow")),
    (_on_axis("repeats", "dim"), _ops("repeat_interleave.self_int")),
    (_on_data, _ops("repeat_interleave.self_Tensor index_select gather roll")),
    (_flip, _ops("flip")),
    (
        _split,
        _ops(
            "split.Tensor split.sizes split_with_sizes chunk tensor_split.sections "
            "tensor_split.indices"
        ),
    ),
    (_unbind, _ops("unbind.int")),
    (_expand, _ops("expand expand_as broadcast_to")),
    (_repeat, _ops("repeat tile")),
    (_index, _ops("index.Tensor")),
)

_RULES: dict[Any, _Rule] = {op: rule for rule, ops in _FAMILIES for op in ops}
