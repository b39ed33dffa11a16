"""For users' own tests: assert that two models are the same function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lensfx.errors import ContractError
from lensfx.verify.check import Comparison, check

__all__ = ["assert_equivalent"]


def assert_equivalent(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    *,
    up_to: Any = None,
    inputs: Sequence[Any] | None = None,
) -> Comparison:
    """The comparison of two callables, if they are equal in float64 up to a contract.

    Arguments as for `lensfx.verify.check`.

    Raises: AssertionError saying which output differs, where and by how much.
    """
    comparison = check(reference, candidate, up_to=up_to, inputs=inputs)
    try:
        comparison.raise_if_different()
    except ContractError as error:
        raise AssertionError(str(error)) from None
    return comparison
