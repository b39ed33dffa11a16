"""Which module to capture when a user hands over one: wrappers taken off, misuse refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parameter import is_lazy

from lensfx.errors import CaptureError

__all__ = ["prepared"]

# Under these names wrapping tools keep the model that they were given.
_INNER = ("original_model", "_model", "_module", "model", "module")


def prepared(model: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The module itself, and notes on what was taken off it or is on it.

    Raises: CaptureError for what is no module, is another tool's wrapper, or has no sizes yet.
    """
    notes: list[str] = []
    while (inner := _wrapped(model)) is not None:
        if _hooks(model) or _backward_hooks(model):
            raise CaptureError(
                f"there are hooks on the {type(model).__name__} wrapper, which is taken off",
                hint="register them on the model inside",
            )
        notes.append(f"captured without its {type(model).__name__} wrapper")
        model = inner
    _refuse_other_tools(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is TorchScript, whose Python code is gone",
            hint="use the module that it was scripted from",
        )
    lazy = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if is_lazy(t)]
    if lazy:
        raise CaptureError(
            f"the model has no size for {lazy[0]} yet, it is lazy",
            hint="call the model once before wrapping it",
        )
    if hooked := [name for name, m in model.named_modules() if _hooks(m)]:
        where = ", ".join(name or "the model itself" for name in hooked[:3])
        more = f" and {len(hooked) - 3} more" if len(hooked) > 3 else ""
        notes.append(f"forward hooks are part of what is captured, at {where}{more}")
    if backward := [name for name, m in model.named_modules() if _backward_hooks(m)]:
        where = ", ".join(name or "the model itself" for name in backward[:3])
        notes.append(f"backward hooks are no part of what is captured, at {where}")
    return model, tuple(notes)


def _wrapped(model: Any) -> nn.Module | None:
    """What a wrapper that computes nothing of its own holds."""
    # What torch.compile returns: its forward hides the signature and the parameters' names.
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    return None


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _refuse_other_tools(model: Any) -> None:
    kind = type(model).__name__
    held = [n for n in _INNER if isinstance(getattr(model, n, None), nn.Module)]
    if not isinstance(model, nn.Module):
        if held and not callable(getattr(model, "run_with_cache", None)):
            raise CaptureError(
                f"{kind} is another tool's wrapper around a model",
                hint=f"pass the model in it: {held[0]}",
            )
        raise CaptureError(
            f"capture takes a torch.nn.Module, not {kind}",
            hint="pass the model itself, or wrap a function in a module whose forward calls it",
        )
    if held and callable(getattr(model, "run_with_cache", None)):
        raise CaptureError(
            f"{kind} is another tool's wrapper around a model, with hook points of its own",
            hint=f"pass the model in it: {held[0]}",
        )
