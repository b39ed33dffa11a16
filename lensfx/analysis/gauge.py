"""What no output can see: whether a shift of a value along some of its axes changes any output.

A query walks from the value to everything that reads it. Each reader kills the shift, carries it
on as a shift of its own result, or sees it; the value's shift is dead if nobody sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.axes import Axes, Carry, Kill, Outcome, Read, See, is_one
from lensfx.analysis.constants import Constants, owner_of, sizes, with_ones
from lensfx.analysis.transfer import TABLE, transfer
from lensfx.errors import LensError
from lensfx.graph.node import argument, is_op, op_name, schema_names, shape_of, where
from lensfx.graph.ops import METADATA_READS, is_impure, readers

__all__ = ["Allowed", "Gauge", "Proof", "Seen", "Step", "dead", "recheck"]

aten = torch.ops.aten

Allowed = Mapping[int, Collection[int]] | Callable[[int], Collection[int] | None]

_Reading = tuple[fx.Node, fx.Node, int | None]


@dataclass(frozen=True)
class Step:
    """One reading of `value`, shifted along all but `axes_in`, by `node`.

    `rule` is "kill" (the result does not move), "carry" (it moves by something constant along
    `axes_out`) or "contract" (it is an output that may move by what is constant along `axes_out`).
    """

    node: fx.Node
    rule: str
    axes_in: Axes
    axes_out: Axes
    value: fx.Node


@dataclass(frozen=True)
class Proof:
    """Why no output moves: every reading of `value` and of all that moves with it.

    `leaves` are those steps where the shift ends: kills and contracts.
    """

    value: fx.Node
    axes: Axes
    steps: tuple[Step, ...]
    leaves: tuple[Step, ...]

    @property
    def moved(self) -> dict[fx.Node, Axes]:
        """The values that the shift moves on its way, with the axes along which all move alike."""
        found = {s.node: s.axes_out for s in self.steps if s.rule == "carry"}
        means = {s.node: s.axes_in for s in self.leaves if _is_mean(s.node)}
        return {**found, **means}

    @property
    def kept(self) -> tuple[fx.Node, ...]:
        """The values where the shift ends: they stay what they were."""
        ends = (s.node for s in self.leaves if s.rule == "kill" and not _is_mean(s.node))
        return tuple(dict.fromkeys(ends))


@dataclass(frozen=True)
class Seen:
    """Who sees the shift and why; `path` leads from `value` to what `node` reads, both included."""

    value: fx.Node
    axes: Axes
    node: fx.Node
    reason: str
    path: tuple[fx.Node, ...]


def dead(value: fx.Node, axes: Iterable[int], *, allowed: Allowed | None = None) -> Proof | Seen:
    """Whether adding anything constant along `axes` to `value` changes no output of the graph.

    A proof holds for every value of all inputs and parameters; `Seen` says that none was found.
    The graph must be functional.
    `allowed[k]`: output k, counted flat, may move by something constant along those of its axes.
    Axes of size 1 are added to `axes`, for a shift is constant along them anyway.

    Raises: LensError if `value` is no tensor or lacks one of the axes.
    """
    return Gauge(allowed).dead(value, axes)


def recheck(proof: Proof, by: fx.Node | None = None) -> None:
    """Check that the steps leave out no reader of any value that moves; of the first, but `by`.

    Raises: AssertionError naming the reader that is missing.
    """
    known = {(s.value, s.node, s.axes_in) for s in proof.steps}
    moving = {(proof.value, proof.axes)}
    moving |= {(s.node, s.axes_out) for s in proof.steps if s.rule == "carry"}
    for value, axes in moving:
        for reader, node, _ in _readings(value):
            asked = by is None or value is not proof.value or reader is by
            if asked and (value, node, axes) not in known:
                raise AssertionError(f"no step says what {where(node)} makes of {where(value)}")
    if set(proof.leaves) != {s for s in proof.steps if s.rule != "carry"}:
        raise AssertionError(f"the leaves are not where the shift of {where(proof.value)} ends")


@dataclass(frozen=True)
class _Moving:
    """A value and a shift of it: what one round of the walk asks about."""

    value: fx.Node
    axes: Axes
    soft: bool = False

    @property
    def says_something(self) -> bool:
        wide = {a for a, size in enumerate(sizes(self.value)) if not is_one(size)}
        return not wide or not wide.isdisjoint(self.axes)


@dataclass(frozen=True)
class _Edge:
    """One reader of a shifted value: a step, what moves next, or why it sees the shift."""

    node: fx.Node
    step: Step | None = None
    then: _Moving | None = None
    words: str = ""


class Gauge:
    """`dead` with a memory: many questions about one graph, as long as nothing changes it."""

    def __init__(self, allowed: Allowed | None = None) -> None:
        self._allowed = {} if allowed is None else allowed
        self._const = Constants()
        self._edges: dict[_Moving, tuple[_Edge, ...]] = {}

    def dead(self, value: fx.Node, axes: Iterable[int], by: fx.Node | None = None) -> Proof | Seen:
        """As `lensfx.analysis.gauge.dead`; with `by`, of what that reader alone makes of it."""
        root = _question(value, frozenset(axes))
        return self._about(root)._walk(root, by)

    def carried(self, value: fx.Node, axes: Iterable[int]) -> tuple[Step, ...]:
        """Every step by which the shift goes on, whoever else sees it on the way."""
        root = _question(value, frozenset(axes))
        gauge, queue = self._about(root), {root: None}
        steps: dict[Step, None] = {}
        stack = [root]
        while stack:
            for edge in gauge._readers_of(stack.pop()):
                if edge.step is not None and edge.then is not None:
                    steps[edge.step] = None
                    if edge.then not in queue:
                        queue[edge.then] = None
                        stack.append(edge.then)
        return tuple(steps)

    def _about(self, root: _Moving) -> Gauge:
        """This gauge, or one that does not take for constant what the shift makes vary."""
        if self._const(root.value) <= root.axes or self._const.opaque is root.value:
            return self
        # The shift breaks what is known to be constant, so that may be used of nothing
        # that follows from the value.
        fresh = Gauge(self._allowed)
        fresh._const = Constants(opaque=root.value)
        return fresh

    def _walk(self, root: _Moving, by: fx.Node | None = None) -> Proof | Seen:
        came: dict[_Moving, tuple[_Moving, _Edge] | None] = {root: None}
        queue = [root]
        steps: dict[Step, None] = {}
        for moving in queue:
            for edge in self._readers_of(moving):
                if by is not None and moving is root and by not in (edge.node, *edge.node.args):
                    continue
                if edge.step is None:
                    return _blame(root, came, moving, edge)
                steps[edge.step] = None
                if edge.then is not None and edge.then not in came:
                    came[edge.then] = (moving, edge)
                    queue.append(edge.then)
        found = tuple(steps)
        return Proof(root.value, root.axes, found, tuple(s for s in found if s.rule != "carry"))

    def _readers_of(self, moving: _Moving) -> tuple[_Edge, ...]:
        known = self._edges.get(moving)
        if known is None:
            known = self._edges[moving] = tuple(self._new_edges(moving))
        return known

    def _new_edges(self, moving: _Moving) -> Iterator[_Edge]:
        readings = tuple(_readings(moving.value))
        centred = frozenset() if moving.soft else _centred(moving, readings)
        for reader, node, part in readings:
            if node in centred:
                yield _edge(moving, node, Kill())
            elif reader.op == "output":
                yield from self._at_output(moving, reader)
            elif not readers(node) and shape_of(node) is not None and not is_impure(reader):
                yield _edge(moving, node, Carry(frozenset()))
            elif isinstance(reader.meta.get("val"), tuple | list) and part is None:
                yield _edge(moving, node, See(f"%{node.name} is read as a whole"))
            else:
                for outcome in self._passed(moving, reader, part):
                    yield _edge(moving, node, outcome)

    def _passed(self, moving: _Moving, reader: fx.Node, part: int | None) -> list[Outcome]:
        slots = list(_slots(reader, moving.value))
        if not slots or (shape_of(reader) is None and part is None):
            return [See(f"no rule for {op_name(reader)} at %{reader.name}; nothing is assumed")]
        value, axes, soft = moving.value, moving.axes, moving.soft
        reads = (Read(reader, name, value, axes, self._const, i, part, soft) for name, i in slots)
        return [transfer(read) for read in reads]

    def _at_output(self, moving: _Moving, output: fx.Node) -> Iterator[_Edge]:
        shape, value = sizes(moving.value), moving.value
        for k, leaf in enumerate(pytree.tree_leaves(output.args[0])):
            if leaf is not value:
                continue
            allowed = self._allowed(k) if callable(self._allowed) else self._allowed.get(k)
            if allowed is None:
                words = f"it is output {k} of the model"
                yield _Edge(output, words=f"{words}; allowed only under a contract that names it")
                continue
            free = frozenset(a + len(shape) if a < 0 else a for a in allowed)
            if moving.soft or not free <= moving.axes:
                words = f"it is output {k} of the model; its contract allows only what is constant"
                yield _Edge(output, words=f"{words} along its axes {sorted(allowed)}")
            else:
                yield _Edge(output, Step(output, "contract", moving.axes, free, value))


def _question(value: fx.Node, axes: Axes) -> _Moving:
    shape = shape_of(value)
    if shape is None:
        raise LensError("only a tensor can be shifted along axes", at=where(value))
    if not axes <= set(range(len(shape))):
        headline = f"a value of {len(shape)} axes does not have all of the axes {sorted(axes)}"
        raise LensError(headline, at=where(value))
    return _Moving(value, with_ones(value, axes))


def _edge(moving: _Moving, node: fx.Node, outcome: Outcome) -> _Edge:
    if isinstance(outcome, See):
        return _Edge(node, words=outcome.words)
    if isinstance(outcome, Kill):
        return _Edge(node, Step(node, "kill", moving.axes, frozenset(), moving.value))
    axes = with_ones(node, outcome.axes)
    step = Step(node, "carry", moving.axes, axes, moving.value)
    return _Edge(node, step, _Moving(node, axes, moving.soft or outcome.soft), outcome.lost)


def _blame(
    root: _Moving,
    came: Mapping[_Moving, tuple[_Moving, _Edge] | None],
    last: _Moving,
    seen: _Edge,
) -> Seen:
    """The reader that sees the shift, or the one before it after which nothing was constant."""
    edges, sources = [seen], [last]
    while (step := came[sources[-1]]) is not None:
        sources.append(step[0])
        edges.append(step[1])
    edges.reverse()
    sources.reverse()
    cut = len(edges) - 1
    while root.says_something and not sources[cut].says_something:
        cut -= 1
    if not edges[cut].words:
        cut = len(edges) - 1
    edge = edges[cut]
    path = tuple(s.value for s in sources[: cut + 1])
    return Seen(root.value, root.axes, edge.node, edge.words, path)


def _readings(value: fx.Node) -> Iterator[_Reading]:
    """Each reader of the value's data, the node that stands for the result, and its output number.

    The results of a reader with several outputs are its getitem nodes.
    """
    for reader in readers(value):
        if not isinstance(reader.meta.get("val"), tuple | list) or reader.op == "output":
            yield reader, reader, None
            continue
        for user in reader.users:
            part = owner_of(user)[1]
            yield reader, reader if part is None else user, part


def _slots(reader: fx.Node, value: fx.Node) -> Iterator[tuple[str, int]]:
    """The arguments in which a reader uses the value, with the place in a list argument."""
    names = schema_names(reader.target) or ("self",) * len(reader.args)
    for name, given in (*zip(names, reader.args, strict=False), *reader.kwargs.items()):
        if reader.target in METADATA_READS and name == "other":
            continue
        for item, entry in enumerate(given if isinstance(given, list | tuple) else (given,)):
            if entry is value:
                yield name, item


_MEANS = (aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default)
_BESTS = (aten.max.dim, aten.min.dim)


def _is_mean(node: fx.Node) -> bool:
    """Whether a node that ends the shift moves with it, and only what reads it does not."""
    owner, part = owner_of(node)
    return is_op(node, *_MEANS) or (is_op(owner, *_BESTS) and part == 0)


def _centred(moving: _Moving, readings: Iterable[_Reading]) -> frozenset[fx.Node]:
    """Each mean or maximum that is only read to be subtracted from the value, and the differences.

    Both terms of x - mean(x) move alike if the shift is constant along the axes of the mean.
    """
    found: set[fx.Node] = set()
    for reader, node, part in readings:
        if not is_op(reader, *_MEANS) and not (is_op(reader, *_BESTS) and part == 0):
            continue
        dims = Read(reader, "self", moving.value, moving.axes, _nowhere).dims()
        if argument(reader, "keepdim") and dims <= moving.axes:
            differences = _differences(node, moving.value)
            found.update((node, *differences) if differences else ())
    return frozenset(found)


def is_copy(reader: fx.Node, value: fx.Node) -> bool:
    """Whether a reader gives the value's own numbers, if rounded, entry by entry."""
    if reader.target not in TABLE or TABLE[reader.target].name != "identity":
        return False
    return isinstance(transfer(Read(reader, "self", value, frozenset(), _nowhere)), Carry)


def _nowhere(node: fx.Node) -> Axes:
    return frozenset()


def _differences(mean: fx.Node, value: fx.Node) -> list[fx.Node]:
    """The nodes value - mean, if nothing else reads the mean; else none."""
    found, copies = [], [mean]
    for copy in copies:
        for reader in readers(copy):
            minuend = is_op(reader, aten.sub.Tensor) and argument(reader, "self") is value
            if minuend and argument(reader, "other") is copy and argument(reader, "alpha") == 1:
                found.append(reader)
            elif is_copy(reader, copy):
                copies.append(reader)
            else:
                return []
    return found
