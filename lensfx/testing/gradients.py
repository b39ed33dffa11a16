"""Gradients of two models in float64, by running their graphs with every dtype widened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lensfx
from lensfx.errors import LensError
from lensfx.graph.program import Program
from lensfx.verify.compare import Difference, rows
from lensfx.verify.contract import Contract, UpToLogitShift
from lensfx.verify.inputs import model_dtype, wide

__all__ = ["gradient_differences"]

aten = torch.ops.aten

NARROW = (torch.float16, torch.bfloat16, torch.float32)
COMPLEX = (torch.complex32, torch.complex64)
# Below this part of the median gradient, one is rounding: a bias of keys has the gradient 0.
FLOOR = 1e-3


def gradient_differences(
    reference: Any, candidate: Any, call: tuple[Any, Any], contract: Contract
) -> list[tuple[str, Difference]]:
    """How far the gradients of two sides are apart, one entry for each input and shared parameter.

    The outputs are summed with random weights, which a contract that lets an output shift makes
    sum to zero along its axis. Parameters are shared by name and shape.

    Raises: LensError for a side that is no module, lens or program, or cannot be differentiated.
    """
    left, right = (
        _gradients(_program(side, call), call, contract) for side in (reference, candidate)
    )
    shared = [n for n in left if n in right and left[n].shape == right[n].shape]
    sizes = [float(torch.linalg.vector_norm(left[n])) for n in shared]
    present = sorted(s for s in sizes if s > 0.0)
    floor = FLOOR * present[len(present) // 2] if present else 0.0
    return [
        (f"the gradient of {name}", _difference(left[name], right[name], max(size, floor)))
        for name, size in zip(shared, sizes, strict=True)
    ]


def _difference(a: Tensor, b: Tensor, size: float) -> Difference:
    error = float(torch.linalg.vector_norm(a - b))
    found = rows(a, b)
    if error == 0.0 or not found.index:
        return found
    relative = error / size if size else torch.inf
    return Difference(relative, found.index, found.reference, found.candidate, found.note)


def _program(side: Any, call: tuple[Any, Any]) -> Program:
    """The side as a graph over the parameters it came from."""
    found = getattr(side, "program", side)
    if isinstance(found, Program):
        return found.unfolded or found
    if not isinstance(side, nn.Module):
        raise LensError(
            f"gradients of {type(side).__name__} cannot be taken in float64",
            hint="give modules, lenses or programs, or leave gradients=True out",
        )
    args, kwargs = call
    return lensfx.capture(side, *args, **kwargs)


def _gradients(program: Program, call: tuple[Any, Any], contract: Contract) -> dict[str, Tensor]:
    """The gradient with respect to each floating input and each parameter, by name."""
    tensors = program.signature.bind(*call)
    program.guards.check(tensors)
    inputs = [_leaf(t) for t in tensors]
    known = {id(t): _leaf(t) for t in program.tensors.values()}
    weights = {name: known[id(t)] for name, t in program.tensors.items()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad():
            outputs = _Widened(program, weights)(inputs)
            total = _total(dict(zip(program.signature.outputs, outputs, strict=True)), contract)
            wanted = _named(program, inputs, weights)
            found = torch.autograd.grad(
                total, list(wanted.values()), allow_unused=True, materialize_grads=True
            )
    except RuntimeError as error:
        raise LensError(
            f"{program.source.model} has no gradient on this call: {str(error).splitlines()[0]}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    return dict(zip(wanted, found, strict=True))


def _leaf(tensor: Tensor) -> Tensor:
    made = wide(tensor).clone()
    return made.requires_grad_(made.is_floating_point() or made.is_complex())


def _named(
    program: Program, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What to differentiate by, each tensor once."""
    names = {f"input {n}": t for n, t in zip(program.signature.tensor_names, inputs, strict=True)}
    trained = {
        f"parameter {n}": weights[n]
        for n, t in program.tensors.items()
        if isinstance(t, nn.Parameter)
    }
    return {n: t for n, t in {**names, **trained}.items() if t.requires_grad}


def _total(outputs: Mapping[str, Any], contract: Contract) -> Tensor:
    """A random sum of all outputs, the same for two dicts with their keys in another order."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    places = {name: k for k, name in enumerate(outputs)}
    for name, out in sorted(outputs.items()):
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            v = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            rule = contract.at(places[name])
            rule = rule if type(rule) is type(contract) else contract.at(name)
            if isinstance(rule, UpToLogitShift) and -out.ndim <= rule.axis < out.ndim:
                v = v - v.mean(rule.axis, keepdim=True)
            total = total + (v * out).sum()
    return total


@dataclass(frozen=True)
class _Widened:
    """A graph as a function in float64, differentiable with respect to all that it reads."""

    program: Program
    weights: Mapping[str, Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        given = iter(inputs)
        values: dict[fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                # A graph may write into what it is given, and a leaf cannot be written to.
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                values[node] = self.weights[str(node.target)]
            elif node.op == "call_function":
                values[node] = self._call(node, values)
            else:
                return list(fx.node.map_arg(node.args[0], values.__getitem__))
        raise LensError("the graph has no output")

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.target is torch.ops.lensfx.opaque.default:
            raise LensError(
                f"gradients cannot be taken in float64 through the opaque %{node.name}",
                hint="leave gradients=True out for this model",
            )
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        args, kwargs = pytree.tree_map_only(torch.dtype, _wider, (args, kwargs))
        if node.target is aten.rms_norm.default and len(args) < 4:
            narrow = model_dtype(self.program) in NARROW
            eps = torch.finfo(torch.float32 if narrow else torch.float64).eps
            kwargs = {"weight": args[2] if len(args) > 2 else None, "eps": eps, **kwargs}
            args = args[:2]
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _wider(dtype: torch.dtype) -> torch.dtype:
    if dtype in NARROW:
        return torch.float64
    return torch.complex128 if dtype in COMPLEX else dtype
