"""A product of two matrices kept as its factors: low in rank, never larger than it must be."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

__all__ = ["FactoredMatrix"]


class FactoredMatrix:
    """`A @ B`, held as `A` [..., left, mid] and `B` [..., mid, right]; leading axes broadcast."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Raises: ValueError if the factors do not fit each other."""
        if A.shape[-1] != B.shape[-2]:
            raise ValueError(f"factors {tuple(A.shape)} and {tuple(B.shape)} do not fit")
        lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self.A = A.expand(*lead, *A.shape[-2:])
        self.B = B.expand(*lead, *B.shape[-2:])
        self.ldim, self.mdim = int(A.shape[-2]), int(A.shape[-1])
        self.rdim = int(B.shape[-1])
        self.has_leading_dims = len(lead) > 0
        self.shape = torch.Size((*lead, self.ldim, self.rdim))

    @property
    def AB(self) -> torch.Tensor:
        """The product itself, `[..., left, right]`."""
        return self.A @ self.B

    @property
    def BA(self) -> torch.Tensor:
        """The product the other way round, `[..., mid, mid]`; left and right must be one space."""
        if self.ldim != self.rdim:
            raise ValueError(f"no BA: the matrix is {self.ldim} by {self.rdim}, not square")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    @property
    def ndim(self) -> int:
        """How many axes the product has."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors."""
        return self.A, self.B

    @property
    def eigenvalues(self) -> torch.Tensor:
        """The eigenvalues of a square product that may not be zero, `[..., mid]`, complex."""
        return torch.linalg.eigvals(self.BA)

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`U` [..., left, mid], `S` [..., mid], `Vh` [..., right, mid]: `U @ diag(S) @ Vh.mT`.

        As TransformerLens has it, `Vh` holds the right singular vectors as columns.
        """
        return self._svd

    @cached_property
    def _svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        left, middle = torch.linalg.qr(self.A)
        right, other = torch.linalg.qr(self.B.transpose(-2, -1))
        u, s, vh = torch.linalg.svd(middle @ other.transpose(-2, -1), full_matrices=False)
        return left @ u, s, right @ vh.transpose(-2, -1)

    @property
    def U(self) -> torch.Tensor:
        """The left singular vectors, as columns."""
        return self._svd[0]

    @property
    def S(self) -> torch.Tensor:
        """The singular values, largest first."""
        return self._svd[1]

    @property
    def Vh(self) -> torch.Tensor:
        """The right singular vectors, as columns."""
        return self._svd[2]

    def norm(self) -> torch.Tensor:
        """The Frobenius norm of the product, from products of the size of its middle."""
        gram = (self.A.transpose(-2, -1) @ self.A) * (self.B @ self.B.transpose(-2, -1))
        return gram.sum((-2, -1)).clamp_min(0).sqrt()

    def make_even(self) -> FactoredMatrix:
        """The same product with the singular values shared evenly by both factors."""
        root = self.S.sqrt()
        return FactoredMatrix(
            self.U * root[..., None, :], root[..., :, None] * self.Vh.transpose(-2, -1)
        )

    def collapse_l(self) -> torch.Tensor:
        """`[..., mid, right]`: the product up to a rotation of its left space."""
        return self.S[..., :, None] * self.Vh.transpose(-2, -1)

    def collapse_r(self) -> torch.Tensor:
        """`[..., left, mid]`: the product up to a rotation of its right space."""
        return self.U * self.S[..., None, :]

    def get_corner(self, k: int = 3) -> torch.Tensor:
        """The first `k` rows and columns of the product, to look at."""
        return self.A[..., :k, :] @ self.B[..., :, :k]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """The same with a new leading axis at `k`."""
        k = k if k >= 0 else k + self.ndim - 1
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def __matmul__(self, other: Any) -> Any:
        """A vector times it gives a tensor; a matrix or another one, a factored matrix."""
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if other.ndim < 2:
            return (self.A @ (self.B @ other[..., None])).squeeze(-1)
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: torch.Tensor) -> Any:
        """A tensor times it: a vector gives a tensor, a matrix a factored matrix."""
        if other.ndim < 2:
            return ((other[..., None, :] @ self.A) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, scalar: float | torch.Tensor) -> FactoredMatrix:
        """The product scaled by one number."""
        if isinstance(scalar, torch.Tensor) and scalar.numel() != 1:
            raise ValueError(f"only one number scales a factored matrix, not {scalar.numel()}")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """By leading axes, then rows, then columns; a row or column by its number stays an axis."""
        lead = self.ndim - 2
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [p for p in parts if not isinstance(p, torch.Tensor)]:
            at = next(i for i, p in enumerate(parts) if p is Ellipsis)
            missing = self.ndim - (len(parts) - 1)
            parts[at : at + 1] = [slice(None)] * missing
        parts += [slice(None)] * (self.ndim - len(parts))
        ahead, (rows, columns) = tuple(parts[:lead]), parts[lead:]
        a = self.A[(*ahead, _kept(rows), slice(None))]
        b = self.B[(*ahead, slice(None), _kept(columns))]
        return FactoredMatrix(a, b)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={tuple(self.shape)}, mid={self.mdim})"


def _kept(index: Any) -> Any:
    """An index that keeps its axis: a number becomes a slice of one."""
    if isinstance(index, int):
        return slice(index, index + 1 if index != -1 else None)
    return index
