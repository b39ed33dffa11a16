"""What a rewrite promises about outputs, and how far from it a number may be.

A contract is a frozen value that a pass states. Contracts are ordered from strong to weak, and a
sequence of passes keeps the weakest of theirs. The bounds are the package's, not a pass's: right
rewrites measure below 1.3e-14 in float64, the subtlest wrong ones above 3.8e-11.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from lensfx.errors import PipelineError
from lensfx.verify.compare import Difference, real_parts, rows

__all__ = ["AtExample", "Contract", "Exact", "Observes", "UpToLogitShift"]

Output = int | str


@dataclass(frozen=True)
class Contract:
    """Base of all contracts: outputs are compared by `compare`, and may differ by `bound`.

    `bound` is relative, in float64. A contract with the larger `weakness` promises less.
    `in_float64` says on which tensors `compare` is meant to work: the oracle's, or the model's own.
    `everywhere` is False where it holds on the example call and the program's own weights only.
    """

    name: ClassVar[str]
    bound: ClassVar[float] = 1e-12
    weakness: ClassVar[int]
    in_float64: ClassVar[bool] = True
    everywhere: ClassVar[bool] = True

    def compare(self, reference: Tensor, candidate: Tensor) -> Difference:
        """How far `candidate` is from what is promised of it, given `reference`."""
        raise NotImplementedError

    def at(self, output: Output) -> Contract:
        """What this contract promises of one output of the program, by position or name."""
        return self

    def join(self, other: Contract) -> Contract:
        """What is left of both promises after a pass of each: the weaker one."""
        return self if self.weakness >= other.weakness else other


@dataclass(frozen=True)
class Observes(Contract):
    """Outputs keep their bits, in the model's own dtype: nothing but looking was added.

    A NaN equals a NaN at the same place, whatever its payload. 0.0 and -0.0 are different, since
    a rewrite that only observes computes the same operations and has no way to turn one into the
    other. The error is that of `rows`, infinite where that is zero and bits differ all the same.
    """

    name: ClassVar[str] = "observes"
    bound: ClassVar[float] = 0.0
    weakness: ClassVar[int] = 0
    in_float64: ClassVar[bool] = False

    def compare(self, reference: Tensor, candidate: Tensor) -> Difference:
        """How far two outputs of the model's own dtype are from having the same bits."""
        if reference.dtype is not candidate.dtype:
            return Difference(inf, note=f"{reference.dtype} became {candidate.dtype}")
        found = rows(reference, candidate)
        if found.error:
            return found
        a, b = real_parts(reference.detach()), real_parts(candidate.detach())
        # Equal by value from here on, so only the sign of a zero can still differ.
        wrong = (a == 0) & (a.signbit() != b.signbit())
        if not bool(wrong.any()):
            return found
        index = tuple(int(i) for i in wrong.nonzero()[0])
        note = "the sign of a zero differs"
        return Difference(inf, index[: reference.ndim], float(a[index]), float(b[index]), note)


@dataclass(frozen=True)
class Exact(Contract):
    """Outputs are the same real numbers: in float64 only rounding is between them."""

    name: ClassVar[str] = "exact"
    weakness: ClassVar[int] = 1

    def compare(self, reference: Tensor, candidate: Tensor) -> Difference:
        """How far two float64 outputs are from each other, by their worst row."""
        return rows(reference, candidate)


@dataclass(frozen=True)
class UpToLogitShift(Contract):
    """Along `axis`, all entries of a row may move together; differences of logits are exact.

    `output` is the output, or outputs, of which this is allowed, by position or name; all others
    are `Exact`. None is every output.
    """

    output: Output | tuple[Output, ...] | None = None
    axis: int = -1

    name: ClassVar[str] = "up-to-logit-shift"
    weakness: ClassVar[int] = 2

    def compare(self, reference: Tensor, candidate: Tensor) -> Difference:
        """How far two float64 outputs are from a constant shift of each row along `axis`.

        The mean along the axis is taken off both, so an error is what is left of their difference
        once its mean is gone: the part that is not constant. `shift` is what was taken off,
        candidate minus reference, in the shape without the axis. Entries that are infinite must
        agree, and count neither in the mean nor in the error. An output without the axis, or not
        of real numbers, has nothing to shift and must be the same.
        """
        a, b = reference.detach(), candidate.detach()
        real = a.is_floating_point() and b.is_floating_point()
        if a.shape != b.shape or not real or not -a.ndim <= self.axis < a.ndim:
            return rows(a, b)
        a, b = (t.to(torch.float64).movedim(self.axis, -1) for t in (a, b))
        keep = a.isfinite() & b.isfinite()
        count = keep.sum(-1, keepdim=True).clamp(min=1)
        # The difference is centred, not each on its own: a large common offset costs no digits.
        apart = (b - a).where(keep, 0.0)
        shift = apart.sum(-1, keepdim=True) / count
        centred = a - a.where(keep, 0.0).sum(-1, keepdim=True) / count
        found = rows(centred, (centred + (apart - shift)).where(keep, b))
        return self._restored(found, reference, candidate, shift.squeeze(-1))

    def _restored(self, found: Difference, a: Tensor, b: Tensor, shift: Tensor) -> Difference:
        """The difference with its index and its values as they are in the outputs themselves."""
        if not found.index:
            return replace(found, shift=shift)
        index = list(found.index)
        index.insert(self.axis % a.ndim, index.pop())
        place = tuple(index)
        return replace(
            found, index=place, reference=float(a[place]), candidate=float(b[place]), shift=shift
        )

    def at(self, output: Output) -> Contract:
        """The contract itself for an output that it is about, `Exact` for the others."""
        return self if self.output is None or output in self._outputs() else Exact()

    def join(self, other: Contract) -> Contract:
        """The weaker of both; two shifts along one axis join their outputs.

        Raises: PipelineError where the shifts are along different axes.
        """
        if not isinstance(other, UpToLogitShift) or self == other:
            return super().join(other)
        if self.axis != other.axis:
            raise PipelineError(
                f"two passes shift logits along different axes, {self.axis} and {other.axis}",
                hint="run one of them alone; nothing weaker than both is checked",
            )
        if self.output is None or other.output is None:
            return UpToLogitShift(None, self.axis)
        both = {*self._outputs(), *other._outputs()}
        return UpToLogitShift(tuple(sorted(both, key=str)), self.axis)

    def _outputs(self) -> tuple[Output, ...]:
        if self.output is None:
            return ()
        return self.output if isinstance(self.output, tuple) else (self.output,)


@dataclass(frozen=True)
class AtExample(Contract):
    """Outputs are the same real numbers on the example call; on others they are another function.

    What is frozen at one call keeps this and no more.
    """

    name: ClassVar[str] = "at-example"
    weakness: ClassVar[int] = 3
    everywhere: ClassVar[bool] = False

    def compare(self, reference: Tensor, candidate: Tensor) -> Difference:
        """How far two float64 outputs are from each other, by their worst row."""
        return rows(reference, candidate)
