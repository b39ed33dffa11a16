"""The functional form of an in-place program is bitwise the program, effects and gradients too."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim

from lensfx.capture import functional
from lensfx.capture.functional import functionalise
from lensfx.errors import CaptureError
from lensfx.graph.ops import writes

torch.set_num_threads(1)
aten = torch.ops.aten
Body = Callable[..., Any]


class Net(nn.Module):
    """Parameters and buffers for a test body to use as `m`."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.table = nn.Embedding(9, 6, max_norm=1.0)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.randn(20, 6))
        self.body = (body,)

    def forward(self, *args: Tensor) -> Any:
        return self.body[0](self, *args)


def flat(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    shapes = tuple({i: Dim.AUTO for i in range(a.ndim)} for a in args)
    exported = torch.export.export(model, args, dynamic_shapes=(shapes,), strict=False)
    return exported.module(check_guards=False)


def converted(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    made = flat(model, *args)
    functionalise(made.graph)
    made.recompile()
    return made


def run(model: nn.Module, args: tuple[Tensor, ...], seed: int) -> tuple[Any, Any, Any]:
    """Outputs, arguments and buffers after one call, and the gradients of the parameters."""
    torch.manual_seed(seed)
    args = tuple(a.clone() for a in args)
    out = model(*args)
    out = list(out) if isinstance(out, tuple | list) else [out]
    out = [o for o in out if isinstance(o, Tensor)]
    used = {k: p for k, p in model.named_parameters() if p.requires_grad}
    seeds = [torch.randint(-3, 4, o.shape, generator=torch.Generator().manual_seed(1)) for o in out]
    pairs = [(o, s.to(o.dtype)) for o, s in zip(out, seeds, strict=True) if o.requires_grad]
    grads: Any = dict.fromkeys(used)
    if pairs:
        roots, seeds = zip(*pairs, strict=True)
        try:
            found = torch.autograd.grad(roots, list(used.values()), seeds, allow_unused=True)
            grads = dict(zip(used, found, strict=True))
        except RuntimeError as error:
            grads = str(error)
    after = {k: b.detach().clone() for k, b in model.named_buffers() if not k.startswith("lifted")}
    return [o.detach().clone() for o in out], {"args": args, **after}, grads


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return all(x is None or not x.any() for x in (a, b))
    if isinstance(a, Tensor):
        kinds = a.dtype == b.dtype and a.shape == b.shape
        return kinds and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
