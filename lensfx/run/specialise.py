"""A request becomes a graph with only the nodes it needs, compiled once and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.choice import is_choice
from lensfx.graph.compiled import closure, compiled
from lensfx.graph.layout import show, store
from lensfx.graph.node import is_op, outputs_of
from lensfx.graph.ops import is_hook, is_impure
from lensfx.graph.program import Program
from lensfx.run.hooks import Active, visit
from lensfx.run.names import Names, Place
from lensfx.run.parts import Parts

__all__ = ["Request", "Run", "Specialiser"]

aten = torch.ops.aten
KEPT = 32


@dataclass(frozen=True)
class Request:
    """What one run is asked for: names to keep, names with hooks, and where to stop."""

    keep: tuple[str, ...] = ()
    edit: frozenset[str] = frozenset()
    stop: str | None = None


@dataclass(frozen=True)
class Run:
    """A compiled request: called with tensors and hooks, it gives results, then kept values."""

    forward: Callable[..., tuple[Any, ...]]
    weights: tuple[torch.Tensor, ...]
    results: int
    nodes: int

    def __call__(self, tensors: Sequence[torch.Tensor], active: Active) -> tuple[Any, ...]:
        """The flat results and the kept values of one run."""
        return self.forward(None, *tensors, *self.weights, active)


class Specialiser:
    """Derives and remembers a graph for each kind of request; the latest `KEPT` of them."""

    def __init__(self, program: Program, names: Names) -> None:
        self._program = program
        self._names = names
        self._runs: OrderedDict[Request, Run] = OrderedDict()

    def __call__(self, request: Request) -> Run:
        """The compiled graph for a request."""
        run = self._runs.get(request)
        if run is None:
            run = self._runs[request] = _Derivation(self._program, self._names, request).run()
            if len(self._runs) > KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(request)
        return run

    def upstream(self, name: str) -> set[fx.Node]:
        """Every node that the value of a name depends on, itself included."""
        return closure([self._names.places[name].node])

    def upstream_of_outputs(self) -> set[fx.Node]:
        """Every node that some result of the model depends on."""
        return closure([self._program.graph.output_node()])


class _Derivation:
    def __init__(self, program: Program, names: Names, request: Request) -> None:
        self.program, self.names, self.request = program, names, request
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.values: dict[str, fx.Node] = {}
        self.weights: list[str] = []
        wanted = (*request.keep, *sorted(request.edit))
        self.at: dict[fx.Node, list[str]] = {}
        for name in dict.fromkeys(wanted):
            place = names.places[name]
            self.at.setdefault(place.node, []).append(name)
            if place.point is not None and name in request.edit:
                for other in place.point.also:
                    self.at.setdefault(other.node, []).append(name)
        self.widened = {
            hook.args[0]
            for hook in program.graph.nodes
            if is_hook(hook) and hook not in self.at and _widens(hook.args[0], self.at)
        }
        self.parts = Parts(self.graph, self.env, request.edit, self._changed, self._visit)

    def run(self) -> Run:
        results = self._results()
        roots = [n for n in results if isinstance(n, fx.Node)] + list(self.at)
        nodes = list(self.program.graph.nodes)
        if self.request.stop is None:
            roots += [n for n in nodes if _has_effect(n)]
        else:
            before = nodes[: nodes.index(self.names.places[self.request.stop].node)]
            roots += [n for n in before if is_choice(n)]
        needed = closure(roots)
        self._interface(needed)
        for node in self.program.graph.nodes:
            if node in needed and node.op == "call_function" and node not in self.widened:
                self.env[node] = self._copy(node)
        out = [self.env[r] if isinstance(r, fx.Node) else r for r in results]
        if self.request.stop is not None:
            # The stream as its hooks see it.
            out = [show(self._call, out[0], self.names.places[self.request.stop].layout)]
        out += [self._kept(name) for name in self.request.keep]
        self.graph.output(tuple(out))
        tensors = tuple(self.program.tensors[name] for name in self.weights)
        count = sum(n.op == "call_function" for n in self.graph.nodes)
        return Run(compiled(self.graph), tensors, len(results), count)

    def _results(self) -> list[Any]:
        if self.request.stop is not None:
            return [self.names.places[self.request.stop].node]
        return outputs_of(self.program.graph)

    def _kept(self, name: str) -> fx.Node:
        value = self.values[name]
        if name in self.request.edit or not _borrows(self.names.places[name]):
            return value
        # Written to, or trained on, a weight that a cache shows would change in both places.
        return self.graph.call_function(aten.clone.default, (value,))

    def _interface(self, needed: set[fx.Node]) -> None:
        """Inputs, then the weights the needed nodes read, then the hooks, all as arguments."""
        nodes = list(self.program.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self.env[node] = self.graph.placeholder(node.name)
        for node in nodes:
            if node.op == "get_attr" and node in needed:
                self.env[node] = self.graph.placeholder(node.name)
                self.weights.append(str(node.target))
        self.active = self.graph.placeholder("lensfx_active")

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node in the run's graph, and what its readers read once its names were visited."""
        if is_hook(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            # What nobody looks at is added as it is, without a copy for each row of the batch.
            value = self.env[source.args[0] if source in self.widened else source]  # type: ignore[index]
        else:
            value = self.graph.node_copy(node, lambda n: self.env[n])
        named = [(name, self.names.places[name]) for name in self.at.get(node, [])]
        inside = [(name, place) for name, place in named if place.part]
        if inside:
            value = self.parts.write(node, value, inside)
        for name, place in named:
            if not place.part:
                value = self._seen(value, name, place)
        return value

    def _seen(self, value: fx.Node, name: str, place: Place) -> fx.Node:
        """A value that is a node of the graph, after the hooks of a name."""
        if place.layout.is_plain:
            return self._visit(value, name)
        before = show(self._call, value, place.layout)
        after = self._visit(before, name)
        if after is before:
            return value
        return store(self._call, after, place.layout)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _changed(self, node: fx.Node) -> bool:
        return any(name in self.request.edit for name in self.at.get(node, ()))

    def _visit(self, value: fx.Node, name: str) -> fx.Node:
        if name in self.request.edit:
            value = self.graph.call_function(visit, (value, name, self.active))
        self.values[name] = value
        return value


def _widens(node: Any, asked: Container[fx.Node]) -> bool:
    """Whether a value is repeated for the sake of the hook on it alone."""
    return is_op(node, aten.expand_as.default) and len(node.users) == 1 and node not in asked


def _borrows(place: Place) -> bool:
    """Whether the value is memory of a weight or an input: nothing but views lie between."""
    if place.part not in ("", "input", "shared"):
        return False
    node: Any = place.node
    if place.part:
        assert place.point is not None
        node = place.point.source
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        views = schema is not None and any(r.alias_info is not None for r in schema.returns)
        if not (views or is_hook(node)):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


def _has_effect(node: fx.Node) -> bool:
    return node.op == "call_function" and is_impure(node)
