"""A guard on a value, in the graph: the path was taken because the value was what it was."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import fx

from lensfx.errors import GuardError

__all__ = ["OtherPathError", "choices", "decided", "decided_size", "is_choice"]

_LIBRARY = torch.library.Library("lensfx", "FRAGMENT")
_LIBRARY.define(
    "decided(Tensor value, Scalar expected, str site, int index, float slack=0.0) -> ()"
)
_LIBRARY.define("decided.size(Scalar value, Scalar expected, str site, int index) -> ()")


class OtherPathError(GuardError):
    """This call takes a branch that is not in the graph.

    `index` counts the decisions of the captured path, `value` is what decides on this call.
    """

    def __init__(self, index: int, site: str, expected: Any, value: Any) -> None:
        super().__init__(
            f"this call takes another path: what decides it is {value!r}, {expected!r} at capture",
            at=site,
            hint="capture again with this call as the example",
        )
        self.index = index
        self.site = site
        self.value = value


@torch.library.impl(_LIBRARY, "decided", "CompositeExplicitAutograd")
def _decided(value: torch.Tensor, expected: Any, site: str, index: int, slack: float = 0.0) -> None:
    if value.is_meta:
        return
    got = value.item()
    if got == expected or (got != got and expected != expected):
        return
    # A rewritten graph gives the same number up to rounding, and a number may be no condition
    # but part of what is computed.
    if slack and math.isfinite(expected) and abs(got - expected) <= slack * abs(expected):
        return
    _other_path(index, site, expected, got)


@torch.library.impl(_LIBRARY, "decided.size", "CompositeExplicitAutograd")
def _decided_size(value: Any, expected: Any, site: str, index: int) -> None:
    if value != expected:
        _other_path(index, site, expected, value)


def _other_path(index: int, site: str, expected: Any, value: Any) -> NoReturn:
    raise OtherPathError(index, site, expected, value)


@torch.library.impl(_LIBRARY, "decided", "Meta")
def _decided_nowhere(
    value: torch.Tensor, expected: Any, site: str, index: int, slack: float = 0.0
) -> None:
    return None


decided: Any = torch.ops.lensfx.decided.default
decided_size: Any = torch.ops.lensfx.decided.size
# A compiler would drop an operator without results.
_TORCH_LIBRARY: Any = torch.library
for _op in (decided, decided_size):
    _TORCH_LIBRARY._register_effectful_op(_op, _TORCH_LIBRARY.EffectType.ORDERED)


def is_choice(node: fx.Node) -> bool:
    """Whether the node checks that a call takes the captured path."""
    return node.op == "call_function" and node.target in (decided, decided_size)


def choices(graph: fx.Graph) -> list[fx.Node]:
    """The checks of the captured path, in the order of the run."""
    return [n for n in graph.nodes if is_choice(n)]
