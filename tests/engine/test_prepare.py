"""Wrappers are taken off and said, hooks are part of the model, misuse is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx import CaptureError, capture

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.last(self.first(x) * scale)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
def test_a_wrapper_is_taken_off_and_said(wrapper: Any) -> None:
    model = Net().eval()
    program = capture(wrapper(model), X, scale=3.0)
    assert torch.equal(program(X, scale=3.0), model(X, scale=3.0))
    assert any(t is model.first.weight for t in program.tensors.values())
    assert "without its" in program.source.notes[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_wrappers_inside_wrappers() -> None:
    model = Net().eval()
    program = capture(nn.DataParallel(torch.compile(model)), X)
    assert torch.equal(program(X), model(X))
    assert len(program.source.notes) == 2


def test_forward_hooks_are_part_of_the_model_and_said() -> None:
    model = Net().eval()
    model.first.register_forward_hook(lambda m, args, out: out * 5)
    model.last.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    program = capture(model, X)
    assert torch.equal(program(X), model(X))
    assert program.source.notes == ("forward hooks are part of what is captured, at first, last",)


class Bridge(nn.Module):
    """As hooking tools wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.original_model = model

    def run_with_cache(self, *args: Any) -> None: ...


class Envoy:
    def __init__(self, model: nn.Module) -> None:
        self._model = model


@pytest.mark.parametrize("wrapper", [Bridge, Envoy])
def test_another_tools_wrapper_is_refused_in_one_sentence(wrapper: Any) -> None:
    with pytest.raises(CaptureError, match="another tool's wrapper") as caught:
        capture(wrapper(Net()), X)
    assert len(str(caught.value).splitlines()) == 2
    assert "pass the model in it" in str(caught.value)


def test_a_lens_is_no_model() -> None:
    lens = lensfx.wrap(Net().eval(), X, passes=None, verify=False)
    with pytest.raises(CaptureError, match=r"takes a torch\.nn\.Module, not Lens"):
        capture(lens, X)  # type: ignore[arg-type]


class LowRank(nn.Module):
    """A frozen linear with a trained low-rank update, as adapters add them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_adapters_and_parametrised_weights() -> None:
    model = Net().eval()
    model.first = LowRank(model.first)
    nn.utils.parametrizations.weight_norm(model.last)
    program = capture(model, X)
    assert torch.equal(program(X), model(X))
    model.zero_grad()
    program(X).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    model(X).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (got[name] is None)
        assert p.grad is None or torch.equal(p.grad, got[name])
    assert got["first.base.weight"] is None
    assert got["first.up.weight"] is not None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_packed_weights_are_refused_with_the_alternative() -> None:
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        model = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})
    with pytest.raises(CaptureError, match=r"first.* keeps packed weights") as caught:
        capture(model, X)
    assert "as it was before its weights were packed" in str(caught.value)


class Int8(nn.Module):
    """Weights as integers and a scale, the way a quantised checkpoint keeps them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def test_weights_kept_as_integers_are_captured() -> None:
    model = Net().eval()
    model.first = Int8(model.first)
    program = capture(model, X)
    assert torch.equal(program(X), model(X))
    assert not program.source.opaque
