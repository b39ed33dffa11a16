"""pass_machine: a state machine that applies passes in every legal order and compares each time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lensfx.graph.program import Program
from lensfx.rewrite.pipeline import Pipeline
from lensfx.rewrite.rule import Pass
from lensfx.testing.equivalent import assert_equivalent
from lensfx.testing.extra import hypothesis_for, phases
from lensfx.testing.strategies import programs as any_program
from lensfx.verify.contract import Contract, Observes
from lensfx.verify.prove import prove

if TYPE_CHECKING:
    from hypothesis.stateful import RuleBasedStateMachine
    from hypothesis.strategies import SearchStrategy

__all__ = ["pass_machine"]


def pass_machine(
    passes: Iterable[Pass] | None = None,
    *,
    contract: Contract | None = None,
    programs: SearchStrategy[Program] | None = None,
) -> type[RuleBasedStateMachine]:
    """A hypothesis state machine with one rule for each pass, legal where its order is.

    It starts from one of `programs()`. After every rule the rewritten program must be what it
    started from, in float64, up to the weakest contract of the passes that fired, or up to
    `contract`; at the end each pass that fired is proved at its sites. `passes` are those of
    `Pipeline.default()` if left out. In a test file:

        TestMyPasses = pass_machine((MyPass(), *Pipeline.default().passes)).TestCase

    Raises: LensError if hypothesis is not installed, PipelineError for what is not a pass.
    """
    hypothesis = hypothesis_for("pass_machine()")
    given = tuple(Pipeline.default().passes if passes is None else passes)
    rules = _named(given)
    start = any_program() if programs is None else programs
    body = {"contract": contract, "start": _initial(start), "equivalent": _invariant()}
    body |= {name: _rule(entry, name) for name, entry in rules.items()}
    machine: Any = type("PassMachine", (_base(),), body)
    machine.TestCase.settings = hypothesis.settings(
        deadline=None,
        phases=phases(),
        suppress_health_check=list(hypothesis.HealthCheck),
        stateful_step_count=len(given) + 3,
    )
    return machine


def _named(passes: tuple[Pass, ...]) -> dict[str, Pass]:
    """A method name for each pass; a pass given twice has a number behind its name."""
    found: dict[str, Pass] = {}
    for entry in passes:
        Pipeline((entry,))
        plain = name = "run_" + re.sub(r"\W", "_", entry.name)
        while name in found:
            name = f"{plain}_{len(found)}"
        found[name] = entry
    return found


def _base() -> Any:
    stateful = hypothesis_for("pass_machine()").stateful

    class PassMachineBase(stateful.RuleBasedStateMachine):  # type: ignore[name-defined]
        """A program under rewriting, and the program it was."""

        contract: Contract | None = None

        def __init__(self) -> None:
            super().__init__()
            self.before: Program | None = None
            self.after: Program | None = None
            self.compared: tuple[str, ...] = ()
            self.equal = True

        def apply(self, entry: Pass) -> None:
            """Run one pass, weights kept as expressions."""
            assert self.after is not None
            self.after = Pipeline((entry,)).rewrite(self.after)

        def teardown(self) -> None:
            """Prove every pass that fired, unless the outputs have told already."""
            if self.equal and self.after is not None and self.after.journal:
                prove(self.after)

    return PassMachineBase


def _initial(programs: Any) -> Any:
    stateful = hypothesis_for("pass_machine()").stateful

    def start(self: Any, program: Program) -> None:
        self.before = self.after = program

    return stateful.initialize(program=programs)(start)


def _rule(entry: Pass, name: str) -> Any:
    stateful = hypothesis_for("pass_machine()").stateful

    def run(self: Any) -> None:
        self.apply(entry)

    def legal(self: Any) -> bool:
        reports = () if self.after is None else self.after.reports
        return not any(entry.name in report.needs for report in reports)

    run.__name__ = name
    return stateful.precondition(legal)(stateful.rule()(run))


def _invariant() -> Any:
    stateful = hypothesis_for("pass_machine()").stateful

    def equivalent(self: Any) -> None:
        fired = [] if self.after is None else [r.entry for r in self.after.reports if r.fired]
        # A rule that fired nowhere has left the graph that was compared already.
        done = () if self.after is None else tuple(str(r) for r in self.after.journal)
        if not fired or done == self.compared:
            return
        self.compared, self.equal = done, False
        up_to = self.contract or _joined(p.contract for p in fired)
        own = self.before.signature.arguments(self.before.example)
        inputs = None if up_to.everywhere else [own]
        assert_equivalent(self.before, self.after, up_to=up_to, inputs=inputs)
        self.equal = True

    return stateful.invariant()(equivalent)


def _joined(contracts: Iterable[Contract]) -> Contract:
    weakest: Contract = Observes()
    for contract in contracts:
        weakest = weakest.join(contract)
    return weakest
