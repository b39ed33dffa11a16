"""Several programs of one lens read the same folded weights, and all follow the model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx import CaptureError

torch.set_num_threads(1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.norm(self.tokens(ids))).log_softmax(-1) * scale


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


IDS = torch.arange(10).reshape(2, 5)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def bump(model: nn.Module) -> None:
    with torch.no_grad():
        model.norm.weight.mul_(1.5)


def test_a_later_program_starts_from_weights_that_have_followed(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS)
    bump(model)
    assert close(lens(IDS, 2.0), model(IDS, 2.0))
    assert close(lens(IDS), model(IDS))
    bump(model)
    assert close(lens.train()(IDS), model(IDS))


def test_every_program_follows_and_nobody_is_blamed(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS)
    lens(IDS, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            bump(model)
            assert close(lens(IDS), model(IDS))
            assert close(lens(IDS, 2.0), model(IDS, 2.0))


@pytest.mark.parametrize("passes", ["default", None])
def test_a_copy_of_a_lens_is_of_a_copy_of_the_model(model: nn.Module, passes: str | None) -> None:
    lens = lensfx.wrap(model, IDS, passes=passes)
    twin = copy.deepcopy(lens)
    before = twin(IDS)
    for _ in range(2):
        bump(model)
    assert torch.equal(twin(IDS), before)
    assert close(lens(IDS), model(IDS))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert close(twin(IDS, 2.0), 2 * twin(IDS))


def test_a_copy_of_a_program_knows_no_model(model: nn.Module) -> None:
    program = copy.deepcopy(lensfx.capture(model, IDS))
    assert torch.equal(program(IDS), model(IDS))
    assert not {id(t) for t in program.tensors.values()} & {id(p) for p in model.parameters()}
    with pytest.raises(lensfx.GuardError):
        lensfx.Lens(program)(IDS, 2.0)


def test_a_slice_of_ids_is_captured_as_ids(model: nn.Module) -> None:
    class Flattened(Small):
        def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(ids.view(-1, ids.shape[-1]), scale)

    whole = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    flat = Flattened().eval()
    lens = lensfx.wrap(flat, whole[:, :5], passes=None)
    for length in (5, 3, 9):
        assert torch.equal(lens(whole[:, :length]), flat(whole[:, :length]))


_HISTORY: list[int] = []


def test_state_in_a_list_and_state_that_the_first_values_decide() -> None:
    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            _HISTORY.append(0)
            return x * len(_HISTORY)

    class First(nn.Module):
        scale: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = x.abs().max().detach()
            return x * self.scale

    for kind in (Listed, First):
        with pytest.raises(CaptureError, match="from one call for the next"):
            lensfx.capture(kind(), torch.randn(2, 4))
    assert _HISTORY == []


def test_a_counter_beside_a_buffer_is_no_state() -> None:
    class Averaging(nn.Module):
        steps = 0

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - self.mean

    model = Averaging()
    lens = lensfx.wrap(model, torch.ones(2, 4), passes=None)
    twin = copy.deepcopy(model)
    for k in range(3):
        x = torch.full((2, 4), float(k))
        assert torch.equal(lens(x), twin(x))
    assert torch.equal(model.mean, twin.mean)
