"""One thread at a time wherever torch is traced: a trace replaces methods for the whole process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["one_at_a_time"]

P = ParamSpec("P")
T = TypeVar("T")
_LOCK = threading.RLock()


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run by one thread at a time among all that are marked so."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOCK:
            return function(*args, **kwargs)

    return inside
