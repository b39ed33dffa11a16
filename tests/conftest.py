"""Settings of every test run, and the golden-file fixture."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Test models are built from configurations; a hub lookup would only make a run depend on the net.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with all of tests/golden/<name>.txt."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
        held = path.read_text(encoding="utf-8") if path.exists() else ""
        if held != text + "\n":
            lines = difflib.unified_diff(held.splitlines(), text.splitlines(), lineterm="")
            pytest.fail(f"{path.name} differs:\n" + "\n".join(lines), pytrace=False)

    return compare
