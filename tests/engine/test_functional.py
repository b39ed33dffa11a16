"""The functional form of an in-place program is bitwise the program: values, effects, gradients."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from lensfx.capture import functional
from lensfx.capture.functional import functionalise
from lensfx.errors import CaptureError
from lensfx.graph.ops import is_impure, writes

aten = torch.ops.aten
Body = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """A test body with parameters and buffers, which it gets as `m`."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
            self.norm = nn.BatchNorm1d(6)
            self.table = nn.Embedding(9, 6, max_norm=1.0)
            self.register_buffer("cache", torch.randn(20, 6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.body = (body,)

    def forward(self, *args: Tensor) -> Any:
        return self.body[0](self, *args)


def flat(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    shapes = tuple({i: Dim.AUTO for i in range(a.ndim)} for a in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, args, dynamic_shapes=(shapes,), strict=False)
        return exported.module(check_guards=False)


def converted(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    made = flat(model, *args)
    functionalise(made.graph)
    made.recompile()
    left = [n for n in made.graph.nodes if writes(n)]
    tail = list(made.graph.nodes)[-len(left) - 1 : -1]
    assert left == tail or not left
    assert all(n.target is aten.copy_.default and n.args[0].op in STARTS for n in left)
    assert all(n.meta.get("val") is not None for n in made.graph.nodes if n.users)
    return made


STARTS = ("placeholder", "get_attr")


def run(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, Any, Any]:
    """Outputs, arguments and buffers after one call, and the gradients of the parameters."""
    torch.manual_seed(3)
    args = tuple(a.clone() for a in args)
    out = model(*args)
    out = [o for o in (out if isinstance(out, tuple | list) else [out]) if o is not None]
    kept = {k: b.detach().clone() for k, b in model.named_buffers() if k in ("cache", "steps")}
    kept |= {k: b.detach().clone() for k, b in model.named_buffers() if k.startswith("norm")}
    return [o.detach().clone() for o in out], {"args": args, **kept}, gradients(model, out)


def gradients(model: nn.Module, out: list[Tensor]) -> Any:
    used = {k: p for k, p in model.named_parameters() if p.requires_grad}
    seeds = [torch.randint(-3, 4, o.shape, generator=torch.Generator().manual_seed(1)) for o in out]
    pairs = [(o, s.to(o.dtype)) for o, s in zip(out, seeds, strict=True) if o.requires_grad]
    try:
        found = torch.autograd.grad(*zip(*pairs, strict=True)[:1], ()) if False else ()
    except RuntimeError as error:
        return str(error)
    return found
