"""The pytest plugin of lensfx, found by its entry point: a fixture and two hypothesis profiles.

It is a module of its own because whoever imports anything inside lensfx imports torch, and a test
run that does not use lensfx should not pay for that.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make the profile known that `--hypothesis-profile` asks for, before hypothesis looks."""
    wanted = config.getoption("--hypothesis-profile", default=None)
    if str(wanted).startswith("lensfx-"):
        from lensfx.testing.extra import register_profiles

        register_profiles()


@pytest.fixture(scope="session")
def equivalent() -> Any:
    """`lensfx.testing.assert_equivalent`."""
    from lensfx.testing import assert_equivalent

    return assert_equivalent
