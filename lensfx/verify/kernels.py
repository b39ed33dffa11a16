"""What float64 needs of operators: wider dtypes, and products that torch has no kernel for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["KERNELS", "WIDER"]

aten = torch.ops.aten

WIDER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


def _grouped_mm(
    rows: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows up to each of `offs` times the weight of their group, `[rows, d] @ [group, d, out]`."""
    if offs is None:
        product = rows @ weight
    elif rows.ndim == 2 and weight.ndim == 3:
        ends = offs.tolist()
        parts = zip([0, *ends[:-1]], ends, weight, strict=True)
        product = torch.cat([rows[a:b] @ matrix for a, b, matrix in parts])
        # Behind the last group nothing is promised; zeros are as right as anything.
        rest = product.new_zeros(len(rows) - len(product), product.shape[1])
        product = torch.cat([product, rest])
    else:
        raise NotImplementedError("a grouped product of these shapes in float64")
    return product if bias is None else product + bias


# Kernels that take no float64, written out.
KERNELS: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}
