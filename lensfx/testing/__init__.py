"""For users' own tests: assert that two models are the same function, and draw models to try.

`assert_equivalent` needs nothing but lensfx; the strategies and the state machine need hypothesis,
and say so when they are called without it. Importing this registers the hypothesis profiles
`lensfx-ci` and `lensfx-nightly`.
"""

import contextlib

from lensfx.errors import LensError
from lensfx.testing.equivalent import assert_equivalent
from lensfx.testing.extra import register_profiles
from lensfx.testing.grammar import Recipe
from lensfx.testing.machine import pass_machine
from lensfx.testing.strategies import captured, inputs_for, models, pipelines, programs

__all__ = [
    "Recipe",
    "assert_equivalent",
    "captured",
    "inputs_for",
    "models",
    "pass_machine",
    "pipelines",
    "programs",
]

with contextlib.suppress(LensError):
    register_profiles()
