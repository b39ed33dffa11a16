"""What cannot be traced runs as one operator: bitwise the model's values, gradients and effects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from opaque_parts import (
    PARTS,
    SHAPES,
    Counting,
    Detour,
    Flat,
    Loop,
    Noisy,
    Outer,
    check,
    exported,
    given,
    net,
    observed,
    plain,
    run,
    same,
    twice,
)
from torch import Tensor, nn

from lensfx.graph.opaque import is_opaque

torch.set_num_threads(1)


@pytest.mark.parametrize(("body", "kind"), PARTS)
def test_values_and_gradients_are_the_models(body: Any, kind: Any) -> None:
    model = net(body, kind())
    module = exported(model, observed(model, {"part": "test"}))
    assert sum(map(is_opaque, module.graph.nodes)) == (2 if body is twice else 1)
    check(model, module)
    with torch.no_grad():
        x = given((3, 2))
        same(module(x), Flat(model)(x))


@pytest.mark.parametrize(("body", "kind"), [*PARTS, pytest.param(plain, Counting, id="buffers")])
def test_compiled_whole_it_is_the_same(body: Any, kind: Any) -> None:
    model = net(body, kind())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:3])


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_inductor_takes_it() -> None:
    model = net(plain, Detour())
    module = exported(model, observed(model, {"part": "test"}))
    x = given((2, 5)).requires_grad_()
    got = torch.compile(module, fullgraph=True)(x)[0]
    torch.testing.assert_close(got, model(x))
    got.sum().backward()


def test_buffers_are_updated_as_the_model_does() -> None:
    model = net(plain, Counting())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, module)
    module(given((2, 5)))
    assert int(model.part.steps) == 1
    assert bool((model.part.mean != 0).all())


def test_a_training_run_is_recomputed_with_the_same_draws() -> None:
    model = net(plain, Noisy())
    model.train()
    module = exported(model, observed(model, {"part": "test"}))
    model.part.eval()
    before = [m.training for m in model.modules()]
    x = given((2, 5))
    got = run(module, x, model)
    assert [m.training for m in model.modules()] == before
    model.part.train()
    same(got, run(Flat(model), x, model))
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:1])


class Kept(nn.Module):
    """How many values pass depends on the data; calls a part that draws from its own source."""

    def __init__(self) -> None:
        super().__init__()
        self.source = np.random.default_rng(1)
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        picked = [i for i, v in enumerate(flat[:, 0].tolist()) if v > 0]
        return self.lin(flat[picked])


def test_a_size_may_depend_on_the_data() -> None:
    model = net(lambda m, h: m.last(m.part(h)).sum(0), Kept())
    shapes = [(2, 5), (3, 7), (4, 11), (5, 2)]
    module = exported(model, observed(model, {"part": "test"}, shapes))
    node = next(n for n in module.graph.nodes if is_opaque(n))
    assert node.meta["opaque"].outputs[0].sizes[0] is None
    check(model, module)
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:2])


def test_autocast_acts_inside_and_in_the_second_run() -> None:
    model = net(plain, Loop())
    module = exported(model, observed(model, {"part": "test"}))

    def under(f: Any) -> list[Any]:
        model.zero_grad()
        x = given((2, 5)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = f(x)[0]
        out.float().square().sum().backward()
        return [out, x.grad, *(p.grad for p in model.parameters())]

    same(under(module), under(Flat(model)))


def test_the_outermost_wins_and_a_shared_part_is_taken_wherever_it_is_called() -> None:
    outer = Outer()
    model = net(lambda m, h: m.last(m.part(x=h, k=2)) + m.alias(h), outer, alias=outer.inner)
    parts = observed(model, {"part": "a", "alias": "b"})
    module = exported(model, parts)
    assert [(c.path, c.why) for c in parts.calls] == [("part", "a"), ("alias", "b")]
    for shape in SHAPES:
        same(module(given(shape)), Flat(model)(given(shape)))


class Writes(nn.Module):
    """Doubles rows of its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        for i, v in enumerate(x.detach()[:, 0, 0].tolist()):
            if v > 0:
                x[i] *= 2.0
        return x.mean(-1, keepdim=True)


def test_an_input_changed_in_place_is_changed_for_its_other_readers() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        a = h * 1.5
        return m.last(a + m.part(a) + a)

    model = net(body, Writes())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, module)
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:1])


def test_lost_gradients_would_be_seen() -> None:
    model = net(plain, Detour())
    parts = observed(model, {"part": "test"})
    module = exported(model, parts)
    object.__setattr__(parts.calls[0], "reached", (True, False, False))
    with pytest.raises(AssertionError):
        check(model, module, SHAPES[:1])
