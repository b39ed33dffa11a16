"""Program: a graph in normal form, the tensors it reads, how calls bind to it, its history."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from lensfx.errors import GuardError
from lensfx.graph.guards import Guards
from lensfx.graph.mode import EVAL, Mode, plain
from lensfx.graph.ops import is_impure
from lensfx.graph.signature import Signature

__all__ = [
    "Change",
    "Formula",
    "Program",
    "Rewrite",
    "Source",
    "Stage",
    "copy_graph",
    "flat_module",
    "remove_dead",
]


@dataclass(frozen=True)
class Formula:
    """How a tensor follows from the parameters it came from.

    `over` says of sources that are no parameters of the model what they are: the formula of one
    that was folded earlier, or the tensor itself.
    """

    name: str
    text: str
    sources: tuple[str, ...]
    graph: fx.Graph = field(compare=False, repr=False)
    over: Mapping[str, Formula | torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )


@dataclass(frozen=True)
class Change:
    """How a value that a rewrite changed on purpose gives back what it was.

    `was = (now * scale + shift) @ turn`, broadcast from the last axis; what is None is left out.
    Along `free` axes a constant was taken off that the value itself no longer tells.
    """

    value: str
    scale: Formula | None = None
    shift: Formula | None = None
    turn: Formula | None = None
    free: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rewrite:
    """One place where a pass changed the graph.

    `sites` pairs the name of a value before with its name after: what the rewrite claims to keep.
    `shifts` names those of them that may move by what is constant along an axis, `centred` those
    whose mean along that axis is 0 afterwards. `changes` are values that are not kept, and how.
    `shifted` are the flat outputs that move by something their contract lets them move by.
    """

    index: int
    pass_name: str
    root: str
    path: str
    line: str
    sites: tuple[tuple[str, str], ...]
    added: int
    removed: int
    note: str = ""
    shifted: tuple[int, ...] = ()
    shifts: tuple[tuple[str, int], ...] = ()
    centred: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        parts = (f"%{self.root}", self.path, self.line, self.note)
        return "  ".join(p for p in parts if p)


@dataclass(frozen=True)
class Source:
    """What capture noticed: the model's class, notes, names nobody reads, modules left opaque.

    `opaque` maps the path of each such module to what kept it from being traced. `buffers` says
    of each buffer whether a state dict holds it, where the program no longer knows its model.
    """

    model: str
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    opaque: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, bool] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Stage:
    """The graph after one pass, weights still written as expressions, and what the pass did.

    `entry` is the pass itself, None for the graph the pipeline started from.
    """

    name: str
    entry: Any
    graph: fx.Graph = field(compare=False, repr=False)
    rewrites: tuple[Rewrite, ...] = ()


@dataclass(frozen=True)
class Program:
    """A captured model as a value: passes make new programs, nothing changes an old one.

    `graph` takes the tensor leaves of a call in order and returns a flat tuple; `tensors` holds
    what its get_attr nodes name, the model's own parameter objects unless a pass changed them.
    `stages` are the graphs after each pass that fired; a folded program keeps the program it was
    folded from in `unfolded`, so that it can be proved.
    """

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor]
    signature: Signature
    guards: Guards
    example: tuple[torch.Tensor, ...]
    source: Source
    passes: tuple[str, ...] = ()
    journal: tuple[Rewrite, ...] = ()
    formulas: Mapping[str, Formula] = field(default_factory=lambda: MappingProxyType({}))
    reports: tuple[Any, ...] = ()
    stages: tuple[Stage, ...] = ()
    unfolded: Program | None = None
    origin: Any = field(default=None, repr=False, compare=False)
    mode: Mode = EVAL

    @cached_property
    def _without_weights(self) -> bool:
        return any(t.is_meta for t in self.tensors.values())

    @cached_property
    def flat(self) -> fx.GraphModule:
        """The graph as a module from flat tensors to a flat tuple; parameters are shared."""
        return flat_module(self.graph, self.tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns on this call, of the same type."""
        tensors = self.signature.bind(args, kwargs)
        self.guards.check(tensors)
        self.check_runnable()
        with plain():
            return self.signature.unflatten(list(self.flat(*tensors)))

    def check_runnable(self) -> None:
        """Pass if a call here and now can be run: under the mode of the capture, with weights.

        Raises: GuardError.
        """
        if self._without_weights:
            raise GuardError(
                f"the program of {self.source.model} holds no weights, so it cannot be run",
                hint="give it weights: lensfx.bind(program, state_dict)",
            )
        here = Mode.ambient(self.mode.training)
        if here != self.mode:
            raise GuardError(
                f"the program was captured under {self.mode}, and this call is under {here}",
                hint="capture again inside the same torch.autocast block",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """The same graph over tensors of its own, which knows no model any more."""
        tensors = MappingProxyType(copy.deepcopy(dict(self.tensors), memo))
        none: Any = {"stages": (), "unfolded": None, "origin": None}
        return replace(self, tensors=tensors, formulas=MappingProxyType({}), **none)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Each trainable tensor of the program once, in the order of first use."""
        found = {id(t): t for t in self.tensors.values() if isinstance(t, torch.nn.Parameter)}
        return list(found.values())

    def with_weights(self, weights: Any, *, strict: bool = True) -> Program:
        """The same program of another checkpoint of the model; nothing is captured again.

        `weights` is a state dict, a module, or the path of a safetensors file, of an index or of
        a directory of shards. Every parameter and persistent buffer is replaced, and what passes
        folded is computed again, one tensor at a time; other tensors stay. Names that the model
        does not have are refused, unless `strict=False`. Tensors of a dict or a module are
        shared; read from files, the program before folding is left without weights.

        Raises: RewriteError that lists every tensor that is missing, unexpected, or of another
        shape or dtype.
        """
        from lensfx.graph.bind import with_weights

        return with_weights(self, weights, strict=strict)

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Program:
        """The program with another graph and, if given, other fields."""
        return replace(self, graph=graph, **changes)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy with the same node names and its own metadata, and the map from old to new nodes."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        # Arguments are set afterwards: given to create_node they are searched for raw symbols,
        # which costs more than all the rest of the copy.
        twin = new.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        twin.args = fx.node.map_arg(node.args, mapping.__getitem__)
        if node.kwargs:
            twin.kwargs = fx.node.map_arg(node.kwargs, mapping.__getitem__)
        twin.meta = dict(node.meta)
        mapping[node] = twin
    return new, mapping


def flat_module(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A GraphModule over a copy of the graph, sharing the tensors it names."""
    new, _ = copy_graph(graph)
    named = {n.target: tensors[str(n.target)] for n in new.nodes if n.op == "get_attr"}
    return fx.GraphModule(named, new)


def remove_dead(graph: fx.Graph) -> int:
    """Erase every node that nobody reads and that has no effect; return how many were erased."""
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        if not node.users and not is_impure(node):
            graph.erase_node(node)
    return before - len(graph.nodes)
