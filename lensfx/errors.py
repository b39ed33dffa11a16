"""Every error that lensfx raises: what is wrong, where, and one thing to try."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

__all__ = [
    "CaptureError",
    "ContractError",
    "GuardError",
    "HookError",
    "LensError",
    "PipelineError",
    "RewriteError",
    "UnknownNameError",
]


class LensError(Exception):
    """Base of all lensfx errors; the text is `headline`, then `at` lines, then one `try`."""

    def __init__(self, headline: str, *, at: str | Sequence[str] = (), hint: str = "") -> None:
        places = [at] if isinstance(at, str) else list(at)
        lines = [headline, *(f"  at {place}" for place in places if place)]
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__("\n".join(lines))
        self.headline = headline
        self.at = tuple(places)
        self.hint = hint


class CaptureError(LensError):
    """The model could not be captured, or the captured graph is not the model.

    `module` is the path of the submodule that stands in the way, where one does.
    """

    module = ""

    def inside(self, module: str) -> CaptureError:
        """This error, with the path of the submodule that stands in the way."""
        self.module = module
        return self


class GuardError(LensError):
    """A call does not satisfy what the captured graph assumes of its inputs."""


class PipelineError(LensError):
    """A list of passes is not one that can be run: not a pass, or in the wrong order."""


class RewriteError(LensError):
    """A rewrite would leave a broken graph: a cycle, a name clash, a changed shape."""


class ContractError(LensError):
    """Two programs that should be equivalent differ; the message names the guilty rewrite.

    `script` is a Python program that needs only torch and fails for the same reason: the smallest
    part of the graph around the rewrite, before it and after it. Empty where there is none.
    """

    def __init__(
        self, headline: str, *, at: str | Sequence[str] = (), hint: str = "", script: str = ""
    ) -> None:
        super().__init__(headline, at=at, hint=hint)
        self.script = script

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the script to a file; a file that is there is replaced all at once.

        Raises: LensError if there is no script.
        """
        if not self.script:
            raise LensError("this error has no script", at=self.headline, hint="read its message")
        target = os.fspath(path)
        handle, made = tempfile.mkstemp(dir=os.path.dirname(target) or ".", suffix=".py")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(self.script)
            os.replace(made, target)
        except BaseException:
            os.unlink(made)
            raise


class HookError(LensError):
    """A hook returned something that cannot take the place of the value it was given."""


class UnknownNameError(LensError, KeyError):
    """A hook name that is not a point of the graph; the message lists the nearest names."""

    __str__ = Exception.__str__
