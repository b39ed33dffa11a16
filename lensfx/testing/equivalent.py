"""assert_equivalent: two models are the same function, or a message says where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lensfx.errors import LensError
from lensfx.testing.gradients import gradient_differences
from lensfx.verify.check import Comparison, _calls, _differences, _Output, _outputs
from lensfx.verify.compare import Difference
from lensfx.verify.contract import Contract, Exact, Observes

__all__ = ["assert_equivalent"]

# Sums over positions and examples cancel in a gradient, which costs digits that no rewrite took.
GRADIENT_BOUND = 1e-10

Call = tuple[tuple[Any, ...], dict[str, Any]]


def assert_equivalent(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    *,
    up_to: Any = None,
    inputs: Sequence[Any] | None = None,
    gradients: bool = False,
) -> Comparison:
    """The worst difference of two models, lenses, programs or callables, if they are equivalent.

    They are run in float64 and held against the contract `up_to`, which is `Exact()` if left out;
    under `Observes()` in their own dtype, bit by bit. `inputs` are calls: each a tensor, a tuple of
    arguments, a dict of keyword arguments, or a pair of both. They may be left out if either side
    is a lens or a program: hard inputs are drawn then. `gradients` also compares, in float64, the
    gradient of a random sum of the outputs with respect to every input and parameter that both
    sides have; both have to be modules, lenses or programs.

    Raises: AssertionError saying which output differs first, where and by how much. LensError if
    there is nothing to compare, or a call cannot be run.
    """
    contract = Exact() if up_to is None else up_to
    calls = _known_calls(reference, candidate, inputs)
    worst: Comparison | None = None
    for k, call in enumerate(calls):
        where = f"call {k} of {len(calls)}: {_shown(call)}"
        differences = _compared(reference, candidate, call, contract, where)
        if gradients:
            differences += _of_gradients(reference, candidate, call, contract, where)
        wrong = [(n, d) for n, d, bound in differences if not d.error <= bound]
        for name, difference, bound in differences:
            if not difference.error <= bound:
                raise AssertionError(
                    _message(contract, name, difference, bound, where, len(wrong), len(differences))
                )
            if worst is None or difference.error > worst.error:
                worst = Comparison(contract, difference.error, name, k, difference)
    assert worst is not None
    return worst


def _known_calls(reference: Any, candidate: Any, inputs: Sequence[Any] | None) -> list[Call]:
    for word, side in (("first", reference), ("second", candidate)):
        if not callable(side):
            raise LensError(
                f"the {word} argument is {type(side).__name__}, which cannot be called",
                hint="give a module, a lens, a program or a function",
            )
    if isinstance(inputs, torch.Tensor):
        raise LensError(
            "inputs is one tensor, and a list of calls is wanted",
            hint="give inputs=[ids], or inputs=[(ids, mask)] for two arguments",
        )
    return _calls(reference, candidate, inputs)


def _compared(
    reference: Any, candidate: Any, call: Call, contract: Contract, where: str
) -> list[tuple[str, Difference, float]]:
    """Each output with its difference and its bound, in the order of the reference."""
    left, right = (
        _outputs(side, *call, contract, f"the {word} cannot be run on {where}")
        for side, word in ((reference, "reference"), (candidate, "candidate"))
    )
    a, b = ([o for o in side if isinstance(o.value, torch.Tensor)] for side in (left, right))
    if not a and not b:
        raise LensError(
            f"neither side returned a tensor on {where}, so there is nothing to compare",
            hint="let both return the tensors to compare, in a tuple or a dict",
        )
    _check_structure(a, b, where)
    if all(_is_empty(o.value) for o in a):
        raise LensError(
            f"the reference has no number to compare on {where}: it is empty, or NaN throughout",
            hint="give inputs that both sides are defined on",
        )
    found = _differences(left, right, contract)
    return [(name, _worded(d), contract.bound) for name, d in found]


def _check_structure(a: list[_Output], b: list[_Output], where: str) -> None:
    if len(a) == len(b):
        return
    names = [{o.shown: None for o in side} for side in (a, b)]
    only = [[n for n in names[i] if n not in names[1 - i]] for i in (0, 1)]
    lines = [
        f"  only the {word} returns {', '.join(some[:4])}"
        for word, some in zip(("reference", "candidate"), only, strict=True)
        if some
    ]
    raise AssertionError(
        f"not equivalent: the reference returns {len(a)} tensors, the candidate {len(b)}\n"
        + "\n".join([*lines, f"  at {where}"])
    )


def _is_empty(value: torch.Tensor) -> bool:
    return not value.numel() or (value.is_floating_point() and bool(value.isnan().all()))


def _worded(difference: Difference) -> Difference:
    """The difference, saying which side has the NaN if that is what differs."""
    before, after = difference.reference, difference.candidate
    if (before != before) is (after != after):
        return difference
    side = "candidate" if after != after else "reference"
    note = f"only the {side} is NaN there"
    return Difference(difference.error, difference.index, before, after, note)


def _of_gradients(
    reference: Any, candidate: Any, call: Call, contract: Contract, where: str
) -> list[tuple[str, Difference, float]]:
    if isinstance(contract, Observes):
        contract = Exact()
    found = gradient_differences(reference, candidate, call, contract)
    if not found:
        raise LensError(
            f"no gradient to compare on {where}: the sides share no parameter by name and shape, "
            "and the call has no floating input",
            hint="leave gradients=True out, or give both the same parameter names",
        )
    return [(name, difference, GRADIENT_BOUND) for name, difference in found]


def _message(
    contract: Contract,
    name: str,
    difference: Difference,
    bound: float,
    where: str,
    wrong: int,
    count: int,
) -> str:
    lines = [
        f"not equivalent under {contract.name}: {name} differs by {difference.error:.1e} relative "
        f"(bound {bound:.0e})",
        f"  at {difference.text(name)}",
        f"  at {where}",
    ]
    if count > 1:
        lines.append(f"  {wrong} of {count} values differ; the first of them is shown")
    lines.append("  try: compare intermediate values with run_with_cache on both")
    return "\n".join(lines)


def _shown(call: Call) -> str:
    args, kwargs = call
    named = [*map(_kind, args), *(f"{k}={_kind(v)}" for k, v in kwargs.items())]
    return ", ".join(named) or "no arguments"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_kind, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_kind(v)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
