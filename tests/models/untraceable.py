"""Models with something in them that no tracer follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .case import builder
from .stranger import WIDTH, Stranger, ids_only, vectors
from .trunk import GPT


class NumpyQuantile(nn.Module):
    """Clips at a quantile that numpy finds."""

    def forward(self, x: Tensor) -> Tensor:
        high = np.quantile(x.detach().abs().numpy(), 0.9)
        return x.clamp(-float(high), float(high))


class NumpyWhitening(nn.Module):
    """Weights of its own around a matrix that numpy decomposes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().reshape(-1, x.shape[-1]).numpy()
        values = np.linalg.svd(flat.astype(np.float64), compute_uv=False)
        return self.lin(x) * torch.from_numpy(values[:1] / values.sum()).to(x)


class _Cube(torch.autograd.Function):
    """A C kernel's stand-in: forward and backward in numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.power(x.detach().numpy(), 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * np.square(x.detach().numpy()) * grad.detach().numpy())


class Cube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x * self.scale)


class ValueLoop(nn.Module):
    """Walks over values one by one: a run-length smoother."""

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x.mean(-1).tolist():
            last, out = 0.0, []
            for value in row:
                last = 0.5 * last + value if value > 0 else value
                out.append(last)
            rows.append(out)
        return x + torch.tensor(rows, dtype=x.dtype)[..., None]


class Ranks(nn.Module):
    """What scipy.stats.rankdata does, in plain Python over a sorted list."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        ranks = np.empty(x.shape, dtype=np.float32)
        for place in np.ndindex(*x.shape[:-1]):
            ranks[place] = np.argsort(np.argsort(x.detach().numpy()[place]))
        return {"ranks": torch.from_numpy(ranks) / x.shape[-1], "values": x * 2}


class Between(nn.Module):
    """Layers before and after the untraceable one."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.before, self.middle = nn.Linear(WIDTH, WIDTH), middle
        self.after = nn.Sequential(nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.before(x))
        if isinstance(h, dict):
            h = h["ranks"] + h["values"]
        return x + self.after(h)


class Deep(nn.Module):
    """The same two levels further down, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(Cube(), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.stack(x))


class NumpyMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 24), Cube24(), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Cube24(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x.tanh())


class NumpyRoot(nn.Module):
    """No submodule to blame: it is the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        table = np.sort(x.detach().numpy(), axis=-1)
        return torch.from_numpy(table) @ self.w


class Generating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        for t in range(x.shape[1]):
            yield self.lin(x[:, t])


class WritesWeight(nn.Module):
    """Keeps its rows at unit norm by writing them back in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.lin.weight.div_(self.lin.weight.norm(dim=1, keepdim=True))
        return self.lin(x)


class Unknown:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class ReturnsUnknown(nn.Module):
    """An object of a class that torch knows nothing about."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return Unknown(self.lin(x))


def _opaque(name: str, factory: Callable[[], nn.Module], inputs: Any = vectors) -> Stranger:
    return Stranger(f"opaque_{name}", builder(factory), inputs, "opaque")


def _refused(name: str, factory: Callable[[], nn.Module], by: str) -> Stranger:
    return Stranger(f"refused_{name}", builder(factory), vectors, "refused", by)


STRANGERS = [
    _opaque("quantile", lambda: Between(NumpyQuantile())),
    _opaque("whitening", lambda: Between(NumpyWhitening())),
    _opaque("function", lambda: Between(Cube())),
    Stranger("branch_value_loop", builder(lambda: Between(ValueLoop())), vectors, "branch"),
    _opaque("dict_out", lambda: Between(Ranks())),
    _opaque("deep", Deep),
    _opaque("gpt", lambda: GPT(mlp=NumpyMLP), ids_only),
    _refused("numpy_root", NumpyRoot, r"numpy|NumpyRoot cannot be traced"),
    _refused("generator", Generating, r"object of type generator"),
    _refused("parameter_write", WritesWeight, r"changes the parameter lin\.weight in place"),
    _refused("unknown_output", ReturnsUnknown, r"object of type Unknown"),
]
