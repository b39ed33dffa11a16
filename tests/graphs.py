"""Small programs built one call at a time, and small passes to run on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from lensfx.capture.normal_form import mark_weights
from lensfx.graph import Program, Source
from lensfx.graph.guards import Guards
from lensfx.graph.names import name_nodes
from lensfx.graph.signature import Leaf, Signature
from lensfx.rewrite import Edit, EveryReader, Match, Maybe, Op, Param, Pass, Ref, Rule

aten = torch.ops.aten


class Sketch:
    """A program under construction: inputs and weights first, then calls, then `done`.

    A size given as text, `"T"`, is dynamic. Weights and examples are random but the same in every
    run, and no weight is a trivial one.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._mode = FakeTensorMode(shape_env=ShapeEnv())
        self._random = torch.Generator().manual_seed(0)

    def input(self, name: str, *sizes: int | str, dtype: torch.dtype | None = None) -> fx.Node:
        # Sizes that coincide in the example would let torch assume that they always do.
        real = self._draw([{"B": 3, "T": 5}.get(str(s), s) for s in sizes], dtype)
        self._inputs[name] = real
        node = self.graph.placeholder(name)
        node.meta["val"] = self._fake(name, real, [isinstance(s, str) for s in sizes])
        return node

    def weight(
        self, name: str, *sizes: int, dtype: torch.dtype | None = None, like: str = ""
    ) -> fx.Node:
        """A read of a new parameter, or of the parameter named `like` under another name."""
        real = self.tensors[like] if like else nn.Parameter(self._draw(list(sizes), dtype))
        return self.stored(name, real)

    def stored(self, name: str, real: Tensor) -> fx.Node:
        self.tensors[name] = real
        node = self.graph.get_attr(name)
        node.meta["val"] = self._fake(name, real, [False] * real.ndim)
        return node

    def call(self, target: Any, *args: Any, path: str = "", **kwargs: Any) -> fx.Node:
        packet = getattr(target, "overloadpacket", target)
        node = self.graph.create_node("call_function", target, args, kwargs, packet.__name__)
        given = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with self._mode:
            node.meta["val"] = target(*given[0], **given[1])
        if path:
            node.meta["nn_module_stack"] = {path: (path, nn.Module)}
            node.meta["stack_trace"] = f'File "model.py", line 7, in forward\n    self.{path}(x)\n'
        return node

    def done(self, *outputs: fx.Node) -> Program:
        self.graph.output(tuple(outputs))
        mark_weights(self.graph)
        name_nodes(self.graph)
        example = tuple(self._inputs.values())
        names = tuple(self._inputs)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = Signature(
            inspect.Signature([inspect.Parameter(n, kind) for n in names]),
            names,
            (),
            pytree.tree_flatten((example, {}))[1],
            tuple(Leaf(n, True) for n in names),
            pytree.tree_flatten(tuple(outputs))[1],
            tuple(f"[{i}]" for i in range(len(outputs))),
        )
        holders = [n for n in self.graph.nodes if n.op == "placeholder"]
        guards = Guards.build(holders, names, {}, ())
        return Program(self.graph, self.tensors, signature, guards, example, Source("Sketch"))

    def _draw(self, sizes: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        if dtype is not None and not dtype.is_floating_point:
            return torch.randint(0, 5, sizes, dtype=dtype, generator=self._random)
        return torch.randn(sizes, dtype=dtype, generator=self._random)

    def _fake(self, name: str, real: Tensor, dynamic: Sequence[bool]) -> Tensor:
        kinds = [DimDynamic.DYNAMIC if d else DimDynamic.STATIC for d in dynamic]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return self._mode.from_tensor(
            real.detach(), source=ConstantSource(name), symbolic_context=context
        )


def node(program: Program, name: str) -> fx.Node:
    """The node of that name."""
    return next(n for n in program.graph.nodes if n.name == name)


def every_value(program: Program, *inputs: Tensor) -> dict[str, Any]:
    """What each node computes on these inputs, by node name."""
    seen: dict[str, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Watch(program.flat).run(*(inputs or program.example))
    return seen


NORM = Op(
    "norm",
    (aten.layer_norm.default, aten.rms_norm.default),
    {"weight": Maybe(Param("g")), "bias": Maybe(Param("s"))},
)
LINEAR = Op(
    "linear",
    (aten.linear.default,),
    {"input": Ref("norm"), "weight": Param("W", axes=2), "bias": Maybe(Param("b"))},
)


def bare(m: Match) -> str | None:
    return "" if m.g is None and m.s is None else None


def fold_scale(m: Match, edit: Edit) -> None:
    """The example rewrite of the style guide: scale and shift of a norm into its readers."""
    for r in m.readers:
        at, changed = edit.before(r.linear), {}
        if m.g is not None:
            changed["weight"] = at.call(aten.mul.Tensor, r.W, m.g)
        if m.s is not None:
            Ws = at.call(aten.mv.default, r.W, m.s)
            changed["bias"] = Ws if r.b is None else at.call(aten.add.Tensor, r.b, Ws)
        at.set(r.linear, **changed)
    edit.before(m.norm).set(m.norm, weight=None, **({} if m.s is None else {"bias": None}))


@dataclass(frozen=True)
class FoldScale(Pass):
    """Folding a norm's scale and shift, without any of the cares of the shipped pass."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(EveryReader(NORM, LINEAR), bare, fold_scale),)


@dataclass(frozen=True)
class Once(Pass):
    """One rule given as values: fires wherever `pattern` matches and `unless` lets it."""

    pattern: Any = None
    rewrite: Callable[[Match, Edit], None] = fold_scale
    unless: Callable[[Match], str | None] = lambda m: None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule(self.pattern, self.unless, self.rewrite),)
