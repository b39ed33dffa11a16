"""Blame: which rewrite of a pass broke its contract, and a script that shows it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from lensfx.errors import ContractError
from lensfx.graph.program import Program, Stage
from lensfx.rewrite.pipeline import apply
from lensfx.verify.claims import Claims, Finding
from lensfx.verify.inputs import Scenario
from lensfx.verify.script import script_of
from lensfx.verify.values import Values

__all__ = ["blamed"]


def blamed(
    base: Program,
    step: Claims,
    finding: Finding,
    scenario: Scenario,
    differs: Callable[[Claims], bool],
) -> ContractError:
    """The error for a finding: the first rewrite whose prefix of the pass `differs`.

    Its `script` holds the part of the graph around that rewrite, before it and after it.
    """
    contract, after = step.contract, step.after
    without, guilty = _bisect(base, step, differs)
    alone = _alone(base, without, guilty)
    rewrite = after.rewrites[len(guilty.rewrites) - 1]
    d = finding.difference
    place = "first differing output" if finding.output is not None else "first differing value"
    unit = "" if step.in_bits else " relative in float64"
    at = [
        f"{rewrite}  (rewrite {rewrite.index} of {len(base.journal)})",
        f"{place}: {d.text(finding.value)}   under {scenario.name}",
    ]
    headline = (
        f"{after.name} broke its contract {contract.name}: {finding.value} differs by "
        f"{d.error:.1e}{unit} (bound {contract.bound:.0e})"
    )
    title = "\n".join([headline, *(f"  at {line}" for line in at)])
    hint = f"run the passes up to the one before {after.name} and look at that site"
    found = (script_of(title, base, alone, f, scenario) for f in _shown(alone, finding, scenario))
    script = next(filter(None, found), "")
    if script:
        hint = "save the smallest graph that shows it: error.save('repro.py'), then run that file"
    return ContractError(headline, at=at, hint=hint, script=script)


def _bisect(base: Program, step: Claims, differs: Callable[[Claims], bool]) -> tuple[Stage, Stage]:
    """The pass up to its first rewrite that differs from the graph before, without it and with."""
    before, after = step.before, step.after
    start = replace(base, graph=before.graph, stages=(before,), journal=())

    def prefix(count: int) -> Stage:
        if count == len(after.rewrites):
            return after
        return apply(after.entry, start, count).stages[-1] if count else before

    low, high = 0, len(after.rewrites)
    while high - low > 1:
        middle = (low + high) // 2
        if differs(Claims(base, before, prefix(middle))):
            high = middle
        else:
            low = middle
    return prefix(low), prefix(high)


def _alone(base: Program, without: Stage, guilty: Stage) -> Claims:
    """The last rewrite of a prefix against the graph right before it."""
    last = guilty.rewrites[-1]
    known = {old: new for r in without.rewrites for old, new in r.sites}
    sites = tuple((known.get(old, old), new) for old, new in last.sites)
    return Claims(base, without, replace(guilty, rewrites=(replace(last, sites=sites),)))


def _shown(alone: Claims, finding: Finding, scenario: Scenario) -> Iterator[Finding]:
    """The values at which a script may show that one rewrite is wrong, the nearest first."""
    if finding.slope:
        pairs = zip(alone.olds, alone.news, strict=True)
        yield from (replace(finding, site=pair) for pair in pairs)
        yield from (replace(finding, output=k) for k in range(len(alone.base.signature.outputs)))
        return
    left = Values(alone.before.graph, alone.olds, exact=alone.in_bits)
    right = Values(alone.after.graph, alone.news, exact=alone.in_bits)
    try:
        both = left(scenario), right(scenario)
    except Exception:
        # What cannot be run fails at any value.
        yield replace(finding, output=0)
        return
    found = alone.findings(*both, scenario)
    yield from (f for f in found if f.difference.error > alone.contract.bound)
