"""What to tell a user of a failure inside torch: one line of it, and the line of their own code."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from lensfx.errors import CaptureError, LensError

__all__ = [
    "UntraceableError",
    "about_sizes",
    "capture_error",
    "is_users",
    "quiet",
    "said",
    "user_line",
]

_TORCH_HOME = os.path.dirname(torch.__file__)
_PYTHON_HOME = os.path.dirname(os.__file__)
_CAPTURE_HOME = os.path.dirname(__file__)
_LONGEST = 300
# What models call and nobody writes models in.
_LIBRARIES = ("sympy", "mpmath", "networkx", "numpy", "scipy")


class UntraceableError(Exception):
    """Torch's export failed; the cause says how."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch logs and prints the partial graph of a failure; our error says what the user needs."""
    level, collects = logging.root.manager.disable, gc.isenabled()
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
            # Tracing makes hardly any garbage, and looking for it takes an eighth of a capture.
            gc.disable()
            yield
    finally:
        logging.disable(level)
        if collects:
            gc.enable()


def capture_error(
    model: nn.Module, failure: Exception, may: str | None = None, empty: bool = False
) -> CaptureError:
    """The failure as an error for the user; `may` is a submodule that could stay opaque."""
    if isinstance(failure, LensError):
        return CaptureError(failure.headline, at=failure.at, hint=failure.hint)
    cause = failure.__cause__ or failure
    if path := _packed(model):
        return CaptureError(
            f"{path} keeps packed weights in an object that torch cannot trace: {said(cause)}",
            hint="wrap the model as it was before its weights were packed or quantised",
        )
    hint = (
        "move that line into a submodule of its own, which can then stay opaque, or express it "
        "with tensor operations whose path does not depend on values"
    )
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        hint = f"take the forward hooks off, if that is where it is; else {hint}"
    if empty:
        hint = "capture the model with its weights: without them no value is known"
    if may:
        hint = f"leave out strict=True, or name it: opaque=[{may!r}]"
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {said(cause)}", at=user_line(cause), hint=hint
    )


def _packed(model: nn.Module) -> str:
    """The first module that keeps more than tensors for torch's own kernels."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if any(isinstance(v, torch.ScriptObject) for v in vars(module).values()):
            return path or type(module).__name__
    return ""


def about_sizes(error: BaseException | None) -> bool:
    """Whether torch failed in its own algebra of symbolic sizes."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    # A size in place of a number, as the key of a cache or the name of a module.
    if re.search(r"SymInt|'s\d+'|invalid literal|must be real number", str(error)):
        return True
    return any("symbolic_shapes" in f.filename or "sympy" in f.filename for f in frames)


def said(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"


def user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback, `file.py:12  code`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    if not frames:
        return ""
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}  {frames[-1].line}"


def is_users(path: str) -> bool:
    """Whether a file is part neither of torch, nor of Python, nor of the capture itself."""
    if path.startswith((_TORCH_HOME, _CAPTURE_HOME, "<")):
        return False
    if any(f"{os.sep}site-packages{os.sep}{name}{os.sep}" in path for name in _LIBRARIES):
        return False
    return not path.startswith(_PYTHON_HOME) or "site-packages" in path
