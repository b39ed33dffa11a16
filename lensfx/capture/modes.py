"""What a model is traced and run under: casts kept apart, parameters read-only, branches noted."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "LAYOUT_READS",
    "CallLog",
    "FreshCasts",
    "ParameterWriteError",
    "ReadOnlyParameters",
    "SizeBranches",
    "tracing",
]

_TORCH_HOME = os.path.dirname(torch.__file__)
_SHORT_CASTS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}
_CASTS = frozenset({*_SHORT_CASTS, torch.Tensor.to, torch.Tensor.type_as})
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


class FreshCasts(TorchFunctionMode):
    """Makes a cast to the dtype a value already has return a new value.

    Torch returns the same object, and the tracer then sends every later reader of the value
    through the cast: in a float32 capture the residual stream would run through a norm's cast.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, casts made fresh."""
        kwargs = kwargs or {}
        if func not in _CASTS:
            return func(*args, **kwargs)
        if func in _SHORT_CASTS and not kwargs:
            return args[0].to(_SHORT_CASTS[func], copy=True)
        if func is torch.Tensor.to and "copy" not in kwargs:
            if not any(isinstance(a, bool) for a in args[1:]):
                return args[0].to(*args[1:], **kwargs, copy=True)
        if func is torch.Tensor.type_as:
            return args[0].to(args[1].dtype, copy=True)
        return func(*args, **kwargs)


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
    `batch * length < 3` is no guard of its, but decides at a batch of 1.
    """

    _KINDS = (torch.SymBool, torch.SymInt, torch.SymFloat)

    def __init__(self) -> None:
        self._taken: list[tuple[torch.SymBool, bool]] = []
        self._plain = {kind: kind.__bool__ for kind in self._KINDS}

    def __enter__(self) -> SizeBranches:
        """Watch every truth value that is asked of a size or of a comparison of sizes."""
        for kind in self._KINDS:
            kind.__bool__ = self._watched(self._plain[kind])  # type: ignore[method-assign]
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop watching."""
        for kind in self._KINDS:
            kind.__bool__ = self._plain[kind]  # type: ignore[method-assign]

    def _watched(self, plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def truth(value: Any) -> bool:
            asked_by = sys._getframe(1).f_code.co_filename
            condition = value if isinstance(value, torch.SymBool) else value != 0
            known = not asked_by.startswith(_TORCH_HOME) and _is_known(condition)
            outcome = plain(value)
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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {_memory(p): name for name, p in model.named_parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, unless it writes into a parameter."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, declared in enumerate(func._schema.arguments):
                if declared.alias_info is not None and declared.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(declared.name)
                    self._refuse_write(given)
        return func(*args, **kwargs)

    def _refuse_write(self, given: Any) -> None:
        for tensor in pytree.tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) in self._names:
                raise ParameterWriteError(self._names[_memory(tensor)])


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def tracing(fresh_casts: bool) -> Iterator[None]:
    """Export under one attention kernel, with gradients on and no ambient autocast.

    Other kernels give other strides, and a `contiguous` that is needed elsewhere would vanish.
    """
    with (
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FreshCasts() if fresh_casts else contextlib.nullcontext(),
    ):
        yield
