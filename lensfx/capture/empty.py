"""Models without weights: built without memory for them, and traced as if they had them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lensfx.capture.patching import patched

__all__ = ["NOT_RUN", "empty_weights", "has_no_weights", "materialless", "on_shapes"]

NOT_RUN = "captured without weights: not run beside the model"


@contextlib.contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, every parameter of a new module takes no memory; buffers are computed as always.

    The parameters are on the meta device and tied where the model ties them. Capture works on such
    a model, and `lensfx.bind` gives the program its weights.
    """
    make = nn.Parameter.__new__

    def without_memory(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if isinstance(data, torch.Tensor) and not isinstance(data, FakeTensor):
            # What the data was computed from may be tracked by autograd.
            data = data.detach().to("meta")
        return make(cls, data, requires_grad)

    with patched(nn.Parameter, __new__=without_memory):
        yield


def has_no_weights(model: nn.Module) -> bool:
    """Whether some tensor of the model has no memory, so that the model cannot be run."""
    return any(_is_empty(t) for t in [*model.parameters(), *model.buffers()])


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def materialless(
    model: nn.Module, example: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Inside, tensors of the model that have no memory are fakes on the CPU, which can be traced.

    Export runs in the fakes' own mode there. Yields the example to trace with, zeros in place of
    what has no memory; afterwards the model holds its own tensors again.
    """
    with _faked(model) as mode, tracing(TracingContext(mode)):
        yield _filled(example)


@contextlib.contextmanager
def on_shapes(
    model: nn.Module, example: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Inside, the model runs without values: results are fakes, of the right shape and dtype.

    Yields the example to run it on. Code that asks for a value raises torch's own error.
    """
    with _faked(model) as mode:
        given = tuple(mode.from_tensor(t, static_shapes=True) for t in _filled(example))
        with mode:
            yield given


@contextlib.contextmanager
def _faked(model: nn.Module) -> Iterator[FakeTensorMode]:
    shapes = ShapeEnv(tracked_fakes=[], trace_asserts=True)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True, export=True)
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (store, name, tensor)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None and _is_empty(tensor)
    ]
    fakes = {id(tensor): _fake(tensor, mode) for tensor in {id(t): t for *_, t in places}.values()}
    try:
        for store, name, tensor in places:
            store[name] = fakes[id(tensor)]
        yield mode
    finally:
        for store, name, tensor in places:
            store[name] = tensor


def _filled(example: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    zeros = (torch.zeros(t.shape, dtype=t.dtype, device=_device(t)) for t in example)
    return tuple(z if _is_empty(t) else t for z, t in zip(zeros, example, strict=True))


def _device(tensor: torch.Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    strides = tuple(tensor.stride())
    with mode:
        fake = torch.empty_strided(
            tensor.shape, strides, dtype=tensor.dtype, device=_device(tensor)
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake
