"""What folding and new weights hold in memory above what they keep, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc")
@pytest.mark.parametrize("what", ["folding", "from a file"])
def test_one_tensor_is_held_above_what_is_kept(what: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--size", "150", "--what", what]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # The tied table is a third of this model; float64 copies of it whole would be two thirds.
    assert found["peak"] <= 0.5
    assert found["kept"] <= found["result"] + 0.1
