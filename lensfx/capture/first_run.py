"""The model run as it stands before it is traced: what it rejects, returns, keeps and asks for."""

from __future__ import annotations

import random
import sys
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
from lensfx.capture.untouched import hides_tensors, seeded
from lensfx.errors import CaptureError

__all__ = ["first_run"]

_OTHER_WITHOUT_GRADIENTS = (
    "with gradients off the model gives other numbers, as fused kernels of torch's do; the program "
    "is the model with gradients on"
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
    with seeded(model):
        drawn = _python_random_state()
        call, path = _run(model, call)
        draws = drawn != _python_random_state()
    if draws:
        with seeded(model):
            call = replace(call, draws=_drawing(model, call, restore))
    notes = call.notes
    if kept := restore():
        _refuse_state(model, call, kept, restore)
        notes += (f"forward sets {', '.join(kept[:5])}; a call of the program does not",)
    if _differs_without_gradients(model, call, restore):
        notes += (_OTHER_WITHOUT_GRADIENTS,)
    return _watching_identity(model, replace(call, notes=notes), path, restore)


def _python_random_state() -> Any:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else str(numpy.random.get_state()[1:3])


def _drawing(model: nn.Module, call: Call, restore: Callable[[], Any]) -> dict[str, str]:
    """The smallest submodules that draw from Python's or numpy's random numbers, and why.

    Raises: CaptureError if the model itself does.
    """
    paths = {id(m): path for path, m in model.named_modules()}
    open_calls: list[list[Any]] = []
    found: dict[str, str] = {}

    def enter(module: nn.Module, args: Any) -> None:
        open_calls.append([_python_random_state(), False])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        before, below = open_calls.pop()
        drew = before != _python_random_state()
        if drew and not below and id(module) in paths:
            found[paths[id(module)]] = "it draws from Python's or numpy's random numbers"
        if drew and open_calls:
            open_calls[-1][1] = True

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
    ]
    try:
        Flat(model, call, Seen())([t.clone() for t in call.example])
    finally:
        for handle in handles:
            handle.remove()
        restore()
    if "" in found or not found:
        raise CaptureError(
            f"{type(model).__name__}.forward draws from Python's or numpy's random numbers, which "
            "a graph cannot",
            hint="draw with torch, or in a submodule, which can then stay opaque",
        )
    return found


def _refuse_state(
    model: nn.Module, call: Call, kept: Sequence[str], restore: Callable[[], Any]
) -> None:
    """Whether what a call leaves behind in Python matters to the next one, on other values."""
    others = tuple(
        t * 2 if t.is_floating_point() else (t.flip(-1) if t.ndim else t) for t in call.example
    )
    results = []
    for before in ((), (call.example,)):
        # Pairs, since a forward may also register buffers.
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        for tensors in before:
            _results(model, call, tensors)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        results.append(_results(model, call, others))
        restore()
    registered = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    if not _alike(*results) and set(kept) - registered:
        raise CaptureError(
            f"{type(model).__name__} keeps {', '.join(kept[:5])} from one call for the next, which "
            "a graph cannot",
            hint="register it with register_buffer and update it in place, or pass it in",
        )


def _differs_without_gradients(model: nn.Module, call: Call, restore: Callable[[], Any]) -> bool:
    """Whether results are others with gradients off; fused kernels hide when they are watched."""
    results = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            results.append(_results(model, call, call.example))
        restore()
    return all(results) and not _alike(*results)


def _results(model: nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Copies of what the model returns on these tensors; nothing if it fails."""
    try:
        with seeded(model):
            flat = Flat(model, call, Seen())([t.clone() for t in tensors])
    except Exception:
        # The user's code, on values that it may reject.
        return []
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in flat]


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in pairs
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    )


def _on_shapes(model: nn.Module, call: Call) -> Call:
    """What a run shows as far as shapes tell; code that asks for a value is left to the trace."""
    seen = Seen()
    try:
        with on_shapes(model, call.example) as given:
            Flat(model, call, seen)(list(given))
    except Exception:
        # The user's code, which may ask a fake for its value.
        return call
    return _shown(call, seen)


def _run(model: nn.Module, call: Call) -> tuple[Call, list[Any]]:
    seen = Seen()
    try:
        path = _logged(model, call, seen)
    except ParameterWriteError as error:
        raise CaptureError(
            f"forward changes the parameter {error} in place",
            at=user_line(error),
            hint="update parameters outside forward",
        ) from None
    except Exception as error:
        # The user's code, on the user's example: anything may be wrong with either.
        raise CaptureError(
            f"{type(model).__name__} itself fails on this example: {said(error)}",
            at=user_line(error),
            hint="call the model with these arguments before wrapping it",
        ) from error
    asked = any(function in LAYOUT_READS for function, _ in path)
    contiguous = tuple(t.is_contiguous() for t in call.example) if asked else ()
    return replace(_shown(call, seen), contiguous=contiguous, calls=len(path)), path


def _logged(model: nn.Module, call: Call, seen: Seen) -> list[Any]:
    """The path of the model's code on the example, on which it may not write to parameters."""
    with CallLog() as log, ReadOnlyParameters(model):
        Flat(model, call, seen)([t.clone() for t in call.example])
    return log.calls


def _path(model: nn.Module, call: Call, restore: Callable[[], Any]) -> list[Any] | None:
    """The path of the model's code on the example; None if it fails."""
    try:
        with seeded(model):
            return _logged(model, call, Seen())
    except Exception:
        # The user's code, given one tensor where it may want two.
        return None
    finally:
        restore()


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
    return call.showing(seen)
