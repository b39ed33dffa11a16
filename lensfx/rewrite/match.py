"""Match a pattern at a node: bindings, or a Miss that says which node does not fit and why."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from lensfx.graph.node import argument, is_op, is_weight, op_name, schema_names, shape_of
from lensfx.graph.ops import CASTS, COMMUTATIVE, VIEWS, is_impure, readers
from lensfx.graph.program import Program
from lensfx.graph.views import carried_axis
from lensfx.rewrite.pattern import (
    ANY_VALUE,
    Any,
    Const,
    EveryReader,
    Maybe,
    OneOf,
    Op,
    Param,
    Pattern,
    Ref,
    Through,
)

__all__ = ["Match", "Miss", "match", "names_of", "root_targets", "same_value"]

Env = dict[str, typing.Any]


@dataclass(frozen=True)
class Miss:
    """Why a pattern does not match: the reason in words and the node to blame.

    `at_site` is set where the producer matched and one of its readers did not. `site` is where the
    rule would have fired, if that is not the node to blame.
    """

    reason: str
    node: fx.Node
    at_site: bool = False
    site: fx.Node | None = None


@dataclass(frozen=True)
class Match:
    """The bindings of a pattern by name, as attributes; `readers` holds those of each reader.

    `root` is the node the pattern matched at.
    """

    bindings: Mapping[str, typing.Any]
    readers: tuple[Match, ...] = ()
    program: Program | None = None
    interior: frozenset[fx.Node] = field(default_factory=frozenset)

    def __getattr__(self, name: str) -> typing.Any:
        try:
            return self.__dict__["bindings"][name]
        except KeyError:
            raise AttributeError(f"the pattern binds no {name!r}") from None


def root_targets(pattern: Pattern) -> tuple[typing.Any, ...]:
    """The operators a match of the pattern can start at.

    Raises: TypeError for a pattern without one, which would have to be tried everywhere.
    """
    if isinstance(pattern, EveryReader):
        return root_targets(pattern.producer)
    if isinstance(pattern, OneOf):
        return tuple(t for p in pattern.alternatives for t in root_targets(p))
    if isinstance(pattern, Op):
        return pattern.targets
    raise TypeError(f"a rule's pattern starts at an Op, not at {type(pattern).__name__}")


def names_of(pattern: Pattern) -> frozenset[str]:
    """Every name the pattern can bind."""
    if isinstance(pattern, Maybe):
        return names_of(pattern.pattern)
    if isinstance(pattern, Through):
        own = {pattern.path} if pattern.path else set()
        return names_of(pattern.pattern) | own
    if isinstance(pattern, OneOf):
        return frozenset().union(*map(names_of, pattern.alternatives))
    if isinstance(pattern, Op):
        return frozenset({pattern.name}).union(*map(names_of, pattern.args.values()))
    if isinstance(pattern, EveryReader):
        return names_of(pattern.producer)
    name = pattern.name
    return frozenset() if name is None else frozenset({name})


def same_value(a: typing.Any, b: typing.Any, depth: int = 4) -> bool:
    """Whether two nodes surely hold the same numbers: one node, or equal calls on equal inputs."""
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a.op != b.op or a.target != b.target or depth == 0 or is_impure(a):
            return False
        return same_value((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[k], b[k], depth) for k in a)
    return type(a) is type(b) and bool(a == b)


def match(pattern: Pattern, node: fx.Node, program: Program | None = None) -> Match | Miss:
    """The bindings of `pattern` rooted at `node`, or the deepest reason why it does not match."""
    solver = _Solver()
    if isinstance(pattern, EveryReader):
        return _match_readers(solver, pattern, node, program)
    for env in solver.solve(pattern, node, {}):
        missing = dict.fromkeys(names_of(pattern) - env.keys())
        bound = {**missing, **env}
        inner = frozenset(n for n in _walked(bound) if n is not node and not is_weight(n))
        return Match({**bound, "root": node}, (), program, inner)
    return solver.miss(node)


def _walked(bindings: Mapping[str, typing.Any]) -> Iterator[fx.Node]:
    for value in bindings.values():
        if isinstance(value, fx.Node):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, fx.Node))


def _match_readers(
    solver: _Solver, pattern: EveryReader, node: fx.Node, program: Program | None
) -> Match | Miss:
    producer = next(solver.solve(pattern.producer, node, {}), None)
    if producer is None:
        return solver.miss(node)
    shape = shape_of(node)
    if not shape:
        return Miss("it has no axes", node)
    found: list[Match] = []
    others: list[fx.Node] = []
    interior: set[fx.Node] = set()
    for alias, reader, path in _reads(node, pattern.keeps % len(shape), pattern.keeps, interior):
        env = next(
            solver.solve(pattern.reader, reader, {**producer, pattern.producer.name: alias}), None
        )
        if env is None:
            if pattern.others is None:
                return _reader_miss(pattern, reader, solver)
            others.append(reader)
        elif (twice := sum(a is node or a in interior for a in data_inputs_of(reader))) > 1:
            return Miss(f"{reader.name} reads it {twice} times", reader, at_site=True)
        else:
            bound = {**dict.fromkeys(names_of(pattern.reader)), **env}
            found.append(Match({**bound, pattern.producer.name: node, "path": path}, (), program))
    if not found:
        return Miss("no reader can take it up", others[0] if others else node, at_site=True)
    bound = {**dict.fromkeys(names_of(pattern.producer)), **producer}
    if pattern.others is not None:
        bound[pattern.others] = tuple(dict.fromkeys(others))
    return Match({**bound, "root": node}, tuple(found), program, frozenset(interior))


def data_inputs_of(node: fx.Node) -> list[fx.Node]:
    """Every operand position of a node that holds a node, repeats included."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _reads(
    node: fx.Node,
    axis: int,
    keeps: int,
    interior: set[fx.Node],
    path: tuple[fx.Node, ...] = (),
) -> Iterator[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """Each (alias, reader, views between): readers of the value and of views that keep the axis."""
    for reader in readers(node):
        moved = carried_axis(reader, axis) if is_op(reader, *VIEWS, *CASTS) else None
        shape = shape_of(reader)
        if moved is not None and shape is not None and readers(reader):
            if reader.args[0] is node and moved == keeps % len(shape):
                interior.add(reader)
                yield from _reads(reader, moved, keeps, interior, (*path, reader))
                continue
        yield node, reader, path


def _reader_miss(pattern: EveryReader, reader: fx.Node, solver: _Solver) -> Miss:
    wanted = " or ".join(sorted({str(t.overloadpacket.__name__) for t in pattern.reader.targets}))
    if reader.op == "output":
        return Miss("it is an output of the model, which would change", reader, at_site=True)
    if not is_op(reader, *pattern.reader.targets):
        reason = f"reader {reader.name} is {op_name(reader)}, not {wanted}"
        return Miss(reason, reader, at_site=True)
    return Miss(f"reader {reader.name}: {solver.miss(reader).reason}", reader, at_site=True)


class _Solver:
    """Backtracking over alternatives and operand orders; keeps the deepest failure."""

    def __init__(self) -> None:
        self._deepest: tuple[int, Miss] | None = None

    def miss(self, node: fx.Node) -> Miss:
        return self._deepest[1] if self._deepest else Miss("nothing to match", node)

    def _fail(self, depth: int, reason: str, node: fx.Node) -> None:
        if self._deepest is None or depth > self._deepest[0]:
            self._deepest = (depth, Miss(reason, node))

    def solve(
        self, pattern: Pattern, value: typing.Any, env: Env, depth: int = 0, by: typing.Any = None
    ) -> Iterator[Env]:
        by = value if isinstance(value, fx.Node) else by
        if isinstance(pattern, Op):
            yield from self._op(pattern, value, env, depth, by)
        elif isinstance(pattern, OneOf):
            for alternative in pattern.alternatives:
                yield from self.solve(alternative, value, env, depth, by)
        elif isinstance(pattern, Maybe):
            yield from self._maybe(pattern, value, env, depth, by)
        elif isinstance(pattern, Through):
            yield from self._through(pattern, value, env, depth, by)
        elif isinstance(pattern, EveryReader):
            raise TypeError("EveryReader is a whole pattern; it cannot stand inside another")
        else:
            reason = _leaf_reason(pattern, value, env)
            if reason is not None:
                self._fail(depth, reason, by)
            elif isinstance(pattern, Ref) or pattern.name is None:
                yield env
            else:
                yield from self._bind(pattern.name, value, env, depth, by)

    def _maybe(
        self, pattern: Maybe, value: typing.Any, env: Env, depth: int, by: fx.Node
    ) -> Iterator[Env]:
        absent = dict.fromkeys(names_of(pattern.pattern))
        if value is not None:
            yield from self.solve(pattern.pattern, value, env, depth, by)
        elif all(env.get(name) is None for name in absent):
            yield {**absent, **env}
        else:
            self._fail(depth, "it is absent here and present elsewhere", by)

    def _bind(
        self, name: str, value: typing.Any, env: Env, depth: int, by: fx.Node
    ) -> Iterator[Env]:
        if name not in env:
            yield {**env, name: value}
        elif same_value(env[name], value):
            yield env
        else:
            self._fail(depth, f"{name} is two different values", by)

    def _op(
        self, pattern: Op, value: typing.Any, env: Env, depth: int, by: fx.Node
    ) -> Iterator[Env]:
        if not is_op(value, *pattern.targets):
            found = op_name(value) if isinstance(value, fx.Node) else repr(value)
            wanted = " or ".join(
                dict.fromkeys(str(t.overloadpacket.__name__) for t in pattern.targets)
            )
            self._fail(depth, f"it is {found}, wanted {wanted}", by)
            return
        if pattern.readers is not None and len(readers(value)) != pattern.readers:
            self._fail(depth, f"{value.name} has {len(readers(value))} readers", value)
            return
        for env1 in self._bind(pattern.name, value, env, depth, by):
            for order in _orders(pattern, value):
                yield from self._arguments(pattern, value, list(order), env1, depth + 1)

    def _arguments(
        self,
        pattern: Op,
        node: fx.Node,
        todo: list[tuple[str, Pattern]],
        env: Env,
        depth: int,
    ) -> Iterator[Env]:
        if not todo:
            yield env
            return
        (name, wanted), rest = todo[0], todo[1:]
        if name in schema_names(node.target):
            given = argument(node, name)
        elif isinstance(wanted, Maybe):
            given = None
        else:
            self._fail(depth, f"{op_name(node)} has no argument {name}", node)
            return
        for env1 in self.solve(wanted, given, env, depth, node):
            yield from self._arguments(pattern, node, rest, env1, depth + 1)

    def _through(
        self, pattern: Through, value: typing.Any, env: Env, depth: int, by: fx.Node
    ) -> Iterator[Env]:
        passed: tuple[fx.Node, ...] = ()
        while True:
            bound = env if pattern.path is None else {**env, pattern.path: passed}
            yield from self.solve(pattern.pattern, value, bound, depth + len(passed), by)
            if not is_op(value, *pattern.via) or not _keeps(value, pattern.keeps):
                return
            passed, value = (*passed, value), value.args[0]


def _keeps(view: fx.Node, axis: int) -> bool:
    source, shape = view.args[0], shape_of(view)
    before = shape_of(source) if isinstance(source, fx.Node) else None
    if before is None or shape is None or not before or not shape:
        return False
    moved = carried_axis(view, axis % len(before))
    return moved is not None and moved == axis % len(shape)


def _orders(pattern: Op, node: fx.Node) -> Iterator[list[tuple[str, Pattern]]]:
    given = list(pattern.args.items())
    yield given
    if node.target in COMMUTATIVE and not {"self", "other"}.isdisjoint(pattern.args):
        if "alpha" in dict(node.kwargs) and node.kwargs["alpha"] != 1:
            return
        swapped = {"self": "other", "other": "self"}
        yield [(swapped.get(name, name), p) for name, p in given]


def _leaf_reason(pattern: Any | Param | Const | Ref, value: typing.Any, env: Env) -> str | None:
    if isinstance(pattern, Const):
        return _constant_reason(pattern, value)
    if not isinstance(value, fx.Node):
        return f"{value!r} is not computed in the graph"
    if isinstance(pattern, Ref):
        held = env.get(pattern.name)
        return None if same_value(held, value) else f"{value.name} is not {pattern.name}"
    if isinstance(pattern, Param):
        if not is_weight(value):
            return f"{value.name} is not a parameter"
        shape = shape_of(value)
        if pattern.axes is not None and (shape is None or len(shape) != pattern.axes):
            return f"{value.name} has {len(shape or ())} axes, wanted {pattern.axes}"
    return None


def _constant_reason(pattern: Const, value: typing.Any) -> str | None:
    if isinstance(value, (fx.Node, torch.SymInt)):
        return f"{value} is not a constant"
    if pattern.value is ANY_VALUE:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(pattern.value, float) and number:
        same = math.isclose(value, pattern.value, rel_tol=pattern.tolerance)
    elif isinstance(pattern.value, (list, tuple)):
        same = isinstance(value, (list, tuple)) and list(value) == list(pattern.value)
    else:
        same = type(value) is type(pattern.value) and bool(value == pattern.value)
    return None if same else f"it is {value!r}, wanted {pattern.value!r}"
