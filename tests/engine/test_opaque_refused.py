"""What no declaration fits is refused, at capture or in the run that shows it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opaque_parts import exported, given, net, observed
from torch import Tensor, nn

from lensfx.capture.opaque import OpaqueModules
from lensfx.errors import CaptureError, LensError
from lensfx.graph.opaque import is_opaque
from lensfx.graph.ops import is_random

torch.set_num_threads(1)


class Odd(nn.Module):
    """Returns what it is told to return."""

    def __init__(self, rest: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rest = (rest,)

    def forward(self, x: Tensor) -> Any:
        return self.rest[0](x)


class Hidden:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def first(m: Any, h: Tensor) -> Any:
    return m.last(m.part(h)[0])


def test_what_cannot_be_declared_is_refused() -> None:
    model = net(first, Odd(lambda x: (x, float(x.detach().sum()))))
    parts = observed(model, {"part": "test"})
    with pytest.raises(CaptureError, match=r"module part returns -?\d+\.\d+ and "):
        exported(model, parts)
    assert "forward" not in model.part.__dict__
    assert "forward" not in model.__dict__
    with pytest.raises(CaptureError, match="returns an object of type Hidden"):
        observed(net(first, Odd(lambda x: (x, Hidden(x)))), {"part": "test"})
    with pytest.raises(CaptureError, match="called otherwise when traced than when run"):
        exported(model, OpaqueModules(model, {"part": "test"}))


def test_a_run_that_contradicts_what_was_declared_says_so() -> None:
    model = net(first, Odd(lambda x: (torch.cat([x, x[:, 4:]], 1), "a" if len(x) < 4 else "b")))
    module = exported(model, observed(model, {"part": "test"}, [(2, 2), (3, 3)]), (2, 3))
    with pytest.raises(LensError, match=r"module part returned a tensor of sizes \(2, 6, 6\)"):
        module(given((2, 5)))
    with pytest.raises(LensError, match="returned 'b' for result 1, which was 'a'"):
        module(given((4, 3)))
    for node in module.graph.nodes:
        node.meta.clear()
    gc.collect()
    with pytest.raises(LensError, match="nothing is known of the opaque module part"):
        module(given((2, 3)))


def test_that_it_may_draw_is_known_of_the_operator_alone() -> None:
    model = net(lambda m, h: m.last(m.part(h)), Odd(torch.tanh))
    module = exported(model, observed(model, {"part": "test"}))
    node = next(n for n in module.graph.nodes if is_opaque(n))
    node.meta.clear()
    gc.collect()
    assert is_random(node)
