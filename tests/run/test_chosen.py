"""Which program answers a call: by weights that have followed, and once more where one refuses."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx import GuardError

torch.set_num_threads(1)


class Net(nn.Module):
    """A norm, two linears, a batch norm, dropout, a part, and a body."""

    def __init__(self, body: Callable[..., Any], part: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.bn, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
            for parameter in self.parameters():
                nn.init.normal_(parameter)
        self.part = nn.Identity() if part is None else part
        self.body = (body,)

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.body[0](self, x, *more)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(run: Callable[..., Any], *args: Any) -> tuple[Any, list[float]]:
    """What a run gives from a fixed random state, and the numbers that come next."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    out = run(*args)
    return out, [float(torch.rand(())), float(np.random.rand()), random.random()]


def _by_sign(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if x.sum() > 0 else m.b(x)


def test_the_first_program_stays_first() -> None:
    lens = lensfx.wrap(Net(_by_sign).eval(), noise(3, 6).abs(), passes=None)
    for sign in (1, -1, 1, -1, -1, 1):
        lens(sign * noise(3, 6).abs())
        assert lens.programs[0] is lens.program
    assert len(lens.programs) == len({id(p) for p in lens.programs}) == 2


def test_the_path_is_chosen_by_weights_that_have_followed() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.a(m.norm(x))
        return y if y.sum() > 0 else m.b(y)

    model = Net(body).eval()
    lens = lensfx.wrap(model, noise(3, 6))
    assert lens.program.formulas
    for _ in range(3):
        with torch.no_grad():
            model.norm.weight.neg_()
            model.norm.bias.neg_()
            model.a.bias.neg_()
        torch.testing.assert_close(lens(noise(3, 6)), model(noise(3, 6)))
        _, cache = lens.run_with_cache(noise(3, 6))
        assert cache
    assert len(lens.programs) == 2


def test_a_warning_about_folded_weights_points_at_the_call() -> None:
    model = Net(lambda m, x: m.a(m.norm(x))).eval()
    lens = lensfx.wrap(model, noise(3, 6), verify=False)
    calls = [lens, lens.run_with_cache, lens.run_with_hooks]
    for call in calls:
        with torch.no_grad():
            lens.program.tensors["a.weight"].mul_(3)
            model.a.weight.mul_(2)
        with pytest.warns(UserWarning, match="the lens keeps the folded value") as caught:
            call(noise(3, 6))
        assert [w.filename for w in caught] == [__file__]


SIGNS: list[Iterator[float]] = []


class Coin(nn.Module):
    """Gives its input the next sign of a list that nobody can see."""

    def forward(self, x: Tensor) -> Tensor:
        return x * next(SIGNS[0])


def test_only_hooks_are_blamed_for_what_hooks_do() -> None:
    SIGNS[:] = [itertools.repeat(1.0)]
    model = Net(lambda m, x: _by_sign(m, m.part(x)), Coin()).eval()
    x = noise(3, 6).abs()
    lens = lensfx.wrap(model, x, passes=None, opaque=["part"], verify=False)
    name = next(n for n in lens.hook_names if n.startswith("part."))
    flips = [(name, lambda value, hook: -value)]
    with pytest.raises(GuardError, match="a hook changes the path"):
        lens.run_with_hooks(x, fwd_hooks=flips)
    behind = next(n for n in lens.hook_names if n.startswith("a."))
    looks: list[Any] = [(behind, lambda grad, hook: None)]
    for hooks in ([], looks):
        SIGNS[:] = [itertools.cycle([1.0, -1.0])]
        with pytest.raises(GuardError, match="takes another now") as caught:
            lens.run_with_hooks(x, bwd_hooks=hooks)
        assert "hook" not in str(caught.value)
        assert "test_chosen.py" in str(caught.value)
    SIGNS.clear()


class Cut(nn.Module):
    """Counts, draws from all there is, and cuts what is longer than it ever was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x[:, :16] * (np.random.rand() + random.random())


def _noisy(m: Net, x: Tensor) -> Tensor:
    y = m.drop(m.bn(m.a(x).flatten(0, 1)).view_as(x))
    return m.b(m.part(y)) * torch.rand(())


def _cut() -> tuple[Net, lensfx.Lens]:
    model = Net(_noisy, Cut())
    lens = lensfx.wrap(model.eval(), noise(2, 5, 6), passes=None, opaque=["part"], verify=False)
    model.train()
    lens.train()
    return model, lens


@pytest.mark.parametrize("cached", [False, True])
def test_a_refused_call_leaves_no_trace(cached: bool) -> None:
    model, lens = _cut()
    twin = copy.deepcopy(model)
    run = (lambda x: lens.run_with_cache(x)[0]) if cached else lens
    for length in (5, 40, 7, 64):
        x = noise(2, length, 6, seed=length)
        want, following = seeded(twin, x)
        got, after = seeded(run, x)
        assert torch.equal(got, want)
        assert after == following
        assert model.part.calls == twin.part.calls
        for name, buffer in twin.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], buffer), name
    # Of the eval mode, of the first call, and of the one that was refused.
    assert len(lens.programs) >= 3


def test_a_cache_of_a_call_captured_again_has_its_values_and_gradients() -> None:
    model = Net(lambda m, x: _noisy(m, x).sum(), Cut()).eval()
    lens = lensfx.wrap(model, noise(2, 5, 6), passes=None, opaque=["part"], verify=False)
    name = next(n for n in lens.hook_names if n.startswith("a."))
    x = noise(2, 40, 6, seed=1)
    twin = copy.deepcopy(model)
    want, _ = seeded(twin, x)
    want.backward()
    calls: list[Tensor] = []
    lens.add_hook(name, lambda value, hook: calls.append(value))
    (got, cache), _ = seeded(lambda: lens.run_with_cache(x, names_filter=name, incl_bwd=True))
    assert torch.equal(got, want)
    assert torch.equal(cache[name], model.a(x))
    assert cache[f"{name}_grad"].shape == (2, 40, 6)
    assert len(lens.programs) == len(calls) == 2
    assert torch.equal(model.a.weight.grad, twin.a.weight.grad)


def test_looking_for_the_path_draws_nothing_from_python_and_numpy() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.part(x)
        return m.a(y) if y.sum() > 0 else m.b(y)

    model = Net(body, Cut()).eval()
    lens = lensfx.wrap(model, noise(5, 6).abs(), passes=None, opaque=["part"], verify=False)
    twin = copy.deepcopy(model)
    for sign in (1, -1, 1, -1, -1):
        x = sign * noise(5, 6).abs()
        want, following = seeded(twin, x)
        got, after = seeded(lens, x)
        assert torch.equal(got, want)
        assert after == following
        assert model.part.calls == twin.part.calls


def test_looking_for_the_path_writes_to_no_input() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        x.mul_(2)
        return m.a(x) if x.sum() > 0 else m.b(x)

    model = Net(body).eval()
    lens = lensfx.wrap(model, noise(5, 6).abs(), passes=None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for sign in (1, -1, 1, -1):
            mine, theirs = (sign * noise(5, 6).abs() for _ in range(2))
            assert torch.equal(lens(mine), model(theirs))
            assert torch.equal(mine, theirs)
