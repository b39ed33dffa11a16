"""capture: a model and an example call to a Program that computes bitwise what the model does."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lensfx.capture.check import settle_guards
from lensfx.capture.modes import tracing, untouched
from lensfx.capture.normal_form import normal_form
from lensfx.errors import CaptureError, LensError
from lensfx.graph.guards import Guards
from lensfx.graph.program import Program, Source
from lensfx.graph.signature import Leaf, Signature

__all__ = ["capture"]

_TORCH_HOME = os.path.dirname(torch.__file__)
_LENSFX_HOME = os.path.dirname(os.path.dirname(__file__))


@dataclass
class _Seen:
    """What the traced call returned besides tensors; kept outside the module tree on purpose."""

    out_spec: Any = None
    constants: tuple[Any, ...] = ()


class _Flat(nn.Module):
    """The model as a function from a list of tensors to a list of tensors."""

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf], spec: Any, seen: _Seen) -> None:
        super().__init__()
        self.model = model
        self._call = (tuple(leaves), spec, seen)

    def forward(self, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensor leaves of the model's result."""
        described, spec, seen = self._call
        given = iter(leaves)
        flat = [next(given) if leaf.is_tensor else leaf.constant for leaf in described]
        args, kwargs = pytree.tree_unflatten(flat, spec)
        out, seen.out_spec = pytree.tree_flatten(self.model(*args, **kwargs))
        seen.constants = tuple(None if isinstance(v, torch.Tensor) else _Constant(v) for v in out)
        return [v for v in out if isinstance(v, torch.Tensor)]


class _UntraceableError(Exception):
    """Torch's export failed; the cause says how."""


@dataclass(frozen=True)
class _Constant:
    value: Any


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """The model as a Program in normal form, captured in eval mode on one example call.

    The program's outputs are bitwise the model's and of the same type, its parameters are the
    model's own objects, and every axis the model's code leaves open is dynamic. The model is left
    exactly as it was.

    Raises: CaptureError naming the user's line if the model rejects the call or cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture takes a torch.nn.Module, not {type(model).__name__}",
            hint="wrap the function in a module whose forward calls it",
        )
    forward = inspect.signature(model.forward)
    try:
        named, positional, keywords = Signature.split(forward, args, kwargs)
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward does not accept this call: {error}",
            hint=f"the signature is {forward}",
        ) from None
    tree = (tuple(named[n] for n in positional), {n: named[n] for n in keywords})
    flat, spec = pytree.tree_flatten(tree)
    leaves = tuple(_leaves(tree, positional))
    example = tuple(v.detach() for v in flat if isinstance(v, torch.Tensor))
    notes = _notes(model)
    signature = partial(Signature, forward, positional, keywords, spec, leaves)
    failure: Exception | None = None
    with untouched(model):
        for widened in _widenings(example):
            try:
                return _attempt(model, signature, leaves, spec, example, widened, notes)
            except (_UntraceableError, LensError) as error:
                failure = failure or error
        assert failure is not None
        raise _capture_error(model, leaves, spec, example, failure) from failure


def _attempt(
    model: nn.Module,
    signature: Callable[..., Signature],
    leaves: tuple[Leaf, ...],
    spec: Any,
    example: tuple[torch.Tensor, ...],
    widened: tuple[torch.Tensor, ...],
    notes: tuple[str, ...],
) -> Program:
    seen = _Seen()
    flat = _Flat(model, leaves, spec, seen).eval()
    shapes = ([{d: Dim.AUTO for d in range(t.ndim)} for t in widened],)
    try:
        with _quiet(), tracing():
            exported = torch.export.export(
                flat, (list(widened),), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise _UntraceableError from error
    graph, tensors, unread, aliases = normal_form(exported, model, leaves, seen.constants)
    full = signature(seen.out_spec, _output_names(seen.out_spec))
    guards = _guards(exported, graph, full)
    source = Source(type(model).__name__, notes, unread, aliases)
    program = Program(graph, tensors, full, guards, example, source)
    return settle_guards(program, model, widened)


def _leaves(tree: Any, positional: Sequence[str]) -> Iterator[Leaf]:
    for (side, first, *rest), value in pytree.tree_flatten_with_path(tree)[0]:
        head = positional[first.idx] if side.idx == 0 else str(first.key)
        name = head + pytree.keystr(tuple(rest))
        if isinstance(value, torch.Tensor):
            yield Leaf(name, True)
        else:
            yield Leaf(name, False, value)


def _path_name(path: Sequence[Any]) -> str:
    head, *rest = path
    first = str(getattr(head, "key", getattr(head, "idx", head)))
    return first + pytree.keystr(tuple(rest))


def _output_names(spec: Any) -> tuple[str, ...]:
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [p for p, _ in pytree.tree_flatten_with_path(tree)[0]]
    return tuple(_path_name(p) if p else "output" for p in paths)


def _notes(model: nn.Module) -> tuple[str, ...]:
    if not any(m.training for m in model.modules()):
        return ()
    return ("the model is in training mode; the program is what it computes in eval mode",)


def _widenings(example: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The example with its axes of size 1 made larger: all of them, then fewer, then none.

    Torch specialises an axis whose example size is 1. An axis that is 1 by nature makes the
    model fail when it is widened, so the next choice leaves it alone.
    """
    ones = sorted({d for t in example for d, size in enumerate(t.shape) if size == 1})
    sizes = {d: (2, 3, 5, 7, 11, 13)[d % 6] for d in ones}
    choices = [ones, *([d] for d in ones if len(ones) > 1), []]
    for chosen in choices:
        yield tuple(_widen(t, {d: sizes[d] for d in chosen}) for t in example)


def _widen(tensor: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    for axis, size in sizes.items():
        if axis < tensor.ndim and tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(size, axis)
    return tensor


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch prints the partial graph of a failed export; our error says what the user needs."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _capture_error(
    model: nn.Module,
    leaves: Sequence[Leaf],
    spec: Any,
    example: Sequence[torch.Tensor],
    failure: BaseException,
) -> CaptureError:
    name = type(model).__name__
    try:
        with torch.no_grad():
            _Flat(model, leaves, spec, _Seen())(list(example))
    except Exception as error:
        return CaptureError(
            f"{name} itself fails on this example: {type(error).__name__}: {_first_line(error)}",
            at=_user_line(error),
            hint="call the model with these arguments before wrapping it",
        )
    if isinstance(failure, LensError):
        return CaptureError(failure.headline, at=failure.at, hint=failure.hint)
    cause = failure.__cause__ or failure
    return CaptureError(
        f"{name} cannot be traced: {type(cause).__name__}: {_first_line(cause)}",
        at=_user_line(cause),
        hint="express that line with tensor operations whose path does not depend on values",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _user_line(error: BaseException) -> str:
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((_TORCH_HOME, _LENSFX_HOME)) and f.filename[0] != "<"
    ]
    if not frames:
        return ""
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}  {frames[-1].line}"


def _guards(exported: Any, graph: Any, signature: Signature) -> Guards:
    ranges = {}
    for symbol, bounds in exported.range_constraints.items():
        low, high = bounds.lower, bounds.upper
        ranges[str(symbol)] = (
            int(low) if low.is_finite else 0,
            int(high) if high.is_finite and high < 2**40 else 2**40,
        )
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    return Guards.build(placeholders, signature.tensor_names, ranges, exported._guards_code)
