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
from lensfx.verify.contract import Contract, Exact, Observes
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
        raise ContractError(
            f"not equivalent under {self.contract.name}: {self.output} differs by {self.error:.1e} "
            f"relative (bound {self.contract.bound:.0e})",
            at=f"call {self.call}, {self.difference.text(self.output)}",
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
    if not isinstance(contract, Contract):
        raise LensError(f"up_to={up_to!r} is no contract", hint="up_to=UpToLogitShift()")
    calls = _calls(reference, candidate, inputs)
    worst: Comparison | None = None
    for k, (args, kwargs) in enumerate(calls):
        left, right = (
            _outputs(side, args, kwargs, contract, f"the {word} cannot be run on call {k}")
            for side, word in ((reference, "reference"), (candidate, "candidate"))
        )
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
        if isinstance(inputs, torch.Tensor) or not isinstance(inputs, Sequence):
            raise LensError(
                f"inputs is {type(inputs).__name__}, not a list of calls", hint="inputs=[ids]"
            )
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


@dataclass(frozen=True)
class _Output:
    """One leaf of what a side returned: its place among all leaves, and what to call it."""

    place: int
    path: tuple[Any, ...]
    value: Any

    @property
    def shown(self) -> str:
        return f"output{pytree.keystr(self.path)}"

    @property
    def name(self) -> str:
        """As the signature of a program names its outputs: `logits`, `0[1]`."""
        if not self.path:
            return "output"
        first = str(getattr(self.path[0], "key", getattr(self.path[0], "idx", self.path[0])))
        return first + pytree.keystr(self.path[1:])


def _outputs(
    side: Any, args: tuple[Any, ...], kwargs: dict[str, Any], contract: Any, problem: str
) -> list[_Output]:
    exact = isinstance(contract, Observes)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            if exact:
                out = side(*args, **kwargs)
            else:
                function, args, kwargs = _unrounded(side, args, kwargs)
                with Float64() as oracle:
                    out = oracle.read(function(*args, **kwargs))
        except LensError:
            raise
        except Exception as error:
            raise LensError(f"{problem}: {type(error).__name__}: {error}") from error
    found = pytree.tree_flatten_with_path(out)[0]
    return [_Output(k, path, leaf) for k, (path, leaf) in enumerate(found)]


def _unrounded(
    side: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The side with its weights as expressions, its call bound and its guards checked.

    Under the oracle every dtype reads as float64, which a guard on the dtype would refuse.
    """
    program = _program(side)
    if program is None:
        return side, args, kwargs
    before = program.unfolded
    if before is not None and not any(t.is_meta for t in before.tensors.values()):
        program = before
    signature, flat = program.signature, program.flat
    tensors = signature.bind(args, kwargs)
    program.guards.check(tensors)
    return lambda *given: signature.unflatten(list(flat(*given))), tuple(tensors), {}


def _differences(
    left: list[_Output], right: list[_Output], contract: Any
) -> list[tuple[str, Difference]]:
    a = [out for out in left if isinstance(out.value, torch.Tensor)]
    b = [out for out in right if isinstance(out.value, torch.Tensor)]
    if len(a) != len(b):
        raise LensError(f"one side returns {len(a)} tensors, the other {len(b)}")
    named = {out.name: out for out in b}
    if named.keys() == {out.name for out in a}:
        # The same keys in another order, as two dicts may have them.
        b = [named[out.name] for out in a]
    found = []
    for x, y in zip(a, b, strict=True):
        rule = contract.at(x.place)
        rule = rule if type(rule) is type(contract) else contract.at(x.name)
        found.append((x.shown, rule.compare(x.value, y.value)))
    return found
