"""How a new value of a view becomes a new value of what it views."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from lensfx.capture.places import Place, equal_sizes, same_place, symbol_of
from lensfx.graph.node import argument, is_op, op_name
from lensfx.graph.ops import DROPOUTS

aten = torch.ops.aten


class Work(Protocol):
    """What an inverse may ask of the one who applies it."""

    def emit(self, root: Place, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node for the memory of `root`."""

    def shape(self, place: Place) -> list[int | fx.Node]:
        """The sizes of a place, as nodes where they are dynamic."""

    def size(self, root: Place, node: fx.Node, axis: int) -> int | fx.Node:
        """One size of a node."""


Undo = Callable[[Work, Place], fx.Node]
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def untouched_value(work: Work, place: Place) -> fx.Node:
    """The value itself: the view shows all of what it views."""
    return place.value


def detached_value(work: Work, place: Place) -> fx.Node:
    """The value without its gradient, as what it views has none."""
    return work.emit(place.root, aten.detach.default, place.value)


def scattered_value(work: Work, place: Place) -> fx.Node:
    """What is viewed, with the value put where the view looked."""
    target, args, kwargs = view_call(work, place)
    scatter = _SCATTERS[target]
    return work.emit(place.root, scatter, place.parent.value, place.value, *args, **kwargs)


def _permute(work: Work, place: Place) -> fx.Node:
    target, args, kwargs = view_call(work, place)
    rank = place.val.ndim
    # Each axis of the probe is known by its size, so one call tells where every axis goes.
    probe = target(torch.empty(*range(2, 2 + rank), device="meta"), *args, **kwargs)
    back = sorted(range(rank), key=lambda axis: int(probe.shape[axis]))
    return work.emit(place.root, aten.permute.default, place.value, back)


def _squeeze(work: Work, place: Place) -> fx.Node:
    return work.emit(place.root, aten.squeeze.dim, place.value, argument(place.node, "dim"))


def _reshape(work: Work, place: Place) -> fx.Node:
    return work.emit(place.root, aten.reshape.default, place.value, work.shape(place.parent))


_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_EXPANDS = ("expand", "expand_as", "broadcast_to")
INVERSES: dict[str, Undo] = {
    **dict.fromkeys(("slice", "select", "diagonal", "narrow", "unbind", "split"), scattered_value),
    **dict.fromkeys(("split_with_sizes", "chunk", "tensor_split"), scattered_value),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute", "movedim"), _permute),
    **dict.fromkeys(("moveaxis", "t", "numpy_T", "mT"), _permute),
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as", "flatten"), _reshape),
    **dict.fromkeys(("unflatten", "ravel", "squeeze", "atleast_1d", "atleast_2d"), _reshape),
    "atleast_3d": _reshape,
    "unsqueeze": _squeeze,
}


def inverse_of(node: fx.Node, before: torch.Tensor) -> tuple[Undo | None, str]:
    """How a new value of the view becomes one of what it views, or why that is not possible."""
    after, maker = node.meta["val"], node
    if node.target is operator.getitem:
        maker = node.all_input_nodes[0]
    name = op_name(maker)
    if same_place(before, after) or node.target in DROPOUTS:
        return (detached_value if name == "detach" else untouched_value), ""
    if before.dtype != after.dtype:
        return None, f"{name} reads the memory as another dtype"
    if name in _EXPANDS:
        if equal_sizes(*([s for s in v.shape if symbol_of(s) != 1] for v in (before, after))):
            return _reshape, ""
        return None, f"{name} lets several elements share one place in memory"
    undo = INVERSES.get(name)
    return undo, "" if undo else f"the view {name} has no inverse here"


def view_call(work: Work, place: Place) -> _Call:
    """The operator of a view and what it takes beside its input; a piece of a split is a slice."""
    node, root = place.node, place.root
    if is_op(node, aten.narrow.default):
        dim, start, length = (argument(node, n) for n in ("dim", "start", "length"))
        stop = _add(work, root, start, length)
        # A start from the end, as in (-2, 2), has no number for the end itself.
        return aten.slice.Tensor, (dim, start, None if start and stop == 0 else stop), {}
    if node.target is not operator.getitem:
        return node.target, node.args[1:], node.kwargs
    whole, index = node.args
    assert isinstance(whole, fx.Node)
    assert isinstance(index, int)
    dim, start, end = argument(whole, "dim"), 0, 0
    if is_op(whole, aten.unbind.int):
        return aten.select.int, (dim, index), {}
    for i, piece in enumerate(whole.meta["val"][: index + 1]):
        size = symbol_of(piece.shape[dim])
        if not isinstance(size, int):
            size = work.size(root, work.emit(root, operator.getitem, whole, i), dim)
        start, end = end, _add(work, root, end, size)
    return aten.slice.Tensor, (dim, start, end), {}


def _add(work: Work, root: Place, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else work.emit(root, operator.add, a, b)
