"""Measure how far one tensor is from another: relative L2 per row, the worst row counts.

A row is what lies along the last axis, mostly one position of one example. Its norm is the
scale of its error, so that a large position cannot hide a wrong small one, and a position near
zero cannot raise an alarm about rounding: below a thousandth of the median row, that is the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

__all__ = ["Difference", "drift", "rows"]

FLOOR = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far a candidate is from its reference, and where it is furthest.

    `error` is the relative L2 error of the worst row, and infinite where no number could say it;
    `note` then has the words. `index` is the worst element of that row, with both its values.
    `shift` is what a contract took off before it compared, one number per row.
    """

    error: float
    index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    note: str = ""
    shift: Tensor | None = field(default=None, compare=False, repr=False)

    def text(self, name: str = "") -> str:
        """One line: the element, its value before and after, the error or what is said of it."""
        if not self.index:
            words = self.note or (f"{self.error:.1e} relative" if self.error else "no difference")
            return f"{name}  {words}".strip()
        place = f"{name}[{', '.join(map(str, self.index))}]"
        values = f"before {self.reference:.6g}   after {self.candidate:.6g}"
        return f"{place}   {values}   ({self.note or f'{self.error:.1e} relative'})"


def rows(reference: Tensor, candidate: Tensor) -> Difference:
    """How far `candidate` is from `reference`, both `[..., row]`, by their worst row.

    The error of a row is `|a - b| / max(|a|, floor)` in L2, computed in float64, where `floor` is
    a thousandth of the median norm of the rows that are not zero. Where the reference has only
    zeros, any difference is infinite. Infinities and NaNs must be in the same places and are then
    left out. Integers and booleans must be equal. A complex number counts as two real ones. Shapes
    and sorts (boolean, integer, real, complex) must be the same; widths need not be.
    """
    if reference.shape != candidate.shape:
        return Difference(inf, note=f"shape {_shape(reference)} became {_shape(candidate)}")
    if _sort(reference) != _sort(candidate):
        return Difference(inf, note=f"{reference.dtype} became {candidate.dtype}")
    if reference.numel() == 0:
        return Difference(0.0)
    a, b = reference.detach(), candidate.detach()
    if _sort(a) in ("boolean", "integer"):
        return _first(a, b, a != b, "these must be equal")
    a, b = _flat(a), _flat(b)
    same = (a == b) | (a.isnan() & b.isnan())
    special = ~(a.isfinite() & b.isfinite())
    if bool((special & ~same).any()):
        return _first(reference, candidate, special & ~same, "infinities or NaNs differ")
    a, b = a.masked_fill(special, 0.0), b.masked_fill(special, 0.0)
    # A row that overflows has an error that is no number, which is no reason to trust it.
    errors = _relative(a - b, a).nan_to_num(nan=inf, posinf=inf)
    worst = int(errors.argmax())
    if not float(errors[worst]):
        return Difference(0.0)
    column = int((a[worst] - b[worst]).abs().argmax())
    return _at(reference, candidate, worst * a.shape[1] + column, float(errors[worst]))


def drift(reference: Tensor, candidate: Tensor, oracle: Tensor) -> float:
    """The error of `candidate` as a multiple of the rounding noise of `reference`.

    Both are measured against `oracle`, the float64 value: `|c - o| / |r - o|`, L2 over the whole
    tensor. Around 1 is as good as it gets. Both exact: 1. Only the reference exact: the error in
    units of the last place of the candidate's dtype at the scale of the oracle, `|c - o| / (eps
    |o|)`. Elements where the reference overflows, or is infinite or NaN with the oracle, are left
    out; where only the candidate is, or shapes differ, the drift is infinite.
    """
    if not reference.shape == candidate.shape == oracle.shape:
        return inf
    r, c, o = (_flat(t.detach()).flatten() for t in (reference, candidate, oracle))
    # Where one of the two is not finite, they must be the same.
    odd_r, odd_c = (
        ~((t == o) | (t.isnan() & o.isnan()) | (t.isfinite() & o.isfinite())) for t in (r, c)
    )
    if bool((odd_c & ~odd_r).any()):
        return inf
    left_out = odd_r | odd_c | ~o.isfinite()
    noise, error, scale = (
        float(_norm(t.masked_fill(left_out, 0.0))) if t.numel() else 0.0 for t in (r - o, c - o, o)
    )
    if noise > 0.0:
        return error / noise
    if error == 0.0:
        return 1.0
    sized = scale > 0.0 and _sort(candidate) in ("real", "complex")
    return error / (torch.finfo(candidate.dtype).eps * scale) if sized else inf


def _shape(t: Tensor) -> str:
    return str(list(t.shape))


def _sort(t: Tensor) -> str:
    if t.dtype is torch.bool:
        return "boolean"
    return "complex" if t.is_complex() else "real" if t.is_floating_point() else "integer"


def real_parts(t: Tensor) -> Tensor:
    """`t`, or its real and imaginary parts along one more axis if it is complex."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _flat(t: Tensor) -> Tensor:
    """Real numbers in float64, `[rows, row]`; a scalar is one row of one."""
    wide = real_parts(t).to(torch.float64)
    wide = wide.flatten(-2) if t.is_complex() else wide
    return wide.reshape(-1, wide.shape[-1] if wide.ndim and wide.shape[-1] else 1)


def _norm(t: Tensor) -> Tensor:
    """L2 along the last axis, scaled so that no square overflows or vanishes."""
    scale = t.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0.0, scale, 1.0)
    length: Tensor = torch.linalg.vector_norm(t / scale, dim=-1)
    return scale.squeeze(-1) * length


def _relative(difference: Tensor, reference: Tensor) -> Tensor:
    """The relative error of each row, `[rows]`."""
    sizes, errors = _norm(reference), _norm(difference)
    present = sizes[sizes > 0.0]
    floor = FLOOR * present.median() if len(present) else sizes.new_zeros(())
    return torch.where(errors == 0.0, 0.0, errors / sizes.clamp(min=floor))


def _first(reference: Tensor, candidate: Tensor, wrong: Tensor, note: str) -> Difference:
    """The first place where `wrong` holds, as an infinite error; none if it holds nowhere."""
    if not bool(wrong.any()):
        return Difference(0.0)
    return _at(reference, candidate, int(wrong.flatten().int().argmax()), inf, note)


def _at(
    reference: Tensor, candidate: Tensor, place: int, error: float, note: str = ""
) -> Difference:
    """A difference at an element, counted through the real numbers of both tensors."""
    a, b = real_parts(reference), real_parts(candidate)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), a.shape))
    shown = index[: reference.ndim]
    return Difference(error, shown, float(a[index]), float(b[index]), note)
