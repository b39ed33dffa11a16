"""Rounding: how far the finished program is from float64, beside how far the model itself is."""

from __future__ import annotations

import torch
from torch import Tensor

from lensfx.errors import ContractError
from lensfx.graph.program import Program
from lensfx.verify.compare import drift
from lensfx.verify.inputs import Scenario, wide
from lensfx.verify.values import Values

__all__ = ["folding_error", "noise_ratio"]


def noise_ratio(base: Program, program: Program, inputs: tuple[Tensor, ...]) -> float:
    """The worst ratio over the outputs of the result's rounding noise to the model's own.

    Each is measured against its own float64 value: a rewrite may move an output within its gauge.

    Raises: ContractError where digits are lost by the hundred, as by a cast that was put in.
    """
    if not base.stages:
        return 1.0
    own = Scenario("own weights", inputs, dict(base.tensors))
    first, last = base.stages[0].graph, base.stages[-1].graph
    folded = Scenario("folded weights", inputs, dict(program.tensors))
    model, result = Values(first, exact=True)(own), Values(program.graph, exact=True)(folded)
    own = Scenario(own.name, inputs, {name: wide(t) for name, t in base.tensors.items()})
    exact, moved = Values(first)(own), Values(last)(own)
    worst = 1.0 if not exact.outputs else 0.0
    outputs = zip(*(found.outputs for found in (model, result, exact, moved)), strict=True)
    for name, (m, r, e, x) in zip(base.signature.outputs, outputs, strict=True):
        if not isinstance(m, Tensor) or not m.is_floating_point():
            continue
        now = torch.where(e == x, r.double(), e + (r.double() - x))
        ratio = drift(m, now, e)
        # A model that is next to exact has no noise to speak of, so roundings count as well.
        if ratio > _MOST and _is_larger(now, m, e):
            raise ContractError(
                f"{name} has {ratio:.0f} times the rounding noise of the model's own",
                hint="the passes compute in fewer digits than the model: look for a cast",
            )
        worst = max(worst, ratio)
    return worst or 1.0


# Right rewrites measure below 4.
_MOST = 100.0


def _is_larger(now: Tensor, model: Tensor, exact: Tensor) -> bool:
    """Whether an output is off by a thousand roundings of its dtype at its scale."""
    known = now.isfinite() & exact.isfinite()
    off, size = (t.where(known, 0.0).double().norm() for t in (now - exact, exact))
    return bool(off > 1e3 * torch.finfo(model.dtype).eps * size)


def folding_error(program: Program) -> float:
    """The largest distance of a folded parameter from its formula, in roundings of its dtype.

    Raises: ContractError where it is more than what one rounding can be.
    """
    if program.unfolded is None:
        return 0.0
    tensors, worst = program.unfolded.tensors, 0.0
    for name, formula in program.formulas.items():
        stored = program.tensors[name]
        if not all(s in tensors for s in formula.sources):
            continue
        weights = {s: wide(tensors[s]) for s in formula.sources}
        exact = Values(formula.graph)(Scenario(name, (), weights)).outputs[0].detach()
        worst = max(worst, _roundings(stored.detach(), exact))
        if worst > 4:
            raise ContractError(
                f"the folded parameter {name} is {worst:.1e} roundings away from its formula",
                at=f"{name} = {formula.text}",
                hint="this is a fault of lensfx; please report it with the model",
            )
    return worst


def _roundings(stored: Tensor, exact: Tensor) -> float:
    """The largest distance, in roundings of the stored dtype at each entry's own size.

    Sums in float64 that cancel are known only to float64 roundings of their largest terms.
    """
    if not exact.numel():
        return 0.0
    rounding = torch.finfo(stored.dtype).eps * exact.abs()
    cancelled = 64 * torch.finfo(torch.float64).eps * exact.abs().max()
    error = (stored.to(exact.dtype) - exact).abs() / (rounding + cancelled).clamp_min(1e-300)
    return float(error.max())
