"""Random patterns on random graphs: the matcher against one that tries everything."""

from __future__ import annotations

import importlib
import operator
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any as Object
from typing import TypeVar

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from lensfx.rewrite import (
    Any,
    Const,
    EveryReader,
    Match,
    Maybe,
    OneOf,
    Op,
    Param,
    Ref,
    Through,
    match,
)
from lensfx.rewrite.match import names_of

aten = torch.ops.aten
T = TypeVar("T")
Env = dict[str, Object]
Pick = Callable[[Sequence[T]], T]

COMMUTE = (aten.add.Tensor, aten.mul.Tensor)
UNARY = (aten.relu.default, aten.neg.default)
BINARY = (*COMMUTE, aten.sub.Tensor)
VIEWS: tuple[tuple[Object, ...], ...] = (
    (aten.transpose.int, 0, 1),
    (aten.transpose.int, -2, -1),
    (aten.unsqueeze.default, 0),
    (aten.unsqueeze.default, 1),
    (aten.reshape.default, [-1, 2]),
    (aten.reshape.default, [2, -1]),
    (aten.to.dtype, torch.float64),
    (aten.to.dtype, torch.int64),
)


def schema_arguments(node: fx.Node) -> dict[str, Object]:
    declared = node.target._schema.arguments
    positional = dict(zip((a.name for a in declared), node.args, strict=False))
    return {a.name: a.default_value for a in declared} | positional | dict(node.kwargs)


def spelled(value: Object) -> str:
    """A value written out down to the inputs: equal text, equal numbers."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op != "call_function":
        return f"{value.op} {value.target}"
    given = (*value.args, *(f"{k}={v!r}" for k, v in value.kwargs.items()))
    return f"{value.target}({', '.join(map(spelled, given))})"


def keeps_last(node: fx.Node) -> bool:
    """Whether running the node leaves numbers that count the last axis where they are."""
    if not is_view(node):
        return False
    before = node.args[0].meta["val"]
    marked = torch.arange(before.shape[-1], dtype=before.dtype).expand(before.shape)
    after = node.target(marked, *node.args[1:])
    floats = before.is_floating_point() and after.is_floating_point()
    whole = after.shape[-1] == before.shape[-1] and (floats or node.target is not aten.to.dtype)
    return whole and bool((after == torch.arange(after.shape[-1], dtype=after.dtype)).all())


def is_view(value: Object) -> bool:
    targets = {target for target, *_ in VIEWS}
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def data_readers(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.graph.nodes if node in n.all_input_nodes and n.target != SIZE]


SIZE = aten.sym_size.int


def put(env: Env, name: str | None, value: Object) -> bool:
    return name is None or spelled(env.setdefault(name, value)) == spelled(value)


def fits(p: Object, v: Object, env: Env, choose: Callable[[int], int]) -> bool:
    """Whether the pattern fits if at each free place it is read as `choose` says."""
    if isinstance(p, OneOf):
        return fits(p.alternatives[choose(len(p.alternatives))], v, env, choose)
    if isinstance(p, Maybe):
        absent = (put(env, name, None) for name in names_of(p))
        return all(absent) if v is None else fits(p.pattern, v, env, choose)
    if isinstance(p, Const):
        equal = repr(p.value) in (repr(v), repr(v) + ".0", "any value")
        return not isinstance(v, fx.Node) and equal and put(env, p.name, v)
    if not isinstance(v, fx.Node):
        return False
    if isinstance(p, Ref):
        return p.name in env and put(env, p.name, v)
    if isinstance(p, Through):
        passed: list[fx.Node] = []
        for _ in range(choose(9)):
            if not keeps_last(v):
                return False
            passed, v = [*passed, v], v.args[0]
        return put(env, p.path, tuple(passed)) and fits(p.pattern, v, env, choose)
    if isinstance(p, Op):
        return op_fits(p, v, env, choose)
    return (not isinstance(p, Param) or bool(v.meta.get("weight"))) and put(env, p.name, v)


def op_fits(p: Op, v: fx.Node, env: Env, choose: Callable[[int], int]) -> bool:
    called = v.op == "call_function" and v.target in p.targets
    if not called or p.readers not in (None, len(data_readers(v))) or not put(env, p.name, v):
        return False
    given = schema_arguments(v)
    turned = v.target in COMMUTE and given.get("alpha", 1) == 1 and choose(2) == 1
    swap = {"self": "other", "other": "self"} if turned else {}
    for name, inner in p.args.items():
        name = swap.get(name, name)
        if name not in given and not isinstance(inner, Maybe):
            return False
        if not fits(inner, given.get(name), env, choose):
            return False
    return True


def reference(pattern: Object, node: fx.Node, env: Env | None = None) -> Env | None:
    """The bindings of the first reading that fits, out of all readings of the pattern."""
    tape: list[int] = []
    while True:
        widths: list[int] = []

        def choose(width: int, widths: list[int] = widths) -> int:
            widths.append(width)
            tape.extend([0] * (len(widths) - len(tape)))
            return tape[len(widths) - 1]

        bound = dict(env or {})
        if fits(pattern, node, bound, choose):
            return dict.fromkeys(names_of(pattern)) | bound
        del tape[len(widths) :]
        while tape and tape[-1] + 1 == widths[len(tape) - 1]:
            tape.pop()
        if not tape:
            return None
        tape[-1] += 1


Found = tuple[Env, dict[fx.Node, Env], list[fx.Node], list[fx.Node]]


def reference_readers(pattern: EveryReader, node: fx.Node) -> Found | None:
    """The producer's bindings, those of each reader that fits, other readers, views between."""
    name, env = pattern.producer.name, reference(pattern.producer, node)
    if env is None:
        return None
    aliases = [node]
    for n in node.graph.nodes:
        if keeps_last(n) and n.args[0] in aliases and data_readers(n):
            aliases.append(n)
    fitting: dict[fx.Node, Env] = {}
    rest: list[fx.Node] = []
    for reader in node.graph.nodes:
        read = [a for a in operands(reader) if a in aliases]
        if not read or reader in aliases or reader.target == SIZE:
            continue
        tried = [reference(pattern.reader, reader, {**env, name: a}) for a in read]
        if all(t is None for t in tried):
            rest.append(reader)
        elif len(read) > 1:
            return None
        else:
            fitting[reader] = {**tried[0], name: node}
    if not fitting or (rest and pattern.others is None):
        return None
    return env, fitting, rest, aliases[1:]


def is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target != SIZE


def operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


KINDS = ("unary", "binary", "alpha", "literal", "view", "view", "clamp", "twin", "twin", "twins")


def random_graph(pick: Pick) -> fx.Graph:
    """Up to eight calls on two inputs and two parameters, all of whose axes have size 1 or 2."""
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y"), graph.get_attr("v")]
    values += [graph.get_attr(pick(("v", "w")))]
    for node in values:
        node.meta = {"val": torch.zeros(2, 2), "weight": node.op == "get_attr"}
    for _ in range(pick((3, 4, 5, 6, 7, 8))):
        x = pick(values[-5:])
        kind = pick(KINDS)
        twin = (x.target, *x.args) if is_call(x) else (pick(UNARY), x)
        target, *args = {
            "unary": (pick(UNARY), x),
            "binary": (pick(BINARY), x, pick(values)),
            "alpha": (aten.add.Tensor, x, pick(values)),
            "literal": (pick(BINARY), x, pick((2, 2.0))),
            "view": (*(view := pick(VIEWS))[:1], x, *view[1:]),
            "clamp": (aten.clamp.default, x, 0.0, pick((None, 1.0))),
            "twin": twin,
            "twins": (pick(BINARY), values[-1], values[-2]),
        }[kind]
        kwargs = {"alpha": 2} if kind == "alpha" else dict(x.kwargs) if kind == "twin" else {}
        values.append(called(graph, target, args, kwargs))
    if pick((False, True)):
        called(graph, SIZE, [values[-1], 0], {})
    ends = [n for n in values if not data_readers(n)]
    graph.output((*ends, *([pick(values)] if pick((False, False, True)) else [])))
    return graph


def called(graph: fx.Graph, target: Object, args: list[Object], kwargs: Env) -> fx.Node:
    node = graph.call_function(target, tuple(args), kwargs)
    given = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    value: Tensor = target(*given, **kwargs)
    node.meta = {"val": value, "weight": all(n.meta["weight"] for n in node.all_input_nodes)}
    return node


class Patterns:
    """Patterns that describe a node of the graph, more or less: some fit it, some miss by little.

    Names inside `Maybe` are used once: what it means to bind one twice is not settled.
    """

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self.fresh = iter(range(1000))

    def of(self, value: Object, depth: int) -> Object:
        if not isinstance(value, fx.Node):
            return self._constant(value)
        kind = self.pick(("op", "op", "op", "leaf", "through", "one of", "maybe"))
        kind = self.pick((kind, "through")) if is_view(value) else kind
        if kind == "leaf" or depth == 0 or (kind == "op" and value.op != "call_function"):
            return self.pick((Any, Any, Param, Ref))(self.pick("ab"))
        if kind == "op":
            return self.op(value, depth)
        if kind == "maybe":
            return Maybe(self.pick((Any, Param))(f"m{next(self.fresh)}"))
        if kind == "through":
            inner = value.args[0] if value.op == "call_function" and self.pick((0, 1)) else value
            path = self.pick((None, f"path{next(self.fresh)}"))
            return Through(self.of(inner, depth - 1), path=path)
        other = self.pick([n for n in value.graph.nodes if n.op != "output"])
        both = [self.of(value, depth - 1), self.of(other, depth - 1)]
        return OneOf(*(both if self.pick((False, True)) else both[::-1]))

    def op(self, node: fx.Node, depth: int, first: dict[str, Object] | None = None) -> Op:
        args = dict(first or {})
        for name, value in schema_arguments(node).items():
            if name not in args and self.pick((True, True, False)):
                args[name] = self.of(value, depth - 1)
        if self.pick((False, False, True)) and {"self", "other"} <= args.keys():
            args |= {"self": args["other"], "other": args["self"]}
        targets = (node.target, *self.pick(((), (aten.sub.Tensor,), (aten.clamp.default,))))
        readers = self.pick((None, None, None, 1, len(data_readers(node))))
        return Op(self.pick(("a", "p", f"op{next(self.fresh)}")), targets, args, readers)

    def _constant(self, value: Object) -> Object:
        name = f"k{next(self.fresh)}"
        constant = self.pick((Const(name), Const(name, value), Const(name, 2), Any(name)))
        return Maybe(constant) if self.pick((False, True)) else constant


def compare_everywhere(seed: int, seen: Counter[str]) -> None:
    pick = random.Random(seed).choice
    graph = random_graph(pick)
    calls = [n for n in graph.nodes if is_call(n)]
    pattern = Patterns(pick).op(pick(calls), 3)
    for node in calls:
        result, expected = match(pattern, node), reference(pattern, node)
        bound = dict(result.bindings) if isinstance(result, Match) else None
        wanted = None if expected is None else {**expected, "root": node}
        assert bound == wanted, f"{pattern} at {node} of\n{graph}"
        seen["miss" if bound is None else "match"] += 1


def compare_readers(seed: int, seen: Counter[str]) -> None:
    pick = random.Random(seed).choice
    graph = random_graph(pick)
    reads = [(a, b) for b in graph.nodes for a in operands(b) if is_call(a) and is_call(b)]
    if not reads:
        return
    root, reader = pick(reads)
    producer = Op("made", (root.target,), readers=pick((None, None, None, 1)))
    reader = Patterns(pick).op(reader, 2, {"self": Ref("made")})
    pattern = EveryReader(producer, reader, others=pick((None, "others")))
    result, expected = match(pattern, root), reference_readers(pattern, root)
    place = f"{pattern} at {root} of\n{graph}"
    if not isinstance(result, Match) or expected is None:
        assert not isinstance(result, Match), place
        assert expected is None, place
        seen["miss"] += 1
        return
    _, fitting, rest, views = expected
    told = {getattr(r, reader.name): dict(r.bindings) for r in result.readers}
    paths = {n: env.pop("path") for n, env in told.items()}
    assert len(result.readers) == len(told), place
    assert told == fitting, place
    assert set(result.bindings.get("others", ())) == set(rest), place
    assert set(result.interior) == set(views), place
    for at, path in paths.items():
        chain = (root, *path, at)
        assert all(a in operands(b) for a, b in pairwise(chain)), place
    seen["match"] += 1


SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("compare", [compare_everywhere, compare_readers])
def test_against_the_reference(compare: Callable[..., None]) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=600)
    @given(SEEDS)
    def run(seed: int) -> None:
        compare(seed, seen)

    run()
    assert seen["match"] > 80, seen
    assert seen["miss"] > 80, seen


FAULTS = {
    "never swaps": ("COMMUTATIVE", frozenset(), compare_everywhere),
    "swaps a difference": ("COMMUTATIVE", frozenset(BINARY), compare_everywhere),
    "equal by name only": ("same_value", operator.is_, compare_everywhere),
    "every view keeps": ("carried_axis", lambda view, axis: axis, compare_readers),
    "no view keeps": ("carried_axis", lambda view, axis: None, compare_readers),
    "sizes are readers": ("readers", lambda node: sorted(node.users), compare_readers),
}


@pytest.mark.parametrize(("name", "wrong", "compare"), FAULTS.values(), ids=FAULTS)
def test_the_comparison_finds_faults(
    name: str, wrong: Object, compare: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("lensfx.rewrite.match"), name, wrong)

    @settings(max_examples=5000, phases=[Phase.generate])
    @given(SEEDS)
    def run(seed: int) -> None:
        compare(seed, Counter())

    with pytest.raises(AssertionError):
        run()
