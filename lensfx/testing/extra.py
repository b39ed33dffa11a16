"""What needs hypothesis, an optional extra: asked for in one place, so that it fails in one way."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from lensfx.errors import LensError

__all__ = ["CI", "NIGHTLY", "hypothesis_for", "phases", "register_profiles"]

CI = "lensfx-ci"
NIGHTLY = "lensfx-nightly"


def hypothesis_for(what: str) -> ModuleType:
    """The package hypothesis with its stateful part loaded, for `what` of `lensfx.testing`.

    Raises: LensError if it is not installed.
    """
    try:
        importlib.import_module("hypothesis.stateful")
    except ImportError as error:
        raise LensError(
            f"{what} draws examples with hypothesis, which is not installed",
            hint="pip install 'lensfx[testing]'; assert_equivalent works without it",
        ) from error
    return importlib.import_module("hypothesis")


def phases() -> list[Any]:
    """All of hypothesis' phases but the one that traces every line, which makes captures crawl.

    Raises: LensError if hypothesis is not installed.
    """
    known = hypothesis_for("a profile").Phase
    return [phase for phase in known if phase is not known.explain]


def register_profiles() -> None:
    """Make `lensfx-ci` and `lensfx-nightly` known to hypothesis; none of them is loaded.

    `lensfx-ci` draws the same 50 examples in every run; `lensfx-nightly` draws 2000 new ones.

    Raises: LensError if hypothesis is not installed.
    """
    hypothesis = hypothesis_for("a profile")
    # A capture takes its time, and a model that is drawn twice is captured once.
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    common: dict[str, Any] = {"deadline": None, "print_blob": True, "suppress_health_check": slow}
    common["phases"] = phases()
    register = hypothesis.settings.register_profile
    register(CI, derandomize=True, database=None, max_examples=50, **common)
    register(NIGHTLY, derandomize=False, max_examples=2000, **common)
