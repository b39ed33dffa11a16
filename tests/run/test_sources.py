"""Folded weights are copies; a lens says so when what they came from changes."""

import warnings

import pytest
import torch
from torch import nn

import lensfx


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.tokens(ids)))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


IDS = torch.arange(10).reshape(2, 5)


def test_a_folded_source_that_changes_is_named_once(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    before = lens(IDS)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"norm\.weight was changed in place after it was folded"):
        assert torch.equal(lens(IDS), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens(IDS)


def test_what_is_shared_may_change(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    raw = lensfx.wrap(model, IDS, passes=None, verify=False)
    with torch.no_grad():
        model.tokens.weight.mul_(2)
    lens(IDS)
    assert torch.equal(raw(IDS), model(IDS))
    with torch.no_grad():
        model.norm.weight.mul_(2)
    assert torch.equal(raw(IDS), model(IDS))


def test_gradients_reach_the_shared_and_the_folded_parameters(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    lens(IDS).square().sum().backward()
    assert model.tokens.weight.grad is not None
    assert model.head.weight.grad is None
    assert all(p.grad is not None for p in lens.parameters())


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        (("hook_embed", print), "is no pair of a name and a function"),
        ([("hook_embed",)], "is no pair of a name and a function"),
        ([("hook_embed", lambda value: value)], r"takes other arguments than \(value, hook\)"),
        ([("hook_embed", lambda a, b, c: a)], r"takes other arguments than \(value, hook\)"),
    ],
)
def test_hooks_that_are_none(model: nn.Module, hooks: object, words: str) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    with pytest.raises(lensfx.HookError, match=words):
        lens.run_with_hooks(IDS, fwd_hooks=hooks)
    assert torch.equal(lens(IDS), lens.run_with_hooks(IDS))


def test_the_report_says_what_may_move_and_why(model: nn.Module) -> None:
    text = str(lensfx.wrap(model, IDS).report)
    assert "as logits may: it has one row for each row of tokens.weight" in text
