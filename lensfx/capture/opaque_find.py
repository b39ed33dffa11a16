"""Which modules are to be opaque: the one that an error arose in, and those a user names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lensfx.capture.failures import said, user_line
from lensfx.errors import CaptureError, LensError

__all__ = ["chosen", "failing_module", "reason"]

_CALLS = ("_call_impl", "_wrapped_call_impl")


def failing_module(model: nn.Module, error: BaseException, taken: Sequence[str]) -> str | None:
    """The path of the smallest submodule in whose forward an error arose; None for the model.

    Submodules in `taken` and those inside them are passed over.
    """
    # The object in the frame may be a stand-in of the tracer that shares the attributes.
    paths = {id(m.__dict__): (path, m) for path, m in model.named_modules() if path}
    for link in _chain(error):
        step, found = link.__traceback__, None
        while step is not None:
            path = _running(step.tb_frame, paths)
            if path and not any(path == t or path.startswith(f"{t}.") for t in taken):
                found = path
            step = step.tb_next
        if found is not None:
            return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _running(frame: Any, paths: Mapping[int, tuple[str, nn.Module]]) -> str | None:
    """The path of the submodule whose call or forward a frame is."""
    code = frame.f_code
    given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount or 1]]
    if given and isinstance(given[0], tuple):
        given = list(given[0])
    path, module = paths.get(id(getattr(next(iter(given), None), "__dict__", None)), ("", None))
    if module is None:
        return None
    own = getattr(inspect.unwrap(module.forward), "__code__", None)
    return path if code.co_name in ("forward", *_CALLS) or code is own else None


def reason(error: BaseException) -> str:
    """The user's line that an error arose in, and the first line of the error."""
    if isinstance(error, LensError):
        return ": ".join([*error.at[:1], error.headline])
    lines = [line for line in map(user_line, _chain(error)) if line]
    return ": ".join([*lines[:1], said(error)])


def chosen(model: nn.Module, selection: Sequence[Any]) -> dict[str, str]:
    """The path of every submodule that is selected by its path, its type or as an object.

    Raises: CaptureError for what selects nothing or the model itself.
    """
    found: dict[str, str] = {}
    named = {path: m for path, m in model.named_modules(remove_duplicate=False)}
    for item in selection:
        if isinstance(item, type):
            paths = [path for path, m in model.named_modules() if isinstance(m, item)]
            paths = [p for p in paths if p] or paths
        elif isinstance(item, str):
            paths = [item] if item in named else []
        else:
            paths = [path for path, m in model.named_modules() if m is item]
        if not paths:
            raise _nothing(item, named)
        if paths == [""] or named[paths[0]] is model:
            raise CaptureError(
                f"{_label(item)} is the whole model, and nothing of it would be in the graph",
                hint="name the submodules that shall stay opaque",
            )
        found.update(dict.fromkeys(paths, "asked for"))
    return found


def _label(item: Any) -> str:
    return item if isinstance(item, str) else getattr(item, "__name__", f"a {type(item).__name__}")


def _nothing(item: Any, named: Mapping[str, nn.Module]) -> CaptureError:
    known = list(named) if isinstance(item, str) else [type(m).__name__ for m in named.values()]
    known = sorted({k for k in known if k})
    wanted = _label(item).removeprefix("a ")
    near = difflib.get_close_matches(wanted, known, 1, 0.0)
    return CaptureError(
        f"no submodule to keep opaque is selected by {_label(item)}",
        hint=f"the closest name is {near[0]}" if near else "the model has no submodules",
    )
