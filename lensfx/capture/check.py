"""After capture the graph is run beside the model, bitwise, also where torch assumes sizes >= 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lensfx.errors import CaptureError, GuardError
from lensfx.graph.guards import Axis, Guards
from lensfx.graph.ops import writes
from lensfx.graph.program import Program

__all__ = ["settle_guards"]


def settle_guards(program: Program, model: nn.Module, traced: Sequence[torch.Tensor]) -> Program:
    """The program with size 1 allowed on each dynamic axis where the model agrees bitwise.

    Torch never traces a dynamic axis of size 1, so code under `if length == 1` is not in the
    graph: each axis is tried at 1 and stays bounded by 2 if the model does something else there.
    Axes that agree only together (the batch of ids and of their mask) are tied by a relation.
    `traced` are the inputs the graph was traced with, all of whose dynamic axes are larger than 1.

    Raises: CaptureError if the graph and the model differ on the example itself.
    """
    wide, ties = program.guards, []
    for group in _groups(program, traced):
        tried = _allow_one(wide, group)
        if not _agrees_at_one(program, tried, model, traced, group):
            continue
        wide = tried
        if any(not _agrees_at_one(program, tried, model, traced, [a]) for a in group[1:]):
            ties += [_tie(group[0], axis) for axis in group[1:]]
    ones = [a for a in wide.axes if a.low == 1]
    if ones and not _agrees_at_one(program, wide, model, traced, ones):
        ties.append(f"not ({' and '.join(f'{_size(a)} == 1' for a in ones)})")
    settled = program.with_graph(program.graph, guards=wide.with_relations(ties))
    if not _passes(settled.guards, program.example):
        raise CaptureError(
            "the model takes another path at size 1 than at larger sizes, and the example has it",
            hint="capture with an example whose axes are larger than 1",
        )
    difference = _disagreement(settled, model, program.example)
    if difference is not None:
        raise CaptureError(
            f"the captured graph is not the model on its own example: {difference}",
            hint="a forward that keeps state between calls, or draws random numbers, does this",
        )
    return settled


def _groups(program: Program, traced: Sequence[torch.Tensor]) -> list[list[Axis]]:
    """Axes to try at size 1 together: one per symbol, those at the same place in their inputs."""
    first: dict[str, Axis] = {}
    for axis in program.guards.dynamic:
        if axis.symbol is not None and axis.low == 2:
            first.setdefault(axis.symbol, axis)
    groups: dict[tuple[int, int], list[Axis]] = {}
    for axis in first.values():
        size = traced[axis.leaf].shape[axis.axis]
        groups.setdefault((axis.axis, size), []).append(axis)
    return list(groups.values())


def _allow_one(guards: Guards, group: Sequence[Axis]) -> Guards:
    symbols = {a.symbol for a in group}
    axes = tuple(replace(a, low=1) if a.symbol in symbols else a for a in guards.axes)
    return replace(guards, axes=axes, _passed=set())


def _size(axis: Axis) -> str:
    return f"t[{axis.leaf}].shape[{axis.axis}]"


def _tie(a: Axis, b: Axis) -> str:
    return f"({_size(a)} == 1) == ({_size(b)} == 1)"


def _agrees_at_one(
    program: Program,
    guards: Guards,
    model: nn.Module,
    traced: Sequence[torch.Tensor],
    axes: Sequence[Axis],
) -> bool:
    symbols = {a.symbol for a in axes}
    small = list(traced)
    for axis in guards.axes:
        if axis.symbol in symbols:
            small[axis.leaf] = small[axis.leaf].narrow(axis.axis, 0, 1)
    return _passes(guards, small) and _disagreement(program, model, small) is None


def _passes(guards: Guards, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        guards.check(tensors)
    except GuardError:
        return False
    return True


def _disagreement(
    program: Program, model: nn.Module, tensors: Sequence[torch.Tensor]
) -> str | None:
    try:
        with _state_kept(program):
            want = _run_model(program, model, tensors)
    except Exception as error:
        return f"the model fails there: {type(error).__name__}: {error}"
    try:
        with _state_kept(program), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            got = list(program.flat(*(t.clone() for t in tensors)))
    except Exception as error:
        return f"the graph fails where the model runs: {type(error).__name__}: {error}"
    for name, a, b in zip(program.signature.outputs, want, got, strict=True):
        if isinstance(a, torch.Tensor):
            if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} has another shape or dtype"
            if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
                worst = (a.double() - b.double()).abs().max().item()
                return f"{name} differs by up to {worst:.1e}"
    return None


@contextlib.contextmanager
def _state_kept(program: Program) -> Iterator[None]:
    """Undo what a run writes into buffers, so that the next run starts where this one did."""
    written = [
        program.tensors[str(n.args[0].target)]
        for n in program.graph.nodes
        if n.op == "call_function" and writes(n) and n.args[0].op == "get_attr"
    ]
    kept = [t.detach().clone() for t in written]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(written, kept, strict=True):
                tensor.copy_(value)


def _run_model(program: Program, model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[Any]:
    signature = program.signature
    given = iter(t.clone() for t in tensors)
    flat = [next(given) if leaf.is_tensor else leaf.constant for leaf in signature.leaves]
    args, kwargs = pytree.tree_unflatten(flat, signature.in_spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(pytree.tree_flatten(model(*args, **kwargs))[0])
