"""Gradients of two graphs, J^T v in float64: what a detached value changes and no value shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from lensfx.graph.program import Program
from lensfx.verify.claims import Claims, nudges
from lensfx.verify.compare import FLOOR, Difference
from lensfx.verify.contract import Exact, UpToLogitShift
from lensfx.verify.inputs import Scenario, wide
from lensfx.verify.values import Values, recorded

__all__ = ["Slope", "Slopes"]

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Slope:
    """The gradient that differs most, and how."""

    name: str
    found: Difference


class Slopes:
    """J^T v of each stage under one scenario, computed once, and how far neighbours are apart.

    v is one for all: where a pass may shift an output it sums to zero along that axis.
    """

    def __init__(self, base: Program, steps: Sequence[Claims], scenario: Scenario) -> None:
        self._base, self._steps, self._scenario = base, steps, scenario
        self._directions: list[Tensor | None] | None = None
        self._last: tuple[int, Gradients] | None = None

    def at(self, i: int) -> Slope | None:
        """How a pass changed the gradients; None where it is not measured."""
        step = self._steps[i]
        runs = [Values(s.graph) for s in (step.before, step.after)]
        if not step.contract.everywhere or not all(r.can_be_differentiated for r in runs):
            return None
        try:
            if self._directions is None:
                self._directions = cotangents(runs[0](self._scenario).outputs, self._steps)
            known = self._last is not None and self._last[0] == i
            left = self._last[1] if known and self._last else self._of(runs[0], self._scenario)
        except (RuntimeError, NotImplementedError):
            # Some operators have no derivative, and then no rewrite can change it.
            return None
        right = self._of(runs[1], self._scenario)
        self._last = (i + 1, right)
        return apart(left, right)

    def bound(self, step: Claims) -> float:
        """How far gradients may be apart: a pass that keeps bits may add them in another order."""
        return max(step.contract.bound, Exact.bound)

    def differs(self, step: Claims) -> bool:
        """Whether a pass, or the beginning of one, changes a gradient."""
        left, right = (self._of(Values(s.graph), self._scenario) for s in (step.before, step.after))
        return apart(left, right).found.error > self.bound(step)

    def amplified(self, i: int) -> float:
        """A hundred times what roundings of float64 do to the gradient of the original."""
        run = Values(self._steps[i].before.graph)
        own = self._of(run, self._scenario)
        moved = (apart(own, self._of(run, n)).found.error for n in nudges(self._scenario))
        return 100 * max(moved)

    def _of(self, run: Values, scenario: Scenario) -> Gradients:
        assert self._directions is not None
        return gradients(run, self._base, scenario, self._directions)


def cotangents(outputs: Sequence[Any], steps: Sequence[Claims]) -> list[Tensor | None]:
    """A random direction for each real output; where a pass may shift, one that sums to zero."""
    generator = torch.Generator().manual_seed(11)
    found: list[Tensor | None] = []
    for k, output in enumerate(outputs):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found.append(None)
            continue
        v = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        v = v.where(output.isfinite(), 0.0)
        for axis in {_axis(s) for s in steps if k in s.moved} - {None}:
            if axis is not None and -v.ndim <= axis < v.ndim:
                keep = output.isfinite()
                v = v - (v.sum(axis, True) / keep.sum(axis, True).clamp(min=1)) * keep
        found.append(v)
    return found


def _axis(step: Claims) -> int | None:
    return step.contract.axis if isinstance(step.contract, UpToLogitShift) else None


def gradients(
    run: Values, program: Program, scenario: Scenario, directions: Sequence[Tensor | None]
) -> Gradients:
    """J^T v at each floating input and each parameter, tied ones together; zero where none is."""
    leaves: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    weights = dict(scenario.weights)
    for name, value in scenario.weights.items():
        stored = program.tensors[name]
        if isinstance(stored, nn.Parameter) and value.is_floating_point():
            if id(stored) not in known:
                leaves[name] = known[id(stored)] = value.detach().clone().requires_grad_()
            weights[name] = known[id(stored)]
    inputs = [wide(t) for t in scenario.inputs]
    for name, k in zip(program.signature.tensor_names, range(len(inputs)), strict=True):
        if inputs[k].is_floating_point():
            leaves[f"the input {name}"] = inputs[k] = inputs[k].clone().requires_grad_()
    with recorded():
        moved = replace(scenario, inputs=tuple(inputs), weights=weights)
        outputs = run.differentiable(moved).outputs
        pairs = [
            (o, v)
            for o, v in zip(outputs, directions, strict=True)
            if v is not None and isinstance(o, Tensor) and o.requires_grad
        ]
        if not pairs or not leaves:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(
            [o for o, _ in pairs], [*leaves.values()], [v for _, v in pairs], allow_unused=True
        )
    return {
        name: torch.zeros_like(leaf) if g is None else g.detach()
        for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def apart(left: Gradients, right: Gradients) -> Slope:
    """The gradient that differs most, and by how much relative to its size.

    The size of a gradient that is next to nothing is a thousandth of the median one. Where the
    reference is not finite there is nothing to compare.
    """
    sizes = sorted(s for g in left.values() if 0 < (s := float(g.norm())) < inf)
    floor = FLOOR * sizes[len(sizes) // 2] if sizes else 0.0
    worst = Slope("", Difference(0.0))
    for name, a in left.items():
        b, known = right[name], a.isfinite()
        off = (b - a).where(known, 0.0)
        scale = max(float(a.where(known, 0.0).norm()), floor)
        error = _ratio(float(off.norm()), scale)
        if error > worst.found.error:
            flat = off.abs().nan_to_num(nan=inf).argmax()
            index = tuple(int(i) for i in torch.unravel_index(flat, a.shape))
            at = Difference(error, index, float(a[index]), float(b[index]))
            worst = Slope(f"the gradient at {name}", at)
    return worst


def _ratio(off: float, scale: float) -> float:
    if not off:
        return 0.0
    found = off / scale if scale else inf
    return inf if isnan(found) else found
