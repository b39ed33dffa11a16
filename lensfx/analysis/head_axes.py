"""How the heads of an attention lie where its output projection reads them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import fx

from lensfx.analysis.channels import Channels, through
from lensfx.analysis.structure import AttentionBranch, Place
from lensfx.graph.node import argument, shape_of
from lensfx.graph.ops import data_inputs
from lensfx.graph.views import same_shape
from lensfx.rewrite import Miss

__all__ = ["heads_of"]


def heads_of(attention: AttentionBranch) -> tuple[int, int] | Miss:
    """The number of heads and their width, if the projection reads them one after the other.

    The channels are followed from where they are told apart. What keeps the shape of a value,
    as a gate or a norm does, keeps each of them where it is.
    """
    out, place = attention.out, attention.z
    heads, width = attention.heads, attention.value_width
    if out is None or place is None or heads is None or width is None:
        where = out or (attention.nodes[0] if place is None else place.node)
        return Miss("its heads have no axis of their own that is known", where, at_site=True)
    x = argument(out, "input")
    channels = _start(place, heads, width)
    if channels is None:
        return Miss(f"{place.node.name} does not have {heads} heads of {width}", out, at_site=True)
    path = _path(place.node, x)
    if path is None:
        return Miss(f"{out.name} does not read {place.node.name} through views", out, at_site=True)
    for source, node in pairwise(path):
        found = through(node, source, channels)
        if isinstance(found, str):
            if not same_shape(shape_of(source) or (), shape_of(node) or ()):
                return Miss(found, node, at_site=True)
        else:
            channels = found
    if not channels.in_order or channels.axes != {len(shape_of(x) or ()) - 1}:
        return Miss(f"{out.name} does not read the heads one after the other", out, at_site=True)
    return heads, width


def _start(place: Place, heads: int, width: int) -> Channels | None:
    """The channels of all heads in order, laid out as the place says."""
    parts = [1] * len(shape_of(place.node) or ())
    for axis, sizes in place.layout.splits:
        parts[axis] = len(sizes)
    owner = [axis for axis, count in enumerate(parts) for _ in range(count)]
    order = place.layout.order or tuple(range(len(owner)))
    if len(order) < 2:
        return None
    by_head, by_width = order[-2:]
    idx = torch.arange(heads * width).reshape(heads, width)
    shape = [heads if a == by_head else width if a == by_width else 1 for a in range(len(owner))]
    idx = (idx if by_head < by_width else idx.t()).reshape(shape)
    whole = [
        math.prod(size for size, own in zip(shape, owner, strict=True) if own == axis)
        for axis in range(len(parts))
    ]
    axes = frozenset({owner[by_head], owner[by_width]})
    return Channels(idx.reshape(whole), axes, heads * width)


def _path(start: fx.Node, end: fx.Node) -> list[fx.Node] | None:
    """The values from one to another, each read by the next."""
    found: dict[fx.Node, fx.Node | None] = {end: None}
    queue = [end]
    for node in queue:
        if node is start:
            path: list[fx.Node] = []
            step: fx.Node | None = node
            while step is not None:
                path.append(step)
                step = found[step]
            return path
        for source in data_inputs(node):
            if source not in found and not source < start:
                found[source] = node
                queue.append(source)
    return None
