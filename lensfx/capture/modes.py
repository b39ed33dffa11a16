"""What a model is traced and run under: casts kept apart, parameters read-only, branches noted."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    statically_known_true,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

from lensfx.capture.autocast import flat_regions
from lensfx.capture.patching import patched

__all__ = [
    "LAYOUT_READS",
    "CallLog",
    "ParameterWriteError",
    "ReadOnlyParameters",
    "SizeBranches",
    "fresh_casts",
    "tracing",
]

_TORCH_HOME = os.path.dirname(torch.__file__)
T = torch.Tensor
_TO: Any = torch.Tensor.to
_HOOK = torch.Tensor.register_hook
_DATA: Any = torch._C.TensorBase.data
_SHORT_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
# What tells a model how a tensor lies in memory, which is no part of a graph.
LAYOUT_READS = frozenset(
    {
        torch.Tensor.is_contiguous,
        torch.Tensor.stride,
        torch.Tensor.storage_offset,
        torch.Tensor.as_strided,
        torch.as_strided,
    }
)


@contextlib.contextmanager
def fresh_casts() -> Iterator[None]:
    """Inside, a cast to the dtype a value already has returns a new value.

    Torch returns the same object, and the tracer then sends every later reader of the value
    through the cast: in a float32 capture the residual stream would run through a norm's cast.
    The methods are replaced: a function mode, which every torch function would go through, takes
    a quarter of the time of a bare export.
    """
    casts = {name: _short(getattr(T, name), dtype) for name, dtype in _SHORT_CASTS.items()}
    with patched(T, **casts, to=_fresh_to, type_as=_fresh_type_as):
        yield


def _short(plain: Any, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    def cast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain(tensor, *args, **kwargs)
        return _TO(tensor, dtype, copy=True)

    return cast


def _fresh_to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if "copy" in kwargs or any(isinstance(a, bool) for a in args):
        return _TO(tensor, *args, **kwargs)
    return _TO(tensor, *args, **kwargs, copy=True)


def _fresh_type_as(tensor: torch.Tensor, other: torch.Tensor) -> Any:
    return _TO(tensor, other.dtype, copy=True)


class CallLog(TorchFunctionMode):
    """Notes which torch functions run, with every argument that is no tensor and no size.

    Two runs with the same log took the same path through the model's code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, its call noted."""
        given = pytree.tree_leaves((args, kwargs or {}))
        kept = tuple(repr(v) for v in given if v is None or isinstance(v, (bool, float, str)))
        self.calls.append((func, kept))
        return func(*args, **(kwargs or {}))


class SizeBranches:
    """Notes how the model's own code branches on sizes where torch keeps no guard for it.

    Torch takes every size to be 2 or more, and forgets a condition that follows from that:
    `batch * length < 3` is no guard of its, but decides at a batch of 1. A condition on a size that
    values decide, which torch has no answer for, is put to `decide`.
    """

    _KINDS = (torch.SymBool, torch.SymInt, torch.SymFloat)

    def __init__(self, decide: Callable[[torch.SymBool], bool] | None = None) -> None:
        self._decide = decide
        self._taken: list[tuple[torch.SymBool, bool]] = []
        self._watching = contextlib.ExitStack()

    def __enter__(self) -> SizeBranches:
        """Watch every truth value that is asked of a size or of a comparison of sizes."""
        for kind in self._KINDS:
            self._watching.enter_context(patched(kind, __bool__=self._watched(kind.__bool__)))
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop watching."""
        self._watching.close()

    def _watched(self, plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def truth(value: Any) -> bool:
            asked_by = sys._getframe(1).f_code.co_filename
            condition = value if isinstance(value, torch.SymBool) else value != 0
            users = not asked_by.startswith(_TORCH_HOME)
            known = users and _is_known(condition)
            try:
                outcome = plain(value)
            except GuardOnDataDependentSymNode:
                if self._decide is None or not users:
                    raise
                return self._decide(condition)
            if known:
                self._taken.append((condition, outcome))
            return outcome

        return truth

    def conditions(self, sizes: int = 1) -> list[str]:
        """The conditions on so many sizes or more, as code over torch's symbols."""
        found = []
        for condition, outcome in self._taken:
            expression = condition.node.expr
            if len(expression.free_symbols) >= sizes:
                code = PythonPrinter().doprint(expression)
                found.append(code if outcome else f"not ({code})")
        return list(dict.fromkeys(found))


def _is_known(condition: torch.SymBool) -> bool:
    negated: Any = torch.sym_not(condition)
    return statically_known_true(condition) or statically_known_true(negated)


class ParameterWriteError(Exception):
    """The model is about to change one of its parameters; the text is the parameter's name."""


class ReadOnlyParameters(TorchDispatchMode):
    """Raises ParameterWriteError before an operator writes into a parameter's memory."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {_memory(p): name for name, p in model.named_parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, unless it writes into a parameter."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for i, declared in enumerate(schema.arguments):
                if declared.alias_info is not None and declared.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(declared.name)
                    self._refuse_write(given)
        return func(*args, **kwargs)

    def _refuse_write(self, given: Any) -> None:
        for tensor in pytree.tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) in self._names:
                raise ParameterWriteError(self._names[_memory(tensor)])


def _memory(tensor: torch.Tensor) -> int:
    # A sparse tensor has none of its own.
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


class CustomBackwardError(Exception):
    """The model calls a function with a backward of its own, which a trace would lose."""


class TooSlowError(Exception):
    """The trace takes far longer than one of so many calls should."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Give a trace up that adds nodes after this time.

    Code that a model keeps for export may unroll what is one call otherwise.
    """
    plain = torch.fx.Graph.create_node
    end = time.monotonic() + seconds

    def create_node(self: Any, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() > end:
            raise TooSlowError(f"no end of the trace after {seconds:.0f} s")
        return plain(self, *args, **kwargs)

    with patched(torch.fx.Graph, create_node=create_node):
        yield


@contextlib.contextmanager
def as_in_eager(said: int) -> Iterator[None]:
    """Inside, code that is traced does what it does when it is run.

    Models ask whether they are exported or compiled, and may compute otherwise if so: `said` is 2
    to let them know both, 1 to say compiled only, 0 to say neither. A `Module.to` that changes
    nothing does nothing: it would swap parameters for traced ones. A function with a backward of
    its own is refused, since only its forward would be in the graph.
    """
    function: Any = torch.autograd.Function
    plain_apply = function.apply.__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise CustomBackwardError(
                f"{cls.__name__} has a backward of its own, which a trace of its forward would lose"
            )
        return plain_apply(cls, *args, **kwargs)

    hidden = ("is_compiling", "is_exporting")[said:]
    with (
        patched(torch.compiler, **dict.fromkeys(hidden, lambda: False)),
        patched(nn.Module, to=_to_if_needed(nn.Module.to)),
        patched(function, apply=classmethod(apply)),
        patched(T, register_hook=_refuse_hook, data=property(_data, _refuse_data)),
    ):
        yield


def _refuse_hook(tensor: torch.Tensor, hook: Any) -> Any:
    if _by_user():
        raise CustomBackwardError("register_hook changes a gradient, which no graph shows")
    return _HOOK(tensor, hook)


def _data(tensor: torch.Tensor) -> torch.Tensor:
    # To the tracer what `data` gives is another tensor, that nothing is known of.
    return tensor.detach() if _by_user() else _DATA.__get__(tensor)


def _refuse_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if _by_user():
        raise CustomBackwardError("an assignment to .data changes a tensor behind its graph")
    _DATA.__set__(tensor, value)


def _by_user() -> bool:
    file = sys._getframe(2).f_code.co_filename
    return not file.startswith((_TORCH_HOME, "<"))


def _to_if_needed(plain: Callable[..., Any]) -> Callable[..., Any]:
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        fits = all(
            (device is None or t.device == device)
            and (dtype is None or t.dtype == dtype or not t.is_floating_point())
            for t in tensors
        )
        return module if fits else plain(module, *args, **kwargs)

    return to


@contextlib.contextmanager
def tracing(fresh: bool, math: bool, said: int = 2) -> Iterator[None]:
    """Export with gradients on and no ambient autocast; `fresh` keeps identity casts apart.

    The kernel that torch picks for attention gives its result other strides than the plain one
    has, so a `contiguous` behind it may be traced as nothing. That matters only to code that
    writes through it, which `math` is for: it costs a third of the whole trace. `said` is what the
    model is told of being exported.
    """
    with (
        flat_regions(),
        as_in_eager(said),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext(),
        fresh_casts() if fresh else contextlib.nullcontext(),
    ):
        yield
