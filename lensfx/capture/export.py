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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lensfx.capture.check import DisagreementError, Traced, settle_guards
from lensfx.capture.modes import (
    LAYOUT_READS,
    CallLog,
    ParameterWriteError,
    ReadOnlyParameters,
    SizeBranches,
    tracing,
)
from lensfx.capture.normal_form import normal_form
from lensfx.capture.untouched import holds_tensors, untouched
from lensfx.errors import CaptureError, LensError
from lensfx.graph.guards import Guards
from lensfx.graph.program import Program, Source
from lensfx.graph.signature import Leaf, Signature, outline

__all__ = ["capture"]

_TORCH_HOME = os.path.dirname(torch.__file__)
_PYTHON_HOME = os.path.dirname(os.__file__)
_CAPTURE_HOME = os.path.dirname(__file__)
_SYMBOLS = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_LONGEST = 300


@dataclass
class _Seen:
    """What the traced call returned besides tensors; kept outside the module tree on purpose."""

    out_spec: Any = None
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass(frozen=True)
class _Call:
    """An example call, taken apart: its input tree, the tensors in it, what a run of it showed."""

    forward: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    example: tuple[torch.Tensor, ...]
    out_spec: Any = None
    contiguous: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def signature(self) -> Signature:
        """How calls bind to a program."""
        inputs = (self.forward, self.positional, self.keywords, self.in_spec, self.leaves)
        return Signature(*inputs, self.out_spec, _output_names(self.out_spec))


class _Flat(nn.Module):
    """The model as a function from a list of tensors to a list of tensors and sizes."""

    def __init__(self, model: nn.Module, call: _Call, seen: _Seen) -> None:
        super().__init__()
        self.model = model
        self._call = (call, seen)

    def forward(self, leaves: list[torch.Tensor]) -> list[Any]:
        """The leaves of the model's result that depend on the call."""
        call, seen = self._call
        given = iter(leaves)
        flat = [next(given) if leaf.is_tensor else leaf.constant for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(flat, call.in_spec)
        held = [(m._buffers, name, b) for m in self.model.modules() for name, b in _held(m)]
        result = self.model(*args, **kwargs)
        # A torch.Size holds no symbols, so tracing returns a tuple in its place.
        result = pytree.tree_map_only(torch.Size, tuple, result)
        out, seen.out_spec = pytree.tree_flatten(result)
        for buffers, name, old in held:
            _write_back(buffers, name, old)
        seen.constants = tuple(None if isinstance(v, _SYMBOLS) else _Constant(v) for v in out)
        return [v for v in out if isinstance(v, _SYMBOLS)]


def _held(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]


def _write_back(buffers: dict[str, Any], name: str, old: torch.Tensor) -> None:
    """Make `self.steps = self.steps + 1` a write into the buffer, which a graph can hold."""
    new = buffers.get(name)
    if new is not old and new is not None and new.shape == old.shape and new.dtype == old.dtype:
        with torch.no_grad():
            old.copy_(new)
        buffers[name] = old


class _UntraceableError(Exception):
    """Torch's export failed; the cause says how."""


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """The model as a Program in normal form, captured in eval mode on one example call.

    The program's outputs are bitwise the model's and of the same type, its parameters are the
    model's own objects, and every axis the model's code leaves open is dynamic. The model is left
    exactly as it was.

    Raises: CaptureError naming the user's line if the model rejects the call or cannot be traced.
    """
    model = _unwrapped(model)
    notes = _notes(model)
    failures: list[Exception] = []
    with _quiet(), untouched(model, (args, kwargs)) as restore:
        call = _taken_apart(model, args, kwargs)
        call = _run_once(model, call)
        if kept := restore():
            notes += (f"forward sets {', '.join(kept[:5])}; a call of the program does not",)
        for widened, fresh_casts in _attempts(call.example):
            if not fresh_casts and not isinstance(failures[-1], DisagreementError):
                continue
            try:
                return _attempt(model, replace(call, notes=notes), widened, fresh_casts, restore)
            except (_UntraceableError, LensError) as error:
                failures.append(error)
                restore()
    raise _capture_error(model, failures[0]) from failures[0]


def _unwrapped(model: Any) -> nn.Module:
    # What torch.compile returns: its forward hides the signature and the parameters' names.
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture takes a torch.nn.Module, not {type(model).__name__}",
            hint="wrap the function in a module whose forward calls it",
        )
    lazy = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if is_lazy(t)]
    if lazy:
        raise CaptureError(
            f"the model has no size for {lazy[0]} yet, it is lazy",
            hint="call the model once before wrapping it",
        )
    return model


def _taken_apart(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
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
    for leaf in leaves:
        if not leaf.is_tensor and holds_tensors(leaf.constant):
            kind = type(leaf.constant).__name__
            raise CaptureError(
                f"{leaf.name} is an object of type {kind}, in which torch sees no tensors",
                hint=f"pass the tensors in lists or dicts, or register {kind} as a pytree node",
            )
    tensors = (v.detach() for v in flat if isinstance(v, torch.Tensor))
    example = tuple(v.clone() if v.is_inference() else v for v in tensors)
    return _Call(forward, positional, keywords, spec, leaves, example)


def _run_once(model: nn.Module, call: _Call) -> _Call:
    """Run the model on the example, so that a call it rejects is not blamed on the tracer.

    It also fills caches outside the model, as `functools.cache` makes them, with real tensors:
    tracing would leave its own there. The call comes back with what the run showed.
    """
    seen = _Seen()
    try:
        with CallLog() as log, ReadOnlyParameters(model):
            _Flat(model, call, seen)([t.clone() for t in call.example])
    except ParameterWriteError as error:
        raise CaptureError(
            f"forward changes the parameter {error} in place",
            at=_user_line(error),
            hint="update parameters outside forward",
        ) from None
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} itself fails on this example: {_said(error)}",
            at=_user_line(error),
            hint="call the model with these arguments before wrapping it",
        ) from error
    for constant in seen.constants:
        if constant is not None and _hides_tensors(constant.value):
            kind = type(constant.value).__name__
            raise CaptureError(
                f"the model returns an object of type {kind}, in which torch sees no tensors",
                hint=f"return tuples, lists or dicts (transformers: use_cache=False), or register "
                f"{kind} as a pytree node",
            )
    asked = any(function in LAYOUT_READS for function, _ in log.calls)
    contiguous = tuple(t.is_contiguous() for t in call.example) if asked else ()
    return replace(call, contiguous=contiguous, out_spec=seen.out_spec)


def _hides_tensors(value: Any) -> bool:
    return isinstance(value, Iterator) or holds_tensors(value)


def _attempts(example: Sequence[torch.Tensor]) -> Iterator[tuple[tuple[torch.Tensor, ...], bool]]:
    """What to trace with; plain casts are for a model that writes into what a cast returned."""
    for widened in _widenings(example):
        yield widened, True
        yield widened, False


def _attempt(
    model: nn.Module,
    call: _Call,
    widened: tuple[torch.Tensor, ...],
    fresh_casts: bool,
    restore: Callable[[], Any],
) -> Program:
    seen = _Seen()
    flat = _Flat(model, call, seen)
    flat.training = False
    given = (list(widened),)
    # Torch takes a description of no inputs at all for a mistake.
    shapes = ([{d: Dim.AUTO for d in range(t.ndim)} for t in widened],) if widened else None
    try:
        with tracing(fresh_casts), SizeBranches() as branches:
            exported = torch.export.export(flat, given, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _UntraceableError from error
    restore()
    if seen.out_spec != call.out_spec:
        kinds = _kind(seen.out_spec), _kind(call.out_spec)
        raise CaptureError(
            f"the model returns {kinds[0]} when traced and {kinds[1]} when run",
            hint="let the kind of result not depend on torch.compiler.is_exporting()",
        )
    graph, tensors, unread, aliases = normal_form(exported, model, call.leaves, seen.constants)
    full = call.signature
    # A condition on one size is the same wherever that size is 1, so a run there tells.
    guards = _guards(exported, graph, full, branches.conditions(sizes=2))
    guards = replace(guards, contiguous=call.contiguous)
    path = _guards(exported, graph, full, branches.conditions())
    source = Source(type(model).__name__, call.notes, unread, aliases)
    program = Program(graph, tensors, full, guards, call.example, source)
    return settle_guards(program, model, Traced(widened, path, restore))


def _kind(spec: pytree.TreeSpec) -> str:
    return outline(pytree.tree_unflatten([0] * spec.num_leaves, spec))


def _leaves(tree: Any, positional: Sequence[str]) -> Iterator[Leaf]:
    for path, value in pytree.tree_flatten_with_path(tree)[0]:
        keys: Any = path
        side, first, *rest = keys
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
    """Torch logs and prints the partial graph of a failure; our error says what the user needs."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _capture_error(model: nn.Module, failure: Exception) -> CaptureError:
    if isinstance(failure, LensError):
        return CaptureError(failure.headline, at=failure.at, hint=failure.hint)
    cause = failure.__cause__ or failure
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {_said(cause)}",
        at=_user_line(cause),
        hint="express that line with tensor operations whose path does not depend on values",
    )


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {said if len(said) <= _LONGEST else said[:_LONGEST] + '...'}"


def _user_line(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    if not frames:
        return ""
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}  {frames[-1].line}"


def _is_users(path: str) -> bool:
    if path.startswith((_TORCH_HOME, _CAPTURE_HOME, "<")):
        return False
    return not path.startswith(_PYTHON_HOME) or "site-packages" in path


def _guards(exported: Any, graph: Any, signature: Signature, branches: Sequence[str]) -> Guards:
    ranges = {}
    for symbol, bounds in exported.range_constraints.items():
        low, high = bounds.lower, bounds.upper
        ranges[str(symbol)] = (
            int(low) if low.is_finite else 0,
            int(high) if high.is_finite and high < 2**40 else 2**40,
        )
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    conditions = [*exported._guards_code, *branches]
    return Guards.build(placeholders, signature.tensor_names, ranges, conditions)
