"""The checker is tested: every planted fault is caught and blamed, and right runs pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.catalogue import catalogue
from mutants.harness import Mutant, outcome_of
from mutants.right import plain, right_runs

from lensfx import Pipeline
from lensfx.verify import prove

MANY = int(os.environ.get("LENSFX_FUZZ", "0"))
MUTANTS = catalogue()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_fault_is_caught_and_blamed(mutant: Mutant) -> None:
    outcome = outcome_of(mutant)
    assert outcome.by, "the fault escaped"
    assert outcome.blamed, outcome.text


def test_there_are_enough_of_them_and_each_kind_of_check_catches_some() -> None:
    assert len(MUTANTS) >= 40
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    some = ("eps", "detached", "soft cap ignored", "only_the_bias", "mask ignored")
    assert all(any(word in m.fault for m in MUTANTS) for word in some)


@pytest.mark.parametrize("place", range(0, len(MUTANTS), 8))
def test_without_its_fault_the_same_run_is_right(place: int) -> None:
    mutant = MUTANTS[place]
    needs_it = "taken for" in mutant.fault or "ignored" in mutant.fault
    assert needs_it or prove(Pipeline(mutant.passes).run(mutant.before())).worst <= 1e-12


def test_right_runs_raise_no_alarm() -> None:
    assert len(plain()) >= 6
    alarms = [alarm for alarm in right_runs(MANY or 10) if alarm is not None]
    assert not alarms


def test_the_scripts_of_other_kinds_of_faults_fail_on_their_own(tmp_path: Path) -> None:
    faults = ("another output moves than was said", "only_the_bias")
    chosen = [next(m for m in MUTANTS[::-1] if m.fault == fault) for fault in faults]
    kinds = {found.by: found.script for found in map(outcome_of, chosen)}
    assert list(kinds) == ["output", "centred"]
    for by, script in kinds.items():
        path = tmp_path / f"{by}.py"
        path.write_text(script)
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
        assert "AssertionError" in done.stderr, by
