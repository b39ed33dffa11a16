"""The two products of weights that an attention makes: queries with keys, values with outputs.

Channels are followed from each projection to where they meet, so that the rows of its weight are
known head by head, however they were split, joined and moved on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lensfx.analysis.channels import Channels, fixed, seed, through
from lensfx.graph.node import argument, is_op, is_weight, op_name, shape_of
from lensfx.graph.ops import CASTS, DROPOUTS, VIEWS, is_hook, readers
from lensfx.graph.program import Program
from lensfx.rewrite import Miss

__all__ = ["Circuit", "Side", "circuits"]

aten = torch.ops.aten
_FUSED = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
_POINTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.tanh.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)


@dataclass(frozen=True)
class Side:
    """One factor: a linear op, and which channels each head has, `[groups, heads, width]`.

    They are rows of its weight, columns if the linear op reads the heads (`reads`). `values` are
    those between it and the other factor that hold any of its channels, with their numbers.
    """

    linear: fx.Node
    rows: torch.Tensor
    values: tuple[tuple[fx.Node, Channels], ...]
    reads: bool = False


@dataclass(frozen=True)
class Circuit:
    """A product of two weights inside an attention: `left` has heads that share one of `right`.

    `kind` is QK or OV, `kept` are values behind it that do not depend on how it is factored.
    """

    kind: str
    core: fx.Node
    left: Side
    right: Side
    kept: tuple[fx.Node, ...]


class _Refused(Exception):
    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.miss = Miss(reason, node, at_site=True)


@dataclass(frozen=True)
class _Sight:
    """`reader` has `value` as an operand and is no view of it; `channels` are those of `value`."""

    reader: fx.Node
    value: fx.Node
    channels: Channels
    reason: str


def circuits(program: Program) -> Iterator[Circuit | Miss]:
    """Every circuit of every attention, or the node that forbids to factor it anew."""
    for core in program.graph.find_nodes(op="call_function", target=_FUSED):
        q, k, v = (argument(core, n) for n in ("query", "key", "value"))
        yield from _both(_Attention(core, q, k, v, core, core))
    for target in _SOFTMAX:
        for softmax in program.graph.find_nodes(op="call_function", target=target):
            found = _written(softmax)
            if isinstance(found, Miss):
                yield found
            elif found is not None:
                yield from _both(found)


@dataclass(frozen=True)
class _Attention:
    """Where queries meet keys (`scores`), and the pattern values (`z`); both a fused call's own."""

    core: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scores: fx.Node
    z: fx.Node

    @property
    def fused(self) -> bool:
        return self.scores is self.z


def _written(softmax: fx.Node) -> _Attention | Miss | None:
    """The attention around a softmax that is written out."""
    scores: Any = softmax.args[0]
    z = softmax
    while is_op(scores, *_POINTWISE, *VIEWS, *CASTS) or (
        isinstance(scores, fx.Node) and is_hook(scores)
    ):
        live = [n for n in scores.all_input_nodes if _is_live(n)]
        if not live:
            return None
        scores = live[0]
    if is_op(scores, aten.einsum.default):
        return Miss("its scores are an einsum, of which the two sides are not told", scores, True)
    if not is_op(scores, *_PRODUCTS):
        return None
    while not is_op(z, *_PRODUCTS):
        after = readers(z)
        plain = is_op(z, softmax.target, *VIEWS, *CASTS, *DROPOUTS) or is_hook(z)
        if len(after) != 1 or not plain:
            return None
        z = after[0]
    at = 1 if is_op(scores, aten.baddbmm.default) else 0
    q, k = scores.args[at], scores.args[at + 1]
    v = z.args[1]
    nodes = [n for n in (q, k, v) if isinstance(n, fx.Node)]
    if len(nodes) < 3 or is_op(z, aten.baddbmm.default):
        return None
    return _Attention(scores, nodes[0], nodes[1], nodes[2], scores, z)


def _is_live(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_floating_point() and not is_weight(node)


def _both(a: _Attention) -> Iterator[Circuit | Miss]:
    found: list[Circuit | Miss] = []
    for make in (_value_output, _query_key):
        try:
            found.append(make(a))
        except _Refused as refused:
            found.append(refused.miss)
    behind, first = found
    if isinstance(first, Circuit) and a.fused:
        # What the fused call gives changes if values are factored too; what reads it does not.
        first = replace(first, kept=behind.kept if isinstance(behind, Circuit) else (a.core,))
    yield from (first, behind)


def _query_key(a: _Attention) -> Circuit:
    q, k = _traced(a.q, a.scores), _traced(a.k, a.scores)
    right = k[2].idx if a.fused else k[2].idx.mT
    left, right = q[2].idx, _grouped(a, right)
    heads, shared = _pairs(a.scores, left, right)
    one, other = Side(q[0], heads, q[1]), Side(k[0], shared, k[1])
    return Circuit("QK", a.core, one, other, () if a.fused else (a.scores,))


def _value_output(a: _Attention) -> Circuit:
    linear, values, channels = _traced(a.v, a.z)
    idx = _grouped(a, channels.idx)
    if idx.shape[-2] != 1:
        raise _Refused("its values have channels along the positions", a.z)
    count = idx.numel()
    axes = [i for i, n in enumerate(idx.shape) if n > 1]
    numbers = Channels(torch.arange(count), frozenset({0}), count).shaped(list(idx.shape), axes)
    path: list[tuple[fx.Node, Channels]] = [(a.z, numbers)]
    sights = list(_sights(a.z, numbers, path))
    for sight in sights:
        reads = is_op(sight.reader, aten.linear.default) and sight.value is sight.reader.args[0]
        if not reads or not is_weight(argument(sight.reader, "weight")):
            raise _Refused(sight.reason or f"{op_name(sight.reader)} reads it", sight.reader)
    if len(sights) != 1:
        raise _Refused(f"{len(sights)} linear ops read it", sights[-1].reader if sights else a.z)
    (sight,) = sights
    columns = sight.channels.idx.flatten().argsort()
    found = sight.channels
    every = found.idx.flatten().sort().values.equal(torch.arange(count))
    if not every or found.axes != {sight.value.meta["val"].ndim - 1}:
        raise _Refused("it does not read every channel of every head once", sight.reader)
    heads, shared = _pairs(a.z, columns[numbers.idx], idx)
    held = tuple((n, replace(c, idx=columns[c.idx])) for n, c in path)
    out = Side(sight.reader, heads, held, reads=True)
    return Circuit("OV", a.core, out, Side(linear, shared, values), (sight.reader,))


def _grouped(a: _Attention, idx: torch.Tensor) -> torch.Tensor:
    """The channels of keys or values once for each query head that reads them."""
    if not a.fused or not argument(a.core, "enable_gqa"):
        return idx
    heads = fixed((shape_of(a.q) or ())[-3])
    if heads is None:
        raise _Refused("its number of heads is not fixed", a.core)
    return idx.repeat_interleave(heads // idx.shape[-3], -3)


def _traced(
    value: fx.Node, reader: fx.Node
) -> tuple[fx.Node, tuple[tuple[fx.Node, Channels], ...], Channels]:
    """The projection that an operand comes from, what lies between, the operand's channels.

    Raises: _Refused if anything but views lies between, or if anything else reads its channels.
    """
    source = value
    while not is_op(source, aten.linear.default):
        if not source.args or not isinstance(source.args[0], fx.Node):
            raise _Refused(f"{op_name(source)} stands before it, which is no projection", source)
        source = source.args[0]
    if not is_weight(argument(source, "weight")):
        raise _Refused("its weight is computed from the input", source)
    size = fixed((shape_of(source) or (1,))[-1])
    if size is None:
        raise _Refused("its width is not fixed", source)
    start = seed(source, -1)
    path: list[tuple[fx.Node, Channels]] = [(source, start)]
    sights = list(_sights(source, start, path))
    own = [s for s in sights if s.reader is reader and s.value is value]
    if len(own) != 1:
        blame = next((s for s in sights if s.reason), sights[0])
        raise _Refused(blame.reason or f"{op_name(blame.reader)} reads it", blame.reader)
    mine = set(own[0].channels.idx.flatten().tolist())
    for s in sights:
        if s is not own[0] and not mine.isdisjoint(s.channels.idx.flatten().tolist()):
            raise _Refused(f"{op_name(s.reader)} reads channels of it as well", s.reader)
    held = tuple((n, c) for n, c in path if not mine.isdisjoint(c.idx.flatten().tolist()))
    return source, held, own[0].channels


def _sights(
    value: fx.Node, channels: Channels, path: list[tuple[fx.Node, Channels]]
) -> Iterator[_Sight]:
    """Who reads channels of a value behind views, casts, and products with single numbers."""
    stack = [(value, channels)]
    while stack:
        node, known = stack.pop()
        for reader in readers(node):
            found = known if _is_number_times(reader, node) else through(reader, node, known)
            if isinstance(found, str):
                if is_op(reader, aten.mul.Tensor, aten.div.Tensor):
                    found = "each channel is multiplied by a number of its own: rotary, a gate"
                yield _Sight(reader, node, known, found)
                continue
            path.append((reader, replace(found, parts=()) if not found.parts else found))
            stack.append((reader, found))


def _is_number_times(reader: fx.Node, node: fx.Node) -> bool:
    if is_op(reader, aten.mul.Scalar, aten.div.Scalar):
        return True
    if not is_op(reader, aten.mul.Tensor, aten.div.Tensor):
        return False
    others = [a for a in reader.args if a is not node]
    left = is_op(reader, aten.mul.Tensor) or reader.args[0] is node
    return (
        left
        and len(others) == 1
        and not (isinstance(others[0], fx.Node) and shape_of(others[0]) != ())
    )


def _pairs(node: fx.Node, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Which channels meet: `[groups, heads, width]` of the left, `[groups, 1, width]` right."""
    if left.shape[-2] != 1 or right.shape[-2] != 1 or left.shape[-1] != right.shape[-1]:
        raise _Refused("its heads are not along axes of their own", node)
    left, right = torch.broadcast_tensors(left, right)
    width = left.shape[-1]
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    rows = zip(left.reshape(-1, width).tolist(), right.reshape(-1, width).tolist(), strict=True)
    for one, other in rows:
        groups.setdefault(tuple(other), []).append(tuple(one))
    sizes = {len(heads) for heads in groups.values()}
    flat = [c for heads in groups.values() for head in heads for c in head]
    shared = [c for other in groups for c in other]
    if len(sizes) != 1:
        raise _Refused("its keys serve different numbers of heads", node)
    if len({*flat}) != len(flat) or len({*shared}) != len(shared) or min(flat + shared) < 0:
        raise _Refused("its heads share channels", node)
    return torch.tensor(list(groups.values())), torch.tensor([[other] for other in groups])
