"""Hook points at run time: what a user's function is given, and what it may give back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lensfx.errors import HookError

__all__ = ["Active", "HookFunction", "HookPoint", "visit"]

HookFunction = Callable[[torch.Tensor, "HookPoint"], "torch.Tensor | None"]


@dataclass(eq=False)
class HookPoint:
    """The second argument of a hook: `name`, and `ctx`, a dict that lives between runs."""

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)

    def layer(self) -> int:
        """The block number in the name, `blocks.3.hook_resid_pre` -> 3.

        Raises: HookError if the name has none.
        """
        found = re.search(r"(?:^|\.)(\d+)\.", self.name)
        if found is None:
            raise HookError(f"{self.name} belongs to no layer")
        return int(found[1])

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx.clear()


@dataclass(frozen=True)
class Active:
    """The functions of one run by hook name, in the order in which they are called.

    `collect` are given the gradient after all other hooks. A name in `demanded` must have one;
    elsewhere a backward hook is left out where no gradient flows.
    """

    points: Mapping[str, HookPoint]
    forward: Mapping[str, Sequence[HookFunction]]
    backward: Mapping[str, Sequence[HookFunction]]
    collect: Mapping[str, HookFunction]
    demanded: frozenset[str]


def visit(value: torch.Tensor, name: str, active: Active) -> torch.Tensor:
    """The value after every forward hook of `name`; its backward hooks are attached to it.

    A hook owns the tensor it is given: what it writes in place reaches the readers of `name`,
    and neither a weight nor any other value.

    Raises: HookError if a hook returns anything but None or a tensor of the same shape, dtype and
    device, or if a backward hook is demanded where no gradient flows.
    """
    point = active.points[name]
    forward = active.forward.get(name, ())
    if forward:
        # It may be a view of a weight or the very tensor of another value.
        value = _through(_own(value), point, forward)
    backward = active.backward.get(name, ())
    collect = active.collect.get(name)
    if not value.requires_grad:
        if name in active.demanded:
            raise HookError(
                f"{name} has no gradient: nothing before it requires one, or grad mode is off",
                hint="run with gradients enabled and parameters or inputs that require them",
            )
        return value
    if backward or collect is not None:
        value = _with_backward(value, point, backward, collect)
    return value


def _through(value: torch.Tensor, point: HookPoint, hooks: Sequence[HookFunction]) -> torch.Tensor:
    for hook in hooks:
        result = hook(value, point)
        if result is not None:
            _check(value, result, point.name)
            value = result
    return value


def _with_backward(
    value: torch.Tensor,
    point: HookPoint,
    hooks: Sequence[HookFunction],
    collect: HookFunction | None,
) -> torch.Tensor:
    # A view of its own: a hook on the value itself would also see gradients of earlier readers.
    value = value.view_as(value)

    def run(grad: torch.Tensor) -> torch.Tensor:
        if hooks:
            # Autograd hands the same tensor to both sides of an add.
            own = _own(grad)
            before = own._version
            result = _through(own, point, hooks)
            grad = grad if result is own and own._version == before else result
        if collect is not None:
            collect(grad, point)
        return grad

    value.register_hook(run)
    return value


def _own(value: torch.Tensor) -> torch.Tensor:
    """A copy with the value's strides: kernels give other last bits for other strides."""
    copy = value.clone()
    if copy.stride() == value.stride() or 0 in value.stride():
        return copy
    gaps = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return gaps.copy_(value)


def _check(value: torch.Tensor, result: Any, name: str) -> None:
    if not isinstance(result, torch.Tensor):
        raise HookError(
            f"the hook at {name} returned {type(result).__name__}, not a tensor or None",
            hint="return None to leave the value alone",
        )
    got = (tuple(result.shape), result.dtype, result.device)
    want = (tuple(value.shape), value.dtype, value.device)
    if got != want:
        raise HookError(
            f"the hook at {name} returned {_kind(got)}, and the value is {_kind(want)}",
            hint="return a tensor of the same shape, dtype and device",
        )


def _kind(facts: tuple[Any, ...]) -> str:
    shape, dtype, device = facts
    return f"{dtype} {list(shape)} on {device}"
