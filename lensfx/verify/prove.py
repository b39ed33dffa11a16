"""Prove a rewritten program: each pass against the graph before it, at every site and output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import fx

from lensfx.errors import ContractError
from lensfx.graph.compiled import probe
from lensfx.graph.ops import written_tensors
from lensfx.graph.program import Program, Rewrite, Stage
from lensfx.rewrite.pipeline import apply
from lensfx.verify.compare import Difference, drift, rows
from lensfx.verify.contract import Contract, Exact, Observes, UpToLogitShift
from lensfx.verify.inputs import Scenario, hard_inputs, model_dtype, scenarios, seeded, wide
from lensfx.verify.oracle import Float64

__all__ = ["Equivalence", "PassProof", "prove"]


@dataclass(frozen=True)
class PassProof:
    """The figures of one pass: worst relative error in float64 at its sites and at the outputs."""

    name: str
    contract: Any
    rewrites: int
    site_error: float
    output_error: float
    calls: int


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

    @property
    def worst(self) -> float:
        """The largest relative float64 error of all sites and outputs."""
        return max((max(p.site_error, p.output_error) for p in self.passes), default=0.0)


def prove(program: Program, seed: int = 0) -> Equivalence:
    """The figures of the proof that `program` is what its passes claim.

    Every pass that fired is checked against the graph before it: in float64, over hard inputs
    and hard weights, at each value the rewrites claim to keep and at the outputs. Passes that
    only observe are checked bitwise in the model's own dtype.

    Raises: ContractError naming the guilty rewrite, found by bisection over the journal.
    """
    base = program.unfolded or program
    proofs = []
    for before, after in zip(base.stages, base.stages[1:], strict=False):
        proofs.append(_prove_pass(base, before, after, seed))
    return Equivalence(tuple(proofs), _drift(base, program, seed), _folded(program))


@dataclass(frozen=True)
class _Finding:
    """The worst difference at one value of one scenario."""

    difference: Difference
    rewrite: Rewrite | None
    value: str
    scenario: str
    rule: Any = field(default_factory=Exact)


class _Probe:
    """A graph as a function of a scenario, giving its outputs and some named values."""

    def __init__(self, graph: fx.Graph, names: Sequence[str] = (), *, exact: bool = False) -> None:
        self._function, self._weights = probe(graph, names)
        self._written = written_tensors(graph)
        self._exact = exact

    def __call__(self, scenario: Scenario) -> list[Any]:
        """The values in float64, or if `exact` in the dtypes the scenario has."""
        own = scenario.weights
        values = [own[w].clone() if w in self._written else own[w] for w in self._weights]
        inputs = [t.clone() for t in scenario.inputs]
        with seeded(), torch.no_grad():
            if self._exact:
                return list(self._function(None, *inputs, *values))
            with Float64(dtype=scenario.dtype) as oracle:
                return list(oracle.read(self._function(None, *inputs, *values)))


class _Comparison:
    """Two neighbouring graphs, compared at every value the pass between them claims to keep."""

    def __init__(self, base: Program, before: Stage, after: Stage) -> None:
        self.before, self.contract = before, after.entry.contract
        self._names = base.signature.outputs
        self._exact = isinstance(self.contract, Observes)
        self._pairs = [(r, old, new) for r in after.rewrites for old, new in r.sites]
        olds, news = [old for _, old, _ in self._pairs], [new for _, _, new in self._pairs]
        self._left = _Probe(before.graph, olds, exact=self._exact)
        self._right = _Probe(after.graph, news, exact=self._exact)
        said = {k for r in after.rewrites for k in r.shifted}
        self._moved = said or set(range(len(self._names)))

    def __call__(self, scenario: Scenario) -> Iterator[_Finding]:
        """Every difference: at the sites in the order of the rewrites, then at the outputs."""
        left = self._left(scenario)
        try:
            right = self._right(scenario)
        except Exception as error:
            note = f"it cannot be run: {type(error).__name__}: {str(error).splitlines()[0]}"
            yield _Finding(Difference(inf, note=note), None, "the graph", scenario.name)
            return
        count = len(self._names)
        for i, (rewrite, _, new) in enumerate(self._pairs):
            a, b = left[count + i], right[count + i]
            if isinstance(a, torch.Tensor):
                rule = self._rule(rewrite, new)
                yield _Finding(rule.compare(a, b), rewrite, f"%{new}", scenario.name, rule)
                if new in rewrite.centred and isinstance(rule, UpToLogitShift):
                    found = _mean_left(rule, b)
                    yield _Finding(found, rewrite, f"the mean of %{new}", scenario.name, rule)
        for k, name in enumerate(self._names):
            if isinstance(left[k], torch.Tensor):
                rule = self.contract if k in self._moved else Exact()
                yield _Finding(rule.compare(left[k], right[k]), None, name, scenario.name, rule)

    def _rule(self, rewrite: Rewrite, new: str) -> Contract:
        """What is promised of one site: bits, the same numbers, or those but for a shift."""
        if self._exact:
            return Observes()
        axis = dict(rewrite.shifts).get(new)
        return Exact() if axis is None else UpToLogitShift(axis=axis)


def _mean_left(rule: UpToLogitShift, value: torch.Tensor) -> Difference:
    """What is left of the mean that a pass says it takes out, relative to the row.

    Every shift keeps the contract, also that of a weight centred along the wrong axis or without
    its bias, so the contract alone would let those through.
    """
    return rows(*(t.movedim(rule.axis, -1) for t in (value, value - value.mean(rule.axis, True))))


def _prove_pass(base: Program, before: Stage, after: Stage, seed: int) -> PassProof:
    contract = after.entry.contract
    compare = _Comparison(base, before, after)
    site_error = output_error = 0.0
    calls = 0
    for scenario in _runs(base, contract, seed):
        calls += 1
        for finding in compare(scenario):
            error = finding.difference.error
            if error > contract.bound and error > _allowed(base, before, scenario, finding):
                raise _broken(base, before, after, scenario, finding)
            if finding.rewrite is None:
                output_error = max(output_error, error)
            else:
                site_error = max(site_error, error)
    return PassProof(after.name, contract, len(after.rewrites), site_error, output_error, calls)


def _runs(base: Program, contract: Any, seed: int) -> Iterator[Scenario]:
    if not contract.everywhere:
        own = {name: wide(t) for name, t in base.tensors.items()}
        return iter([Scenario("the example", base.example, own, model_dtype(base))])
    if not isinstance(contract, Observes):
        return scenarios(base, seed)
    own = dict(base.tensors)
    return (Scenario("as it is", inputs, own) for inputs in hard_inputs(base, seed))


def _allowed(base: Program, before: Stage, scenario: Scenario, finding: _Finding) -> float:
    """A hundred times what one float64 rounding of every weight does to the same value."""
    if finding.difference.error > 1e-6:
        return 0.0
    generator = torch.Generator().manual_seed(5)

    def nudged(weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return weight
        # In the weight's own dtype: whole numbers times a float would round the nudge away.
        sign = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1
        return weight * (1 + sign * torch.finfo(weight.dtype).eps)

    moved = replace(scenario, weights={k: nudged(w) for k, w in scenario.weights.items()})
    names: list[str] = []
    if finding.rewrite is not None:
        names = [old for old, new in finding.rewrite.sites if finding.value.endswith(f"%{new}")]
    run = _Probe(before.graph, names)
    left, right = run(scenario), run(moved)
    index = len(base.signature.outputs) if names else base.signature.outputs.index(finding.value)
    return 100 * float(finding.rule.compare(left[index], right[index]).error)


def _broken(
    base: Program, before: Stage, after: Stage, scenario: Scenario, finding: _Finding
) -> ContractError:
    contract = after.entry.contract
    guilty = _bisect(base, before, after, scenario)
    d = finding.difference
    place = "first differing output" if finding.rewrite is None else "first differing value"
    unit = "" if isinstance(contract, Observes) else " relative in float64"
    return ContractError(
        f"{after.name} broke its contract {contract.name}: {finding.value} differs by "
        f"{d.error:.1e}{unit} (bound {contract.bound:.0e})",
        at=[
            f"{guilty}  (rewrite {guilty.index} of {len(base.journal)})",
            f"{place}: {d.text(finding.value)}   under {scenario.name}",
        ],
        hint=f"run the passes up to the one before {after.name} and look at that site",
    )


def _bisect(base: Program, before: Stage, after: Stage, scenario: Scenario) -> Rewrite:
    """The first rewrite of the pass whose prefix of the journal breaks the contract."""
    start = replace(base, graph=before.graph, stages=(before,), journal=())
    low, high = 0, len(after.rewrites)
    while high - low > 1:
        middle = (low + high) // 2
        prefix = apply(after.entry, start, middle).stages[-1]
        bound = after.entry.contract.bound
        compare = _Comparison(base, before, prefix)
        broken = any(f.difference.error > bound for f in compare(scenario))
        low, high = (low, middle) if broken else (middle, high)
    return after.rewrites[high - 1]


def _drift(base: Program, program: Program, seed: int) -> float:
    """The worst ratio over the outputs of the result's rounding noise to the model's own.

    Each is measured against its own float64 value: a rewrite may move an output within its gauge.
    """
    if not base.stages:
        return 1.0
    inputs = hard_inputs(base, seed)[0]
    own = Scenario("own weights", inputs, dict(base.tensors))
    first, last = base.stages[0], base.stages[-1]
    folded = Scenario("folded weights", inputs, dict(program.tensors))
    model, exact = _Probe(first.graph, exact=True)(own), _Probe(first.graph)(own)
    result, moved = _Probe(program.graph, exact=True)(folded), _Probe(last.graph)(own)
    ratios = [
        drift(m, torch.where(e == x, r.double(), e + (r.double() - x)), e)
        for m, r, e, x in zip(model, result, exact, moved, strict=True)
        if isinstance(m, torch.Tensor) and m.is_floating_point()
    ]
    return max(ratios, default=1.0)


def _folded(program: Program) -> float:
    """The largest distance of a folded parameter from its formula, in roundings of its dtype."""
    if program.unfolded is None:
        return 0.0
    worst = 0.0
    for name, formula in program.formulas.items():
        stored = program.tensors[name]
        if not all(s in program.unfolded.tensors for s in formula.sources):
            continue
        function, weights = probe(formula.graph, [])
        values = [program.unfolded.tensors[w] for w in weights]
        with Float64() as oracle:
            exact = oracle.read(function(None, *values))[0].detach()
        worst = max(worst, _roundings(stored.detach(), exact))
        if worst > 4:
            raise ContractError(
                f"the folded parameter {name} is {worst:.1e} roundings away from its formula",
                at=f"{name} = {formula.text}",
                hint="this is a fault of lensfx; please report it with the model",
            )
    return worst


def _roundings(stored: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance, in roundings of the stored dtype at each entry's own size.

    Sums in float64 that cancel are known only to float64 roundings of their largest terms.
    """
    if not exact.numel():
        return 0.0
    rounding = torch.finfo(stored.dtype).eps * exact.abs()
    cancelled = 64 * torch.finfo(torch.float64).eps * exact.abs().max()
    error = (stored.to(exact.dtype) - exact).abs() / (rounding + cancelled).clamp_min(1e-300)
    return float(error.max())
