"""Values: a graph run on a scenario, giving its outputs and some named values, in float64 or not.

A graph that shows all its dtypes is widened as text: each that names a smaller float names
float64. Only one that runs code nobody sees, an opaque module, needs the modes of `Float64`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lensfx.graph.compiled import closure
from lensfx.graph.node import argument, dtype_of, is_op, outputs_of, schema_names
from lensfx.graph.ops import is_hook, written_tensors
from lensfx.verify.inputs import Scenario, seeded, wide
from lensfx.verify.kernels import KERNELS, WIDER
from lensfx.verify.oracle import Float64

__all__ = ["Found", "Values", "nudged", "recorded", "widened_args"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """What a run gave: its flat outputs, and the named values."""

    outputs: tuple[Any, ...]
    named: Mapping[str, Any]


class Values:
    """A graph as a function of a scenario; with `exact` in the dtypes that the scenario has."""

    def __init__(self, graph: fx.Graph, names: Iterable[str] = (), *, exact: bool = False) -> None:
        nodes = list(graph.nodes)
        known = {n.name: n for n in nodes}
        self._named = {name: known[name] for name in dict.fromkeys(names)}
        self._results = outputs_of(graph)
        roots = [r for r in self._results if isinstance(r, fx.Node)]
        needed = closure([*roots, *self._named.values()])
        self._inputs = [n for n in nodes if n.op == "placeholder"]
        self._nodes = [n for n in nodes if n in needed and n.op in ("get_attr", "call_function")]
        self._written = written_tensors(graph)
        self._exact = exact
        self._shown = all(map(_is_shown, self._nodes))
        self._last = self._last_uses(needed)

    def __call__(self, scenario: Scenario) -> Found:
        """The values, computed without gradients."""
        with seeded(), torch.no_grad():
            if self._exact:
                return self._run(scenario, None)
            if self._shown:
                return self.differentiable(scenario)
            with Float64(dtype=scenario.dtype) as oracle:
                return oracle.read(self._run(scenario, None))

    @property
    def can_be_differentiated(self) -> bool:
        """Whether the values follow from the inputs by operators that autograd knows."""
        return self._shown and not self._exact

    def differentiable(self, scenario: Scenario) -> Found:
        """The values in float64; gradients are recorded where they are on."""
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            inputs = tuple(map(_wide, scenario.inputs))
            return self._run(replace(scenario, inputs=inputs), scenario.dtype or torch.float64)
        finally:
            torch.set_default_dtype(kept)

    def _run(self, scenario: Scenario, dtype: torch.dtype | None) -> Found:
        """Every needed node in turn; a value is dropped behind its last reader."""
        given = zip(self._inputs, scenario.inputs, strict=True)
        env: dict[fx.Node, Any] = {n: t.clone() for n, t in given}
        noise = None if scenario.noise is None else torch.Generator().manual_seed(scenario.noise)
        for node in self._nodes:
            if node.op == "get_attr":
                held = scenario.weights[str(node.target)]
                env[node] = held.clone() if node.target in self._written else held
                continue
            args, kwargs = widened_args(node, dtype) if dtype else (node.args, node.kwargs)
            args, kwargs = fx.node.map_arg((args, kwargs), env.__getitem__)
            call = KERNELS.get(node.target, node.target) if dtype else node.target
            found = call(*args, **kwargs)  # type: ignore[operator]
            env[node] = found if noise is None else nudged(found, noise)
            for done in self._last.get(node, ()):
                del env[done]
        results = [env[r] if isinstance(r, fx.Node) else r for r in self._results]
        return Found(tuple(results), {name: env[n] for name, n in self._named.items()})

    def _last_uses(self, needed: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        kept = {*self._named.values(), *(r for r in self._results if isinstance(r, fx.Node))}
        last: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        found: dict[fx.Node, list[fx.Node]] = {}
        for node, reader in last.items():
            if node not in kept:
                found.setdefault(reader, []).append(node)
        return found


def nudged(value: Any, noise: torch.Generator) -> Any:
    """The value with every number moved up or down by one rounding of float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    sign = torch.randint(0, 2, value.shape, generator=noise).to(torch.float64) * 2 - 1
    # Whole numbers in a smaller dtype times a float would round the nudge away.
    return value.double() * (1 + sign * torch.finfo(torch.float64).eps)


def widened_args(node: fx.Node, dtype: torch.dtype) -> tuple[Any, Any]:
    """The arguments of a call as they read in float64, for a model that was written in `dtype`."""
    widened = fx.node.map_aggregate((node.args, node.kwargs), _dtype)
    args, kwargs = widened if _names_a_dtype(node) else (node.args, node.kwargs)
    if is_op(node, aten.rms_norm.default) and argument(node, "eps") is None:
        # The kernels compute in float32 for all smaller dtypes, and take their eps from there; a
        # part of the model may be in another dtype than the rest.
        eps = torch.finfo(
            torch.float32 if (dtype_of(node) or dtype) in WIDER else torch.float64
        ).eps
        named = dict(zip(schema_names(node.target), args, strict=False))
        return (), {**named, **kwargs, "eps": eps}
    return args, kwargs


def _names_a_dtype(node: fx.Node) -> bool:
    values = (*node.args, *node.kwargs.values())
    return any(isinstance(v, (torch.dtype, list, tuple, dict)) for v in values)


def _dtype(value: Any) -> Any:
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else wide(tensor)


def _is_shown(node: fx.Node) -> bool:
    """Whether all that a call computes follows from the operator and the arguments it names."""
    if node.op != "call_function" or is_hook(node) or node.target is operator.getitem:
        return True
    if is_op(node, aten.view.dtype):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in ("aten", "prims")
    module = getattr(node.target, "__module__", "")
    return module in ("_operator", "operator", "math", "torch", "torch.fx.experimental.sym_node")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Gradients on and the same random numbers, as `Values.differentiable` wants them."""
    with seeded(), torch.enable_grad():
        yield
