"""The conditions a model is traced under, and the promise that it is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["FreshCasts", "tracing", "untouched"]

_SHORT_CASTS: dict[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


class FreshCasts(TorchFunctionMode):
    """Makes a cast to the dtype a value already has return a new value.

    Torch returns the same object, and the tracer then sends every later reader of the value
    through the cast: in a float32 capture the residual stream would run through a norm's cast.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, casts made fresh."""
        kwargs = dict(kwargs or {})
        if func in _SHORT_CASTS and not kwargs:
            return torch.Tensor.to(args[0], _SHORT_CASTS[func], copy=True)
        if func is torch.Tensor.to and "copy" not in kwargs:
            if not any(isinstance(a, bool) for a in args[1:]):
                return func(*args, **kwargs, copy=True)
        if func is torch.Tensor.type_as:
            return torch.Tensor.to(args[0], args[1].dtype, copy=True)
        return func(*args, **kwargs)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Export under one attention kernel, with gradients on and no ambient autocast.

    Other kernels give other strides, and a `contiguous` that is needed elsewhere would vanish.
    """
    with (
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        FreshCasts(),
    ):
        yield


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode inside; afterwards every attribute, buffer and flag is back.

    Tracing leaves fake tensors on modules that assign attributes in forward, and a real run
    updates buffers; the global random state is kept as well.
    """
    attributes = [(m, dict(m.__dict__)) for m in model.modules()]
    tables = [
        (m, {k: dict(m.__dict__[k]) for k in ("_parameters", "_buffers", "_modules")})
        for m in model.modules()
    ]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            for m in model.modules():
                m.training = False
            yield
    finally:
        for m, kept in attributes:
            m.__dict__.clear()
            m.__dict__.update(kept)
        for m, kept_tables in tables:
            for key, kept in kept_tables.items():
                m.__dict__[key].clear()
                m.__dict__[key].update(kept)
        _restore(buffers)


def _restore(buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for buffer, kept in buffers:
            if not torch.equal(buffer, kept) and not buffer.is_meta:
                buffer.copy_(kept)
