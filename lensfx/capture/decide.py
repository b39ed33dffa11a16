"""Path capture: branches on values are logged in a plain run and replayed while tracing.

Torch cannot trace `if x.sum() > 0`. A plain run tells which way it goes; the trace is given that
answer and keeps the value that decided as an extra result. What was answered is then checked
where it counts: the captured graph is run, and each value it computes must be the one replayed.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lensfx.capture.failures import is_users
from lensfx.capture.patching import patched

__all__ = ["Decision", "Decisions", "as_if_traced"]

T = torch.Tensor
# A loop under a wrong answer need not end.
_MOST = 2048
_NUMBERS: dict[Any, Callable[[Any], Any]] = {
    T.__bool__: bool,
    T.is_nonzero: bool,
    torch.is_nonzero: bool,
    T.__int__: int,
    T.__index__: int,
    T.__float__: float,
}
_EQUAL = frozenset({torch.equal, T.equal})
_CLOSE = frozenset({torch.allclose, T.allclose})
# Functions whose result is as large as the values say, with the axes that are.
_SIZED: dict[Any, tuple[int, ...]] = {
    torch.nonzero: (0,),
    T.nonzero: (0,),
    torch.argwhere: (0,),
    T.argwhere: (0,),
    torch.masked_select: (0,),
    T.masked_select: (0,),
    torch.unique: (0,),
    T.unique: (0,),
    torch.where: (0,),
    T.where: (0,),
}


class TooManyDecisionsError(Exception):
    """A trace asks for more values than any path should; the text says how many."""


@dataclass(frozen=True)
class Decision:
    """One value the model's Python code asked for."""

    kind: str
    value: bool | int | float
    site: str = ""


class Decisions(TorchFunctionMode):
    """Answers every question for a Python number, and remembers what was asked.

    Without `known` the answers are the tensors' own values, as in any run. With it, the k-th
    question gets the k-th known answer, and `values` keeps the tensors that should have given it.
    `defer` leaves what `item()` gives a tensor until a number is really needed; `sizes` pins the
    sizes of results that are as large as values say.
    """

    def __init__(
        self, known: Sequence[Decision] | None = None, *, defer: bool = False, sizes: bool = False
    ) -> None:
        super().__init__()
        self.known = known
        self.defer = defer
        self.sizes = sizes
        self.log: list[Decision] = []
        self.values: list[Any] = []
        self._numbers = iter([d for d in known or () if d.kind != "condition"])
        self._conditions = iter([d for d in known or () if d.kind == "condition"])
        self.asked = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, numbers taken from what is known."""
        kwargs = kwargs or {}
        if func in _NUMBERS:
            return self._decide(args[0], func.__name__.strip("_"), _NUMBERS[func])
        if func is T.item:
            return self._item(args[0])
        if func is T.tolist:
            return self._tolist(args[0])
        if func in _EQUAL:
            return self._all(lambda a, b: a == b, args, kwargs)
        if func in _CLOSE:
            return self._all(torch.isclose, args, kwargs)
        if func is T.__contains__:
            return self._decide((args[0] == args[1]).any(), "contains", bool)
        if func is T.__format__:
            return self._text(func, args)
        result = func(*args, **kwargs)
        if self.sizes and func in _SIZED and _is_sized(func, args, kwargs):
            self._pin(result, _SIZED[func])
        return result

    def _item(self, tensor: torch.Tensor) -> Any:
        if self.defer and tensor.is_floating_point():
            # Python computes in double precision, and without bounds on integers.
            return tensor.detach().reshape(()).to(torch.float64)
        if tensor.dtype is torch.bool:
            return self._decide(tensor, "item", bool)
        if tensor.is_complex():
            return tensor.item()
        return self._decide(tensor, "item", float if tensor.is_floating_point() else int)

    def _tolist(self, tensor: torch.Tensor) -> Any:
        if tensor.ndim == 0:
            return self._item(tensor)
        return [self._tolist(part) for part in tensor.unbind()]

    def _all(self, compare: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> bool:
        a, b = args[:2]
        if compare is not torch.isclose and a.shape != b.shape:
            return False
        same = compare(*args, **kwargs).all()
        return bool(self._decide(same, "equal", bool))

    def _text(self, func: Any, args: tuple[Any, ...]) -> str:
        self.asked = True
        if not args[0].is_floating_point():
            # The text may be a key; that of a float is no more than a message.
            return format(self._item(args[0]), args[1])
        return str(func(*args)) if self.known is None else "0"

    def _decide(self, tensor: Any, kind: str, cast: Callable[[Any], Any]) -> Any:
        # Some functions take a number in place of a tensor.
        if not isinstance(tensor, torch.Tensor):
            return cast(tensor)
        index = len(self.log)
        if index >= _MOST:
            raise TooManyDecisionsError(f"more than {_MOST} values are asked for")
        if self.known is None:
            value = cast(tensor.item())
        else:
            known = next(self._numbers, None)
            value = cast(known.value) if known is not None and known.kind == kind else cast(0)
            # A copy, because the model may write into the tensor afterwards.
            self.values.append(_converted(tensor.detach(), cast).clone().reshape(()))
        self.log.append(Decision(kind, value, _asking_line()))
        self.asked = True
        return value

    def condition(self, condition: torch.SymBool) -> bool:
        """The answer to a condition on a size that values decide; a plain run does not show it."""
        found = next(self._conditions, None)
        value = found is not None and bool(found.value)
        self.values.append(condition)
        self.log.append(Decision("condition", value, _asking_line()))
        torch._check(condition if value else torch.sym_not(condition))
        return value

    def _pin(self, result: Any, axes: Sequence[int]) -> None:
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            for axis in axes:
                size = tensor.shape[axis]
                if self.known is None:
                    self.log.append(Decision("size", int(size)))
                    self.asked = True
                    continue
                value = self._decide(torch.scalar_tensor(size, dtype=torch.int64), "size", int)
                torch._check(size == value)


def _converted(tensor: torch.Tensor, cast: Callable[[Any], Any]) -> torch.Tensor:
    """What Python makes of the number in a tensor, still as a tensor."""
    if cast is bool and tensor.dtype is not torch.bool:
        return tensor != 0
    if cast is int and tensor.is_floating_point():
        return tensor.to(torch.int64)
    return tensor


def _is_sized(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    if func in (torch.where, T.where):
        return len(args) + len(kwargs) == 1
    return func not in (torch.unique, T.unique) or (not kwargs and len(args) == 1)


def _asking_line() -> str:
    """The innermost line of the user's own code that is running now."""
    frame: Any = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return ""
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{os.path.basename(file)}:{line}  {linecache.getline(file, line).strip()}"


@contextmanager
def as_if_traced() -> Iterator[None]:
    """Model code that asks whether it is being compiled is told so, as it is while it is traced."""
    with patched(torch.compiler, is_compiling=lambda: True):
        yield
