"""The faults that the tests of the passes plant themselves, as pytest runs their `faults` sections.

Every new pass test with that section is included, whatever form its faults have: each of its
tests demands that the proof finds the fault and blames it, and what the proof said is recorded.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lensfx import ContractError
from mutants.harness import PASSES, Outcome, read

__all__ = ["Recorded", "recorded"]

RESULTS = "LENSFX_MUTANTS"


@dataclass
class Recorded:
    """One test of a section: the pass, its fault, and what the proof said, if it was asked."""

    pass_name: str
    fault: str
    outcomes: list[Outcome] = field(default_factory=list)
    passed: bool = False


class Recorder:
    """Keeps the tests of `faults` sections, and looks on while they call `prove`."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self.found: dict[str, Recorded] = {}
        self._now = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if _in_section(item)]
        for module in {item.module for item in items}:
            if hasattr(module, "prove"):
                module.prove = self._watched(module.prove)

    def pytest_runtest_setup(self, item: Any) -> None:
        self._now = item.nodeid
        name = Path(str(item.fspath)).stem.removeprefix("test_").replace("_", "-")
        self.found[self._now] = Recorded(name, item.name.removeprefix("test_"))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.found[report.nodeid].passed = report.passed

    def pytest_sessionfinish(self) -> None:
        found = [asdict(record) for record in self.found.values()]
        self._results.write_text(json.dumps(found), encoding="utf-8")

    def _watched(self, prove: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return prove(*args, **kwargs)
            except ContractError as error:
                # Whom it blames is for the test to say.
                self.found[self._now].outcomes.append(read(error, True))
                raise

        return watched


def _in_section(item: Any) -> bool:
    lines = Path(str(item.fspath)).read_text(encoding="utf-8").splitlines()
    if "# faults" not in lines:
        return False
    start = lines.index("# faults")
    later = [k for k, line in enumerate(lines) if k > start and line == "# again"]
    line = inspect.getsourcelines(item.function)[1]
    return start < line <= (later[0] if later else len(lines))


def pytest_configure(config: Any) -> None:
    """As a plugin, record into the file that the caller names."""
    if RESULTS in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[RESULTS])))


def recorded() -> list[Recorded]:
    """Run every `faults` section, in a process of its own; what each test of them found."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        path = os.pathsep.join([str(PASSES.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutants.sections", str(PASSES)]
        there = {**os.environ, "PYTHONPATH": path, RESULTS: str(results)}
        subprocess.run(command, env=there, check=False, stdout=subprocess.DEVNULL)
        found = json.loads(results.read_text(encoding="utf-8"))
    return [Recorded(**{**r, "outcomes": [Outcome(**o) for o in r["outcomes"]]}) for r in found]
