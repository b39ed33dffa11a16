"""Bitwise comparison of what models return, and of what they write and of their gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .case import Inputs

__all__ = ["bits", "gradients", "ran"]


def bits(value: Any) -> Any:
    """A value with every tensor replaced by something that compares by type, shape and bits.

    A NaN is any NaN: kernels differ in the sign they give it.
    """

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return type(t), t
        t = t.detach()
        if t.is_floating_point():
            t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
        raw = t.contiguous().flatten().view(torch.uint8)
        return type(t), t.dtype, tuple(t.shape), raw.numpy().tobytes()

    leaves, spec = pytree.tree_flatten(value)
    return spec, [leaf(v) for v in leaves]


def ran(function: Callable[..., Any], call: Inputs) -> Any:
    """What a call returns and what it leaves in its arguments, in a form that compares."""
    args, kwargs = copy.deepcopy(call)
    result = function(*args, **kwargs)
    return bits(result), bits((args, kwargs))


def gradients(function: Callable[..., Any], call: Inputs, weights: list[nn.Parameter]) -> list[Any]:
    """The gradient of each weight under the same noise at every output, as bits or None."""
    args, kwargs = copy.deepcopy(call)
    outputs = [o for o in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(o, Tensor)]
    roots = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in roots]
    found = torch.autograd.grad(roots, weights, seeds, allow_unused=True) if roots else ()
    return [None if g is None else bits(g) for g in found]
