"""check: are two callables the same function, up to a contract? Measured in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lensfx.errors import ContractError, LensError
from lensfx.graph.program import Program
from lensfx.verify.compare import Difference
from lensfx.verify.contract import Exact, Observes
from lensfx.verify.inputs import hard_inputs
from lensfx.verify.oracle import Float64

__all__ = ["Comparison", "check"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """The worst difference over all calls and outputs; true if within the contract's bound."""

    contract: Any
    error: float
    output: str
    call: int
    difference: Difference

    @property
    def equivalent(self) -> bool:
        """Whether the error is within the contract's bound."""
        return bool(self.error <= self.contract.bound)

    def __bool__(self) -> bool:
        return self.equivalent

    def raise_if_different(self) -> None:
        """Do nothing if the two are equivalent.

        Raises: ContractError saying which output of which call differs, where and by how much.
        """
        if self.equivalent:
            return
        index = ", ".join(map(str, self.difference.index))
        raise ContractError(
            f"not equivalent under {self.contract.name}: {self.output} differs by {self.error:.1e} "
            f"relative (bound {self.contract.bound:.0e})",
            at=f"call {self.call}, {self.output}[{index}]: {self.difference.reference:.6g} became "
            f"{self.difference.candidate:.6g}",
            hint="compare intermediate values with run_with_cache on both",
        )


def check(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    *,
    up_to: Any = None,
    inputs: Sequence[Any] | None = None,
) -> Comparison:
    """Compare two callables with the same signature in float64, or bitwise under `Observes`.

    `inputs` are calls: each a tensor, a tuple of arguments, a dict of keyword arguments, or a pair
    of both. They may be left out if either side is a lens or a program, which knows how it is
    called. A rewritten program is compared before its weights are rounded.

    Raises: LensError if nobody knows how to call the two, or a call cannot be run.
    """
    contract = Exact() if up_to is None else up_to
    calls = _calls(reference, candidate, inputs)
    worst: Comparison | None = None
    for k, (args, kwargs) in enumerate(calls):
        left = _outputs(reference, args, kwargs, contract)
        right = _outputs(candidate, args, kwargs, contract)
        for output, difference in _differences(left, right, contract):
            if worst is None or difference.error > worst.error:
                worst = Comparison(contract, difference.error, output, k, difference)
    if worst is None:
        raise LensError("neither side returned a tensor, so there is nothing to compare")
    return worst


def _program(side: Any) -> Program | None:
    found = getattr(side, "program", side)
    return found if isinstance(found, Program) else None


def _calls(reference: Any, candidate: Any, inputs: Sequence[Any] | None) -> list[Call]:
    if inputs is not None:
        calls = [_call(entry) for entry in inputs]
        if not calls:
            raise LensError("inputs is empty, so nothing would be compared")
        return calls
    program = _program(reference) or _program(candidate)
    if program is None:
        raise LensError(
            "neither side says how it is called",
            hint="give inputs=[ids] or inputs=[(arg, ...), {'name': value}]",
        )
    return [_call_of(program, tensors) for tensors in hard_inputs(program)]


def _call(entry: Any) -> Call:
    if isinstance(entry, Mapping):
        return (), dict(entry)
    if isinstance(entry, tuple):
        if len(entry) == 2 and isinstance(entry[0], tuple) and isinstance(entry[1], dict):
            return entry
        return entry, {}
    return (entry,), {}


def _call_of(program: Program, tensors: Sequence[torch.Tensor]) -> Call:
    given = iter(tensors)
    leaves = program.signature.leaves
    flat = [next(given) if leaf.is_tensor else leaf.constant for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(flat, program.signature.in_spec)
    return tuple(args), dict(kwargs)


def _outputs(
    side: Any, args: tuple[Any, ...], kwargs: dict[str, Any], contract: Any
) -> list[tuple[str, Any]]:
    exact = isinstance(contract, Observes)
    program = _program(side)
    function = side
    if program is not None and not exact and program.unfolded is not None:
        function = program.unfolded
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if exact:
            out = function(*args, **kwargs)
        else:
            with Float64() as oracle:
                out = oracle.read(function(*args, **kwargs))
    found = pytree.tree_flatten_with_path(out)[0]
    return [(f"output{pytree.keystr(path)}", leaf) for path, leaf in found]


def _differences(
    left: list[tuple[str, Any]], right: list[tuple[str, Any]], contract: Any
) -> list[tuple[str, Difference]]:
    a = [(name, leaf) for name, leaf in left if isinstance(leaf, torch.Tensor)]
    b = [(name, leaf) for name, leaf in right if isinstance(leaf, torch.Tensor)]
    if len(a) != len(b):
        raise LensError(f"one side returns {len(a)} tensors, the other {len(b)}")
    return [(name, contract.compare(x, y)) for (name, x), (_, y) in zip(a, b, strict=True)]
