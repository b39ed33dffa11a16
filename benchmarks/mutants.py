"""The test of the checker: planted faults must be caught and blamed, right runs must pass.

    python benchmarks/mutants.py [right runs, 2000 if left out]

Prints a row for each fault; exits 1 unless all are caught and blamed on the right pass and site,
and no right run raises an alarm.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# The models and the faults live with the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

RIGHT = 2000


def rows() -> Iterator[tuple[str, str, Any]]:
    """Pass, fault and outcome: of the catalogue, then of what the tests of the passes plant."""
    from mutants.catalogue import catalogue
    from mutants.harness import Outcome, outcome_of
    from mutants.sections import recorded

    for mutant in catalogue():
        yield mutant.pass_name, mutant.fault, outcome_of(mutant)
    for found in recorded():
        if not found.outcomes and found.passed:
            # A fault that is not for the proof to find: the graph could not be built, say.
            continue
        outcome = found.outcomes[-1] if found.outcomes else Outcome()
        blamed = Outcome(outcome.by, outcome.error, found.passed)
        yield found.pass_name, found.fault.replace("_", " "), blamed


def main() -> int:
    """Print the table and the right runs; 0 if nothing escaped and nothing cried wolf."""
    from mutants.right import right_runs

    # Some libraries warn about models that are built from configurations.
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(width=130)
    table = Table("pass", "fault", "caught by", "error", "blamed right", title="planted faults")
    found = list(rows())
    for name, fault, outcome in found:
        error = f"{outcome.error:.1e}" if outcome.by else ""
        table.add_row(
            name, escape(fault), outcome.by or "escaped", error, "yes" if outcome else "NO"
        )
    console.print(table)
    caught = sum(map(bool, (outcome for *_, outcome in found)))
    console.print(f"{caught} of {len(found)} faults caught and blamed on the right pass and site")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else RIGHT
    start = time.perf_counter()
    alarms = [alarm for alarm in right_runs(count) if alarm is not None]
    seconds = time.perf_counter() - start
    for alarm in alarms:
        console.print(f"{alarm.recipe}\n{', '.join(alarm.passes)}\n{alarm.text}\n", markup=False)
    each = seconds / max(1, count)
    console.print(f"{len(alarms)} false alarms in {count:,} right runs ({each:.2f} s each)")
    return int(caught < len(found) or bool(alarms))


if __name__ == "__main__":
    sys.exit(main())
