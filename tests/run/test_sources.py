"""Folded weights follow the parameters that they came from."""

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


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.log_softmax(-1), b.log_softmax(-1), atol=1e-5)


def test_folded_weights_follow_the_model(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    folded = lens.program.tensors["head.weight"]
    for parameter in (model.norm.weight, model.norm.bias, model.head.weight):
        with torch.no_grad():
            parameter.mul_(2)
        assert same(lens(IDS), model(IDS))
    assert lens.program.tensors["head.weight"] is folded


def test_both_changed_is_said_once(model: nn.Module) -> None:
    lens = lensfx.wrap(model, IDS, verify=False)
    with torch.no_grad():
        lens.program.tensors["head.weight"].mul_(3)
        lens(IDS)
        model.head.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"head\.weight was changed in place, and so was"):
        lens(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens(IDS)


def test_training_switches_keep_eval_and_training_together() -> None:
    class Dropped(Small):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            drop = nn.functional.dropout(self.norm(self.tokens(ids)), 0.1, self.training)
            return self.head(drop)

    torch.manual_seed(0)
    model = Dropped().eval()
    lens = lensfx.wrap(model, IDS, verify=False)
    optimizer = torch.optim.SGD(lens.train().parameters(), lr=0.5)
    for _ in range(3):
        lens(IDS).square().sum().backward()
        optimizer.step()
    assert same(lens.eval()(IDS), model(IDS))
    assert same(lensfx.wrap(model, IDS, verify=False)(IDS), model(IDS))


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
