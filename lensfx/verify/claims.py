"""Claims: what a pass promises of two neighbouring graphs, held against the values of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from lensfx.errors import PipelineError
from lensfx.graph.program import Program, Rewrite, Stage
from lensfx.verify.compare import Difference, rows
from lensfx.verify.contract import Contract, Exact, Observes, UpToLogitShift
from lensfx.verify.inputs import Scenario
from lensfx.verify.values import Found, Values, nudged

__all__ = ["Claims", "Finding", "nudges"]


@dataclass(frozen=True)
class Finding:
    """The worst difference at one value of one scenario.

    `rewrite` claims the value; None is an output, under its number `output`. `site` holds the
    names before and after. `mean` if it is what is left of a mean that was taken out, `slope` if
    it is a gradient.
    """

    difference: Difference
    rewrite: Rewrite | None
    value: str
    scenario: str
    rule: Any = field(default_factory=Exact)
    site: tuple[str, str] | None = None
    output: int | None = None
    mean: bool = False
    slope: bool = False


class Claims:
    """Two neighbouring graphs, compared at every value the pass between them claims to keep."""

    def __init__(self, base: Program, before: Stage, after: Stage) -> None:
        self.base, self.before, self.after = base, before, after
        self.contract: Any = after.entry.contract
        if not isinstance(self.contract, Contract):
            raise PipelineError(
                f"{after.name} states {self.contract!r}, which is no contract",
                hint="contract = Exact(), or another value of lensfx.verify",
            )
        self.in_bits = isinstance(self.contract, Observes)
        self._pairs = [(r, old, new) for r in after.rewrites for old, new in r.sites]
        self.olds = [old for _, old, _ in self._pairs]
        self.news = [new for _, _, new in self._pairs]
        said = {k for r in after.rewrites for k in r.shifted}
        # A pass that says which sites may move also says which outputs, if only that none does.
        told = said or any(r.shifts for r in after.rewrites)
        self.moved = said if told else set(range(len(base.signature.outputs)))

    def findings(self, left: Found, right: Found, scenario: Scenario) -> Iterator[Finding]:
        """Every difference: at the sites in the order of the rewrites, then at the outputs."""
        for rewrite, old, new in self._pairs:
            a, b = left.named[old], right.named[new]
            if isinstance(a, Tensor):
                yield from self._at_site(rewrite, (old, new), (a, b), scenario)
        for k, name in enumerate(self.base.signature.outputs):
            a = left.outputs[k]
            if isinstance(a, Tensor):
                rule = self.contract if k in self.moved else Exact()
                found = rule.compare(a, right.outputs[k])
                yield Finding(found, None, name, scenario.name, rule, output=k)

    def _at_site(
        self, rewrite: Rewrite, site: tuple[str, str], both: tuple[Any, Any], scenario: Scenario
    ) -> Iterator[Finding]:
        rule, name = self._rule(rewrite, site[1]), f"%{site[1]}"
        found = Finding(rule.compare(*both), rewrite, name, scenario.name, rule, site)
        yield found
        if site[1] in rewrite.centred and isinstance(rule, UpToLogitShift):
            left_of_it = _mean_left(rule, both[1])
            yield replace(found, difference=left_of_it, value=f"the mean of {name}", mean=True)

    def _rule(self, rewrite: Rewrite, new: str) -> Contract:
        """What is promised of one site: bits, the same numbers, or those but for a shift."""
        if self.in_bits:
            return Observes()
        axis = dict(rewrite.shifts).get(new)
        return Exact() if axis is None else UpToLogitShift(axis=axis)

    def allowed(self, scenario: Scenario, finding: Finding) -> float:
        """A hundred times what roundings of float64 do to the same value of the original.

        It is run with every weight, input and result moved by one rounding, three times over:
        what it amplifies by itself is no fault of a rewrite. Nothing excuses more than 1e-6, but
        where a single rounding changes more than a thousandth of it, a value is nothing but those.
        """
        if self.in_bits:
            return 0.0
        run = Values(self.before.graph, [finding.site[0]] if finding.site else [])

        def value(nudged: Scenario) -> Any:
            found = run(nudged)
            return found.named[finding.site[0]] if finding.site else found.outputs[_place(finding)]

        own = value(scenario)
        worst = max(float(finding.rule.compare(own, value(n)).error) for n in nudges(scenario))
        if finding.difference.error > 1e-6:
            return inf if worst > 1e-3 else 0.0
        return 100 * worst


def nudges(scenario: Scenario, times: int = 3) -> Iterator[Scenario]:
    """The scenario with every number in it, and all computed from them, moved by one rounding."""
    generator = torch.Generator().manual_seed(5)
    for seed in range(times):
        inputs = tuple(nudged(t, generator) for t in scenario.inputs)
        weights = {name: nudged(w, generator) for name, w in scenario.weights.items()}
        yield replace(scenario, inputs=inputs, weights=weights, noise=seed)


def _place(finding: Finding) -> int:
    assert finding.output is not None
    return finding.output


def _mean_left(rule: UpToLogitShift, value: Tensor) -> Difference:
    """What is left of the mean that a pass says it takes out, relative to the row.

    Every shift keeps the contract, also that of a weight centred along the wrong axis or without
    its bias, so the contract alone would let those through.
    """
    return rows(*(t.movedim(rule.axis, -1) for t in (value, value - value.mean(rule.axis, True))))
