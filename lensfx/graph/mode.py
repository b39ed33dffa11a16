"""What surrounds a call and changes what a model computes: training mode, ambient autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["EVAL", "Mode", "plain"]


def _devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@dataclass(frozen=True)
class Mode:
    """Whether modules are in training mode, and the dtype of autocast where it is on, by device."""

    training: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()

    @classmethod
    def ambient(cls, training: bool = False) -> Mode:
        """The mode that a call made here and now is in."""
        on = [d for d in _devices() if torch.is_autocast_enabled(d)]
        return cls(training, tuple((d, torch.get_autocast_dtype(d)) for d in on))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Autocast as this mode has it, whatever it is outside."""
        with contextlib.ExitStack() as stack:
            if not self.autocast:
                stack.enter_context(plain())
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield

    def __str__(self) -> str:
        words = ["training" if self.training else "eval"]
        words += [f"autocast to {dtype} on {device}" for device, dtype in self.autocast]
        return ", ".join(words)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No autocast: a captured graph holds its casts, and another one on top would be wrong."""
    with contextlib.ExitStack() as stack:
        for device in _devices():
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


EVAL = Mode()
