"""Modules that cannot be traced, a net around them, and how to compare a graph with the model."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lensfx.capture.opaque import OpaqueModules
from lensfx.graph.opaque import is_opaque, opaque_of

SHAPES = [(2, 5), (3, 7), (1, 4), (4, 1)]
_ABS = ctypes.CDLL(None).abs


class Detour(nn.Module):
    """Two ways: by numpy, which carries no gradient, and by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.from_numpy(np.quantile(x.detach().numpy(), 0.3, axis=-1, keepdims=True))
        return self.lin(x) - low.to(x)


class Loop(nn.Module):
    """Looks at its values one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        signs = [1.0 if v > 0 else -0.5 for v in x.detach().sum(-1).flatten().tolist()]
        y = x * torch.tensor(signs, dtype=x.dtype).view(*x.shape[:-1], 1) * self.gain
        return -y if flip else y


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2) * grad


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x * self.scale)


class Foreign(nn.Module):
    """Calls into a C library with what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * _ABS(int(x.detach().sum() * 10))


class Counting(nn.Module):
    """Updates a buffer in place and another by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.numpy().reshape(-1, 6).mean(0).sum())
        self.steps = self.steps + 1
        return self.lin(x) * self.mean


class Noisy(nn.Module):
    """Draws from torch and from numpy, only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.lin(x)) * float(x.detach().abs().max().item() > 0)
        return y * torch.from_numpy(np.random.rand(6)).to(y) if self.training else y


@dataclass(frozen=True)
class Pair:
    left: Tensor
    rest: Any


class Many(nn.Module):
    """Returns a dictionary with a dataclass, nothing, a name, a size and an integer tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor, n: int, mode: str = "plain") -> dict[str, Any]:
        top = torch.from_numpy(x.detach().numpy().argmax(-1))
        y = self.lin(x).reshape(n * x.shape[0], 6)
        return {"pair": Pair(y.t(), (top, None)), "mode": mode, "n": n}


class Net(nn.Module):
    """Traceable code around a part, which is called as `body` says."""

    def __init__(self, body: Callable[..., Any], part: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.part = part
        self.last = nn.Linear(6, 6)
        for name, module in more.items():
            setattr(self, name, module)
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, torch.tanh(self.first(x)))


def plain(m: Any, h: Tensor) -> Any:
    return m.last(m.part(h) + h)


def twice(m: Any, h: Tensor) -> Any:
    return m.last(m.part(m.part(h), flip=True) + h)


def many(m: Any, h: Tensor) -> Any:
    out = m.part(h, h.shape[1])
    pair = out["pair"]
    return m.last(pair.left.t().view(*h.shape)) * out["n"], pair.rest[0], out["mode"]


PARTS: list[Any] = [
    pytest.param(plain, Detour, id="numpy"),
    pytest.param(twice, Loop, id="loop-called-twice"),
    pytest.param(plain, ByHand, id="autograd-function"),
    pytest.param(plain, Foreign, id="c-library"),
    pytest.param(many, Many, id="many-results"),
]


def net(body: Callable[..., Any], part: nn.Module, **more: nn.Module) -> Net:
    torch.manual_seed(0)
    model = Net(body, part, **more).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


def given(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, 6, generator=generator).to(dtype)


class Flat(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        out = self.model(x)
        return [v for v in (out if isinstance(out, tuple) else (out,)) if isinstance(v, Tensor)]


def observed(model: nn.Module, why: dict[str, str], shapes: Sequence[Any] = SHAPES[:2]) -> Any:
    parts = OpaqueModules(model, why)
    with restored(model), parts.observing():
        for shape in shapes:
            model(given(shape))
    return parts


def exported(model: nn.Module, parts: OpaqueModules, shape: Sequence[int] = (2, 5)) -> Any:
    """The exported graph as a module, with what keeps its operators alive."""
    dims = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with parts.tracing(), torch.enable_grad():
        program = torch.export.export(
            Flat(model), (given(shape),), dynamic_shapes=dims, strict=False
        )
    module = program.module(check_guards=False)
    for node in module.graph.nodes:
        if is_opaque(node):
            node.meta["opaque"] = opaque_of(node.args[0])
    return module


def run(module: Any, x: Tensor, owner: nn.Module, seed: int = 3) -> list[Any]:
    """Results, the gradients of input and parameters, buffers and the next random numbers."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    owner.zero_grad()
    x = x.clone().requires_grad_()
    out = [t for t in module(x) if isinstance(t, Tensor)]
    following = [torch.rand(2), torch.from_numpy(np.random.rand(2))]
    sum((t * t).sum() for t in out if t.requires_grad).backward()
    grads = [p.grad for p in owner.parameters()]
    return [*out, x.grad, *grads, *(b.clone() for b in owner.buffers()), *following]


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Buffers are the objects that they were, with the values that they had."""
    held = [(m._buffers, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items()]
    yield
    for buffers, name, buffer, value in held:
        buffers[name] = buffer.copy_(value)


def same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def check(model: nn.Module, module: Any, shapes: Sequence[Any] = SHAPES) -> None:
    for shape in shapes:
        with restored(model):
            want = run(Flat(model), given(shape), model)
        with restored(model):
            same(run(module, given(shape), model), want)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Detour()

    def forward(self, x: Tensor, *, k: int = 1) -> Tensor:
        return self.inner(x) * k if x.sum().item() > -1e9 else x
