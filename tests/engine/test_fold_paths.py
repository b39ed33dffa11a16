"""A number that is part of the captured path is the same up to rounding after a fold."""

from __future__ import annotations

import importlib

import pytest
import torch
from graphs import FoldScale, Sketch
from torch import Tensor, nn

from lensfx.capture import capture
from lensfx.graph import Program
from lensfx.graph.choice import OtherPathError, choices, decided
from lensfx.rewrite import Pipeline

aten = torch.ops.aten
fold = importlib.import_module("lensfx.rewrite.fold")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def folded(program: Program) -> Program:
    return Pipeline([FoldScale()], strict=True).run(program)


def sketched(off: float) -> Program:
    """A norm, a linear, and a check that the largest entry is `1 + off` times what it is."""

    def built(expected: float) -> Program:
        s = Sketch()
        x = s.input("x", "B", 8)
        g, b, w = s.weight("ln.weight", 8), s.weight("ln.bias", 8), s.weight("q.weight", 6, 8)
        n = s.call(aten.layer_norm.default, x, [8], g, b, path="ln")
        q = s.call(aten.linear.default, n, w, path="q")
        most = s.call(aten.max.default, q)
        s.call(decided, most, expected, "net.py:1", 0)
        return s.done(q, most)

    free = built(0.0)
    decision = choices(free.graph)[0]
    free.graph.erase_node(decision)
    return built(free(X)[1].item() * (1 + off))


@pytest.mark.parametrize("off", [3e-6, -3e-6])
def test_rounding_is_no_other_path_after_a_fold(
    off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sketched(off)
    with pytest.raises(OtherPathError):
        before(X)
    after = folded(before)
    torch.testing.assert_close(after(X)[0], sketched(0.0)(X)[0])
    monkeypatch.setattr(fold, "_loosen", lambda graph, rewritten: None)
    with pytest.raises(OtherPathError):
        folded(before)(X)


@pytest.mark.parametrize("off", [1e-3, -1e-3, 1.0, float("nan"), float("inf")])
def test_another_number_is_another_path_after_a_fold(off: float) -> None:
    with pytest.raises(OtherPathError, match="this call takes another path"):
        folded(sketched(off))(X)


class Scaled(nn.Module):
    """Computes with a Python number that a folded weight gives, as a quantiser does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.norm(x))
        return self.b(y) * max(float(y.detach().double().abs().mean()), 0.5)


def test_a_captured_number_survives_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, missed = Scaled(), 0
    for seed in range(8):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        before = capture(model, x)
        program = folded(before)
        assert program.formulas
        assert [n.args[4:] for n in choices(program.graph)] == [(fold._SLACK,)]
        torch.testing.assert_close(program(x), model(x))
        with monkeypatch.context() as patch:
            patch.setattr(fold, "_loosen", lambda graph, rewritten: None)
            strict = folded(before)
        try:
            strict(x)
        except OtherPathError:
            missed += 1
    assert missed


def test_what_no_pass_changed_is_compared_to_the_last_bit() -> None:
    model = Scaled()
    program = fold.fold(capture(model, X))
    assert [len(n.args) for n in choices(program.graph)] == [4]
    program(X)
    with pytest.raises(OtherPathError):
        program(X * (1 + 1e-5))


def test_a_whole_number_and_a_condition_stay_exact() -> None:
    class Whole(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.norm(x))
            return self.b(y) * int(y.detach().abs().sum() * 1e6) if y.sum() < 1e9 else y

    program = folded(capture(Whole(), X))
    assert program.formulas
    assert [len(n.args) for n in choices(program.graph)] == [4, 4]
