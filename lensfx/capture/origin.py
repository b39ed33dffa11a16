"""Where a program came from: the model, kept so that a call off the captured path can be traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lensfx.errors import CaptureError

__all__ = ["Origin"]


@dataclass(frozen=True)
class Origin:
    """A model and how it was asked to be captured.

    `opaque` are module types, instances or paths to leave as they are; `strict` refuses to leave
    anything else. A copy of a program has the same origin, not a copy of the model.
    """

    model: nn.Module = field(repr=False)
    opaque: tuple[Any, ...] = ()
    strict: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def with_weights(
        self, weights: Mapping[str, torch.Tensor], aliases: Mapping[str, str]
    ) -> Origin | None:
        """The same for a copy of the model that holds these weights; None if some are missing."""
        memo: dict[int, Any] = {}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            same = [name, aliases.get(name, name), *(a for a, n in aliases.items() if n == name)]
            given = next((weights[n] for n in same if n in weights), None)
            if given is None and tensor.is_meta:
                return None
            if given is not None and isinstance(tensor, nn.Parameter):
                given = nn.Parameter(given.detach(), requires_grad=tensor.requires_grad)
            if given is not None:
                memo[id(tensor)] = given
        return replace(self, model=copy.deepcopy(self.model, memo))

    def moved(
        self, move: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Origin:
        """The same for a copy of the model that went through `to(*args, **kwargs)`.

        `move` is what that does to one tensor. Raises: CaptureError if it cannot be copied.
        """
        try:
            model = _copied(self.model, move, *args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"{type(self.model).__name__} cannot be copied: {type(error).__name__}: {error}",
                hint="move the model itself and wrap it again",
            ) from error
        twins = dict(zip(self.model.modules(), model.modules(), strict=True))
        opaque = tuple(twins[o] if isinstance(o, nn.Module) else o for o in self.opaque)
        return replace(self, model=model, opaque=opaque)


def _copied(
    model: nn.Module, move: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
) -> nn.Module:
    kinds = {type(m) for m in model.modules()}
    if any(k._apply is not nn.Module._apply or k.to is not nn.Module.to for k in kinds):
        # Some parts have a mind of their own, such as a table that stays in float32.
        return copy.deepcopy(model).to(*args, **kwargs)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = nn.Parameter(move(parameter.detach()), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = moved
    for buffer in model.buffers():
        memo[id(buffer)] = move(buffer.detach())
    return copy.deepcopy(model, memo)
