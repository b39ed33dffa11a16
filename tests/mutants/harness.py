"""Apply one planted fault to a model that it bites, prove the result, and say what came of it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lensfx import ContractError, Pipeline, Program
from lensfx.rewrite import Pass
from lensfx.verify import prove

# The blame on the first rewrite of a pass.
FIRST = "(rewrite 0 of "
PASSES = Path(__file__).resolve().parents[1] / "passes"


@cache
def passes_test(name: str) -> ModuleType:
    """The test file of a pass, for the models and the faults that it holds."""
    # Tests are no package.
    spec = importlib.util.spec_from_file_location(f"mutants_{name}", PASSES / f"test_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Mutant:
    """A fault: `attribute` of `owner` becomes `instead`, and `passes` run on `before`.

    `pass_name` must be blamed, at a place whose line holds `at`.
    """

    pass_name: str
    fault: str
    owner: Any
    attribute: str
    instead: Any
    passes: tuple[Pass, ...]
    before: Callable[[], Program]
    at: str

    @property
    def name(self) -> str:
        return f"{self.pass_name}: {self.fault}"

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        kept = vars(self.owner)[self.attribute]
        setattr(self.owner, self.attribute, self.instead)
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, kept)


@dataclass(frozen=True)
class Outcome:
    """What the proof said of a mutant: how it was caught, by how much, and whom it blamed."""

    by: str = ""
    error: float = 0.0
    blamed: bool = False
    text: str = ""
    script: str = ""

    def __bool__(self) -> bool:
        return bool(self.by) and self.blamed


def outcome_of(mutant: Mutant) -> Outcome:
    """Plant the fault and prove."""
    before = mutant.before()
    kept = {k: t.detach().clone() for k, t in before.tensors.items()}
    try:
        with mutant.planted():
            try:
                prove(Pipeline(mutant.passes).run(before))
            except ContractError as error:
                blamed = error.headline.startswith(f"{mutant.pass_name} broke its contract")
                blamed = blamed and mutant.at in error.at[0]
                return read(error, blamed)
    finally:
        for name, value in kept.items():
            # A fault may have edited a weight in place.
            before.tensors[name].data.copy_(value)
    return Outcome()


def read(error: ContractError, blamed: bool) -> Outcome:
    """How an error was found: at a site, at an output, by a mean left over, in a gradient."""
    size = re.search(r"differs by (\S+)", error.headline)
    found = error.at[1] if len(error.at) > 1 else ""
    by = "site" if found.startswith("first differing value") else "output"
    for words, kind in (("the gradient at", "gradient"), ("the mean of", "centred")):
        by = kind if words in error.headline else by
    if "folded parameter" in error.headline:
        by = "folding"
    return Outcome(by, float(size.group(1)) if size else 0.0, blamed, str(error), error.script)


def false_alarm(mutant: Mutant) -> bool:
    """Whether the same passes without the fault raise an alarm on the same model."""
    try:
        proved = prove(Pipeline(mutant.passes).run(mutant.before()))
    except ContractError:
        return True
    return proved.worst > 1e-12
