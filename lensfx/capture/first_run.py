"""The model run as it stands before it is traced: what it rejects, returns, keeps and asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lensfx.capture.call import Call, Flat, Seen
from lensfx.capture.empty import NOT_RUN, has_no_weights, on_shapes
from lensfx.capture.failures import said, user_line
from lensfx.capture.modes import (
    LAYOUT_READS,
    CallLog,
    ParameterWriteError,
    ReadOnlyParameters,
)
from lensfx.capture.untouched import hides_tensors
from lensfx.errors import CaptureError

__all__ = ["first_run"]

_OTHER_WITHOUT_GRADIENTS = (
    "with gradients off the model takes another path, such as a fused kernel of torch's; the "
    "program is the path with gradients on"
)


def first_run(model: nn.Module, call: Call, restore: Callable[[], list[str]]) -> Call:
    """Run the model on the example, so that a call it rejects is not blamed on the tracer.

    It also fills caches outside the model, as `functools.cache` makes them, with real tensors:
    tracing would leave its own there. The call comes back with what the runs showed. A model
    without weights is run on shapes alone.

    Raises: CaptureError if the model fails, or returns or does what no graph can.
    """
    if has_no_weights(model):
        call = _on_shapes(model, replace(call, notes=(*call.notes, NOT_RUN)))
        restore()
        return call
    call, path = _run(model, call)
    notes = call.notes
    if kept := restore():
        notes += (f"forward sets {', '.join(kept[:5])}; a call of the program does not",)
    with torch.no_grad():
        if _path(model, call, restore) not in (path, None):
            notes += (_OTHER_WITHOUT_GRADIENTS,)
    return _watching_identity(model, replace(call, notes=notes), path, restore)


def _on_shapes(model: nn.Module, call: Call) -> Call:
    """What a run shows as far as shapes tell; code that asks for a value is left to the trace."""
    seen = Seen()
    try:
        with on_shapes(model, call.example) as given:
            Flat(model, call, seen)(list(given))
    except Exception:
        return call
    return _shown(call, seen)


def _run(model: nn.Module, call: Call) -> tuple[Call, list[Any]]:
    seen = Seen()
    try:
        with CallLog() as log, ReadOnlyParameters(model):
            Flat(model, call, seen)([t.clone() for t in call.example])
    except ParameterWriteError as error:
        raise CaptureError(
            f"forward changes the parameter {error} in place",
            at=user_line(error),
            hint="update parameters outside forward",
        ) from None
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} itself fails on this example: {said(error)}",
            at=user_line(error),
            hint="call the model with these arguments before wrapping it",
        ) from error
    asked = any(function in LAYOUT_READS for function, _ in log.calls)
    contiguous = tuple(t.is_contiguous() for t in call.example) if asked else ()
    call = replace(_shown(call, seen), contiguous=contiguous, calls=len(log.calls))
    return call, log.calls


def _path(model: nn.Module, call: Call, restore: Callable[[], Any]) -> list[Any] | None:
    """The path of the model's code on the example; None if it fails."""
    try:
        with CallLog() as log, ReadOnlyParameters(model):
            Flat(model, call, Seen())([t.clone() for t in call.example])
    except Exception:
        return None
    finally:
        restore()
    return log.calls


def _watching_identity(
    model: nn.Module, call: Call, path: Sequence[Any], restore: Callable[[], Any]
) -> Call:
    """The call with the leaves that were one object kept as one only if the model asks for that.

    `attention(x, x, x)` may be a case of its own, and may be just three arguments.
    """
    apart = tuple(replace(leaf, same=None) for leaf in call.leaves)
    other = apart if any(leaf.same is not None for leaf in call.leaves) else _merged(call)
    if other is None:
        return call
    asks = _path(model, replace(call, leaves=other), restore) != path
    return replace(call, watches_identity=True) if asks else replace(call, leaves=apart)


def _merged(call: Call) -> tuple[Any, ...] | None:
    """The leaves with those that could be one tensor made one; None if there are none."""
    first: dict[Any, int] = {}
    leaves, number = [], 0
    for leaf in call.leaves:
        if leaf.is_tensor:
            tensor = call.example[number]
            at = first.setdefault((tensor.shape, tensor.dtype, tensor.device), number)
            leaves.append(replace(leaf, same=None if at == number else at))
            number += 1
        else:
            leaves.append(leaf)
    return tuple(leaves) if len(first) < number else None


def _shown(call: Call, seen: Seen) -> Call:
    if seen.rewrote_arguments:
        raise CaptureError(
            "forward puts other values into a list or dict that it is given",
            hint="return them instead: a captured graph changes tensors, and no containers",
        )
    for constant in seen.constants:
        if constant is not None and hides_tensors(constant.value):
            kind = type(constant.value).__name__
            raise CaptureError(
                f"the model returns an object of type {kind}, in which torch sees no tensors",
                hint=f"return tuples, lists or dicts (transformers: use_cache=False), or register "
                f"{kind} as a pytree node",
            )
    return replace(call, out_spec=seen.out_spec)
