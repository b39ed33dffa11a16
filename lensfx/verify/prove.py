"""Prove a rewritten program: each pass against the graph before it, at every site and output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from lensfx.errors import ContractError, LensError
from lensfx.graph.program import Program
from lensfx.verify.blame import blamed
from lensfx.verify.claims import Claims, Finding
from lensfx.verify.compare import Difference
from lensfx.verify.gradient import Slopes
from lensfx.verify.inputs import Scenario, hard_inputs, model_dtype, scenarios, wide
from lensfx.verify.rounding import folding_error, noise_ratio
from lensfx.verify.values import Found, Values

__all__ = ["LEVELS", "Equivalence", "Level", "PassProof", "prove"]

Level = Literal["fast", "full"]
LEVELS: tuple[Level, ...] = ("fast", "full")


@dataclass(frozen=True)
class PassProof:
    """The figures of one pass: worst relative error in float64 at its sites and at the outputs.

    `gradient_error` is the worst one of J^T v at the inputs and parameters, None if it was not
    measured: at level "fast", where the contract is about one call, or where autograd is blind.
    """

    name: str
    contract: Any
    rewrites: int
    site_error: float
    output_error: float
    calls: int
    gradient_error: float | None = None


@dataclass(frozen=True)
class Equivalence:
    """What was proved: one entry a pass, and the drift of the result in the model's own dtype.

    `drift` is the error of the rewritten model as a multiple of the model's own rounding noise,
    both against float64; 1 is as good as it gets. `folded` is the largest difference between a
    folded parameter and its formula, in roundings of its dtype.
    """

    passes: tuple[PassProof, ...]
    drift: float
    folded: float
    level: Level = "full"

    @property
    def worst(self) -> float:
        """The largest relative float64 error of all sites and outputs."""
        return max((max(p.site_error, p.output_error) for p in self.passes), default=0.0)

    @property
    def gradient(self) -> float | None:
        """The largest relative float64 error of a gradient; None where none was measured."""
        found = [p.gradient_error for p in self.passes if p.gradient_error is not None]
        return max(found, default=None)


def prove(program: Program, seed: int = 0, *, level: Level = "full") -> Equivalence:
    """The figures of the proof that `program` is what its passes claim.

    Every pass that fired is checked against the graph before it: in float64, over hard inputs
    and hard weights, at each value the rewrites claim to keep and at the outputs. Passes that
    only observe are checked bitwise in the model's own dtype. `level="full"` also compares
    gradients; "fast" makes two calls, one with the model's own weights and one with others.

    Raises: ContractError naming the guilty rewrite, found by bisection over the journal.
    """
    if level not in LEVELS:
        raise LensError(f"level={level!r} is unknown", hint="level='fast' or level='full'")
    program = getattr(program, "program", program)
    if not isinstance(program, Program):
        raise LensError(
            f"{type(program).__name__} is no program", hint="prove(lens.program), or prove(lens)"
        )
    base = program.unfolded or program
    if any(t.is_meta for t in base.tensors.values()):
        raise LensError(
            "the program holds no weights from before they were folded, so nothing can be compared",
            hint="give the weights as a state dict or a module: program.with_weights(...)",
        )
    steps = [Claims(base, *pair) for pair in zip(base.stages, base.stages[1:], strict=False)]
    proof = _Proof(base, steps, seed, level)
    for kind in dict.fromkeys(map(proof.kind, range(len(steps)))):
        proof.values(kind)
    if level == "full":
        proof.gradients()
    inputs = base.example if proof.frozen < len(steps) else hard_inputs(base, seed, 1)[0]
    ratio, folded = noise_ratio(base, program, inputs), folding_error(program)
    return Equivalence(tuple(proof.figures()), ratio, folded, level)


@dataclass(frozen=True)
class _Kind:
    """How a pass is checked: in bits or in float64, and on which calls."""

    in_bits: bool
    at_example: bool


class _Proof:
    """The chain of stages, each run once a scenario with all that both its neighbours ask for."""

    def __init__(self, base: Program, steps: Sequence[Claims], seed: int, level: Level) -> None:
        self.base, self.steps, self.seed, self.level = base, steps, seed, level
        self.sites = [0.0] * len(steps)
        self.outputs = [0.0] * len(steps)
        self.calls = [0] * len(steps)
        self.slopes: list[float | None] = [None] * len(steps)
        # From here on the model is another function on every call but the example.
        frozen = (i for i, step in enumerate(steps) if not step.contract.everywhere)
        self.frozen = next(frozen, len(steps))

    def kind(self, i: int) -> _Kind:
        """How the pass of one step is checked."""
        return _Kind(self.steps[i].in_bits, i >= self.frozen)

    def figures(self) -> Iterator[PassProof]:
        """What was found of each pass."""
        found = zip(self.sites, self.outputs, self.calls, self.slopes, strict=True)
        for step, figures in zip(self.steps, found, strict=True):
            after = step.after
            yield PassProof(after.name, step.contract, len(after.rewrites), *figures)

    def values(self, kind: _Kind) -> None:
        """Compare the values of all passes of one kind over the scenarios that it asks for.

        Raises: ContractError.
        """
        mine = {i for i in range(len(self.steps)) if self.kind(i) == kind}
        runs: dict[int, Values] = {}
        for i in sorted({*mine, *(i + 1 for i in mine)}):
            news = self.steps[i - 1].news if i - 1 in mine else []
            olds = self.steps[i].olds if i in mine else []
            runs[i] = Values(self.base.stages[i].graph, [*news, *olds], exact=kind.in_bits)
        for scenario in self._scenarios(kind):
            found: dict[int, Found] = {}
            for i in sorted(mine):
                found = {k: v for k, v in found.items() if k == i} or {i: runs[i](scenario)}
                found[i + 1] = self._ran(i, runs[i + 1], scenario)
                self._compared(i, found[i], found[i + 1], scenario)

    def _scenarios(self, kind: _Kind) -> Iterator[Scenario]:
        base, fast = self.base, self.level == "fast"
        own = dict(base.tensors)
        if kind.at_example:
            held = own if kind.in_bits else {name: wide(t) for name, t in own.items()}
            return iter([Scenario("the example", base.example, held, model_dtype(base))])
        if not kind.in_bits:
            return scenarios(base, self.seed, few=fast)
        calls = hard_inputs(base, self.seed, 2 if fast else None)
        return (Scenario("as it is", inputs, own) for inputs in calls)

    def _ran(self, i: int, run: Values, scenario: Scenario) -> Found:
        try:
            return run(scenario)
        except Exception as error:
            note = f"it cannot be run: {type(error).__name__}: {str(error).splitlines()[0]}"
            finding = Finding(Difference(inf, note=note), None, "the graph", scenario.name)
            raise self._broken(i, scenario, finding) from error

    def _compared(self, i: int, left: Found, right: Found, scenario: Scenario) -> None:
        step = self.steps[i]
        self.calls[i] += 1
        for finding in step.findings(left, right, scenario):
            error = finding.difference.error
            if error > step.contract.bound:
                allowed = step.allowed(scenario, finding)
                if error > allowed:
                    raise self._broken(i, scenario, finding)
                if allowed == inf:
                    # Nothing but roundings: no figure of a rewrite.
                    continue
            worst = self.outputs if finding.rewrite is None else self.sites
            worst[i] = max(worst[i], error)

    def _broken(self, i: int, scenario: Scenario, finding: Finding) -> ContractError:
        def differs(step: Claims) -> bool:
            try:
                left, right = _both(step, scenario)
            except Exception:
                return True
            bound = step.contract.bound
            return any(f.difference.error > bound for f in step.findings(left, right, scenario))

        return blamed(self.base, self.steps[i], finding, scenario, differs)

    def gradients(self) -> None:
        """Compare J^T v of neighbouring graphs, with the model's own weights and with others.

        Raises: ContractError.
        """
        for scenario in scenarios(self.base, self.seed, few=True):
            slopes = Slopes(self.base, self.steps, scenario)
            for i, step in enumerate(self.steps[: self.frozen]):
                difference = slopes.at(i)
                if difference is None:
                    continue
                name, error = difference.name, difference.found.error
                if error > slopes.bound(step) and error > slopes.amplified(i):
                    finding = Finding(difference.found, None, name, scenario.name, slope=True)
                    raise blamed(self.base, step, finding, scenario, slopes.differs)
                self.slopes[i] = max(self.slopes[i] or 0.0, error)


def _both(step: Claims, scenario: Scenario) -> tuple[Found, Found]:
    left = Values(step.before.graph, step.olds, exact=step.in_bits)
    right = Values(step.after.graph, step.news, exact=step.in_bits)
    return left(scenario), right(scenario)
