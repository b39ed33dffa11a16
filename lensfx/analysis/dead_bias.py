"""Which entries of a bias no output can see, each proved on the piece of the result it is in."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from lensfx.analysis.channels import Channels, fixed, seed, through
from lensfx.analysis.constants import sizes
from lensfx.analysis.gauge import Gauge, Proof, Seen
from lensfx.analysis.products import product
from lensfx.analysis.transfer import TABLE
from lensfx.graph.node import argument, is_op, is_weight, shape_of
from lensfx.graph.ops import readers
from lensfx.graph.program import Program

__all__ = ["DeadBias", "dead_biases"]

aten = torch.ops.aten

_SOFTMAX = {"softmax", "log softmax"}
_STOPS = {"attention", "embedding", *_SOFTMAX}


@dataclass(frozen=True)
class DeadBias:
    """The entries of the bias of `node` that can be dropped; none, and `seen`, if that is refused.

    `moved` are the values that lose them, with the channels of the bias or, where these cannot be
    told, None and the axes along which the loss is constant. `kept` are values that do not move.
    `proofs` hold the reader that each is about, or None where it is about all of them.
    """

    node: fx.Node
    entries: tuple[int, ...]
    moved: tuple[tuple[fx.Node, Channels | None, frozenset[int]], ...] = ()
    kept: tuple[fx.Node, ...] = ()
    seen: Seen | None = None
    proofs: tuple[tuple[Proof, fx.Node | None], ...] = ()


def dead_biases(program: Program) -> Iterator[DeadBias]:
    """The linear ops with a bias that nothing sees all of, and the keys whose bias is seen."""
    gauge = Gauge()
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        bias = argument(node, "bias")
        count = None if not is_weight(bias) or is_weight(node) else fixed(sizes(bias)[-1])
        if count is None or sizes(bias) != sizes(node)[-1:] or not readers(node):
            continue
        search = _Search(gauge)
        search.visit(node, seed(node, -1))
        entries = tuple(sorted(search.dead - search.alive))
        if entries:
            yield search.found(node, entries)
        else:
            # The innermost piece that is a key has the most to say about it.
            keys = [s for s in search.seen if _is_key(s.value)]
            if keys:
                yield DeadBias(node, (), seen=keys[-1])


@dataclass
class _Search:
    """A walk over the views of a value: what of it is dead, and who sees the rest."""

    gauge: Gauge
    dead: set[int] = field(default_factory=set)
    alive: set[int] = field(default_factory=set)
    channels: dict[fx.Node, Channels] = field(default_factory=dict)
    proofs: list[tuple[Proof, fx.Node | None]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def visit(self, value: fx.Node, channels: Channels) -> None:
        """Follow the value through its views and ask of each whether all of it is dead."""
        stack = [(value, channels)]
        while stack:
            value, channels = stack.pop()
            self.channels[value] = channels
            if shape_of(value) is not None and self._is_dead(value, channels, None):
                continue
            for reader in readers(value):
                there = through(reader, value, channels)
                if isinstance(there, Channels):
                    stack.append((reader, there))
                elif shape_of(value) is None or not self._is_dead(value, channels, reader):
                    self.alive.update(_numbers(channels))

    def _is_dead(self, value: fx.Node, channels: Channels, by: fx.Node | None) -> bool:
        rest = set(range(len(sizes(value)))) - channels.axes
        verdict = self.gauge.dead(value, rest, by)
        if isinstance(verdict, Seen):
            self.seen.append(verdict)
            return False
        self.proofs.append((verdict, by))
        self.dead.update(_numbers(channels))
        return True

    def found(self, node: fx.Node, entries: tuple[int, ...]) -> DeadBias:
        """What the drop of these entries moves, and what it leaves."""
        moved: dict[fx.Node, tuple[Channels | None, frozenset[int]]] = {}
        kept: dict[fx.Node, None] = {}
        for value, channels in self.channels.items():
            if shape_of(value) is None:
                continue
            if _numbers(channels).isdisjoint(entries):
                kept[value] = None
            else:
                moved[value] = channels, frozenset()
        for proof, _ in self.proofs:
            for step in proof.steps:
                known = moved.get(step.value, (None, None))[0]
                if step.rule != "carry":
                    kept.update(dict.fromkeys(n for n in proof.kept if n is step.node))
                elif step.node not in moved and step.value in moved:
                    there = None if known is None else through(step.node, step.value, known)
                    there = there if isinstance(there, Channels) else None
                    moved[step.node] = there, step.axes_out
        at = tuple((n, *how) for n, how in moved.items())
        left = tuple(n for n in kept if n not in moved)
        return DeadBias(node, entries, at, left, None, tuple(self.proofs))


def _numbers(channels: Channels) -> set[int]:
    return {int(i) for i in channels.idx.flatten() if i >= 0}


def _is_key(value: fx.Node) -> bool:
    """Whether keys of an attention are made of the value without another weight."""
    stack, known = [value], {value}
    while stack:
        node = stack.pop()
        for reader in readers(node):
            if is_op(reader, aten.scaled_dot_product_attention.default):
                if argument(reader, "key") is node:
                    return True
            elif product(reader) is not None:
                if _is_scored(reader, node):
                    return True
            elif reader not in known and _goes_on(reader):
                known.add(reader)
                stack.append(reader)
    return False


def _goes_on(reader: fx.Node) -> bool:
    family = TABLE.get(reader.target)
    return reader.target is operator.getitem or (family is not None and family.name not in _STOPS)


def _is_scored(reader: fx.Node, key: fx.Node) -> bool:
    """Whether a softmax runs over the axis that the product takes over from the key."""
    found = product(reader)
    if found is None or not found.out or any(is_weight(x) for x, _ in found.terms):
        return False
    has = [labels for x, labels in found.terms if x is key]
    if not has or found.out[-1] not in has[0]:
        return False
    stack, known = [reader], {reader}
    while stack:
        for user in readers(stack.pop()):
            family = TABLE.get(user.target)
            name = "" if family is None else family.name
            if name in _SOFTMAX:
                return True
            ends = name in _STOPS or name.endswith("norm") or product(user) is not None
            if user not in known and not ends:
                known.add(user)
                stack.append(user)
    return False
