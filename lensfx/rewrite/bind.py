"""bind: give a program that was captured without weights its weights, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor

from lensfx.errors import RewriteError
from lensfx.graph.node import outputs_of
from lensfx.graph.program import Program, copy_graph
from lensfx.rewrite.blocks import evaluate

__all__ = ["bind"]

_LISTED = 5


def bind(
    program: Program,
    weights: Mapping[str, torch.Tensor] | nn.Module,
    device: torch.device | str | None = None,
) -> Program:
    """The program with tensors out of a state dict, a lazily read checkpoint or a real module.

    Every tensor that has no memory is looked up under its name or one that the model tied to it;
    a buffer that has some is replaced where the weights hold it. Folded parameters are computed
    from the given ones, one at a time, so that a lazily read checkpoint need not fit in memory
    beside the result; `unfolded` stays without weights. All goes to `device`, by default where the
    weights are, and so do the constants that the graph makes. Parameters of a module are shared.

    Raises: RewriteError if a weight is missing or has another shape or dtype than the program's.
    """
    given = _Given(weights, program)
    _refuse_missing(program, [m for name in program.tensors for m in given.missing(program, name)])
    bound: dict[int, torch.Tensor] = {}
    for name, old in program.tensors.items():
        if id(old) not in bound and (value := given.value(program, name)) is not None:
            bound[id(old)] = _placed(value, old, device)
    kept = {id(t): t for t in program.tensors.values() if id(t) not in bound}
    first = next(iter([*bound.values(), *kept.values()]), None)
    target = torch.device(device or ("cpu" if first is None else first.device))
    bound |= {key: _placed(t, t, target) for key, t in kept.items()}
    tensors = {name: bound[id(t)] for name, t in program.tensors.items()}
    return replace(
        program,
        graph=_moved(program.graph, target),
        tensors=MappingProxyType(tensors),
        example=tuple(
            torch.zeros_like(t, device=target) if t.is_meta else t.to(target)
            for t in program.example
        ),
        origin=_origin(program, weights),
    )


def _origin(program: Program, weights: Any) -> Any:
    """The model with these weights, for calls off the captured path; None if it cannot be run.

    A checkpoint that is read lazily stays where it is.
    """
    if isinstance(weights, nn.Module):
        return program.origin and replace(program.origin, model=weights)
    if program.origin is None or not isinstance(weights, dict):
        return None
    return program.origin.with_weights(weights, program.source.aliases)


class _Given:
    """Weights by any name that the model has for them, and what follows from them."""

    def __init__(self, weights: Any, program: Program) -> None:
        if isinstance(weights, nn.Module):
            parameters = weights.named_parameters(remove_duplicate=False)
            weights = {**dict(parameters), **dict(weights.named_buffers(remove_duplicate=False))}
        if not callable(getattr(weights, "keys", None)):
            raise RewriteError(
                f"weights are given as {type(weights).__name__}",
                hint="pass a state dict, an open safetensors file, or the module that holds them",
            )
        self._names = frozenset(weights.keys())
        # A safetensors file reads one tensor at a time, under another method.
        lazily = getattr(weights, "get_tensor", None)
        self._read: Callable[[str], torch.Tensor] = lazily or weights.__getitem__
        self._aliases = dict(program.source.aliases)

    def missing(self, program: Program, name: str) -> list[str]:
        """The names of tensors without memory that this one needs and that are not given."""
        formula, before = _formula(program, name)
        if formula is not None:
            needed = (n for s in formula.sources for n in self.missing(before, s))
            return list(dict.fromkeys(needed))
        tensor = program.tensors[name]
        return [name] if _is_empty(tensor) and self._name(program, name) is None else []

    def value(self, program: Program, name: str) -> torch.Tensor | None:
        """The tensor given for this name, or computed for it; None if its own is to stay."""
        formula, before = _formula(program, name)
        if formula is None:
            known = self._name(program, name)
            return None if known is None else _checked(self._read(known), program, name, known)
        if not _is_empty(program.tensors[name]) and not self._gives(before, formula.sources):
            return None
        sources: dict[str, torch.Tensor] = {}
        for source in formula.sources:
            value = self.value(before, source)
            sources[source] = before.tensors[source] if value is None else value
        (root,) = outputs_of(formula.graph)
        dtype = program.tensors[name].dtype
        return evaluate(root, lambda n: sources[str(n.target)], dtype)

    def _gives(self, program: Program, names: Iterable[str]) -> bool:
        for name in names:
            formula, before = _formula(program, name)
            if formula is None and self._name(program, name) is not None:
                return True
            if formula is not None and self._gives(before, formula.sources):
                return True
        return False

    def _name(self, program: Program, name: str) -> str | None:
        """The name under which the weights hold a tensor of the program."""
        tensor = program.tensors[name]
        own = [name, *(n for n, t in program.tensors.items() if t is tensor)]
        own += [a for a, n in self._aliases.items() if n in own]
        return next((n for n in own if n in self._names), None)


def _formula(program: Program, name: str) -> tuple[Any, Program]:
    """How a tensor was folded, if it was, and the program whose tensors that speaks of."""
    formula = program.formulas.get(name)
    before = program.unfolded or program
    if formula is None:
        return None, program
    if program.unfolded is not None and before.formulas.get(name) is formula:
        return _formula(before, name)
    return formula, before


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _checked(tensor: torch.Tensor, program: Program, name: str, known: str) -> torch.Tensor:
    old = program.tensors[name]
    if tensor.shape != old.shape:
        raise RewriteError(
            f"{known} has the shape {tuple(tensor.shape)} in the weights "
            f"and {tuple(old.shape)} in the program",
            hint="capture a model built from the configuration that the weights belong to",
        )
    if tensor.dtype != old.dtype:
        raise RewriteError(
            f"{known} is {tensor.dtype} in the weights and {old.dtype} in the program",
            hint=f"capture the model in {tensor.dtype}, or give weights cast to {old.dtype}",
        )
    if _is_empty(tensor):
        raise RewriteError(
            f"{known} holds no values in the weights either",
            hint="give a state dict, a checkpoint or a module whose tensors have memory",
        )
    return tensor


def _placed(
    value: torch.Tensor, old: torch.Tensor, device: torch.device | str | None
) -> torch.Tensor:
    """The value on its device, as a parameter where the old one was; one that fits is kept."""
    moved = value if device is None else value.to(device)
    if moved is not value:
        moved = moved.detach()
    if not isinstance(old, nn.Parameter) or isinstance(moved, nn.Parameter):
        return moved
    return nn.Parameter(moved.detach(), requires_grad=old.requires_grad)


def _refuse_missing(program: Program, missing: list[str]) -> None:
    if not missing:
        return
    unique = list(dict.fromkeys(missing))
    more = f" and {len(unique) - _LISTED} more" if len(unique) > _LISTED else ""
    buffers = [n for n in unique if not _is_parameter(program, n)]
    if buffers and len(buffers) == len(unique):
        raise RewriteError(
            f"the weights do not hold {', '.join(buffers[:_LISTED])}{more}, buffers that the model "
            "computes when it is built",
            hint="build the model under lensfx.empty_weights(), which computes its buffers",
        )
    raise RewriteError(
        f"the weights do not hold {', '.join(unique[:_LISTED])}{more}",
        hint="name the weights as the model's state_dict does",
    )


def _is_parameter(program: Program | None, name: str) -> bool:
    while program is not None:
        if name in program.tensors:
            return isinstance(program.tensors[name], nn.Parameter)
        program = program.unfolded
    return False


def _moved(graph: fx.Graph, target: torch.device) -> fx.Graph:
    """A copy of the graph whose constants are made on the target device."""
    copy, _ = copy_graph(graph)

    def there(value: Any) -> Any:
        return target if isinstance(value, torch.device) else value

    for node in copy.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, there)
            node.kwargs = fx.node.map_aggregate(node.kwargs, there)
    return copy
