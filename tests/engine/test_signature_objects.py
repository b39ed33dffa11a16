"""Objects among the arguments are compared by what they hold: what differs is another call."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx.capture import capture
from lensfx.errors import GuardError

torch.set_num_threads(1)


class Calls(nn.Module):
    """A module with the signature of the function it is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = types.MethodType(function, self)


A, X = (torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2))


def test_objects_that_cannot_be_compared_pass_only_as_themselves() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ValueError("no")

    model, odd = Calls(lambda self, x, setting: x * 2), Odd()
    program = capture(model, A, odd)
    assert torch.equal(program(X, odd), X * 2)
    with pytest.raises(GuardError, match="values of type Odd cannot be compared: no"):
        program(X, Odd())


class Slotted:
    __slots__ = ("gain", "more")

    def __init__(self, gain: float, *more: Any) -> None:
        self.gain = gain
        if more:
            self.more = more


class Mixed(Slotted):
    """Slots of a base, and a dictionary."""

    def __init__(self, gain: float, extra: Any) -> None:
        super().__init__(gain)
        self.extra = extra


CONSTANTS: list[Any] = [
    (lambda: Slotted(2.0), lambda: Slotted(3.0)),
    (lambda: Slotted(2.0), lambda: Slotted(2.0, 1)),
    (lambda: Slotted(2.0, Slotted(0.0)), lambda: Slotted(2.0, Slotted(-0.0))),
    (lambda: Slotted(2.0, [Slotted(1.0)]), lambda: Slotted(2.0, [Slotted(2.0)])),
    (lambda: Mixed(2.0, {"k": Slotted(1.0)}), lambda: Mixed(2.0, {"k": Slotted(5.0)})),
    (lambda: Mixed(2.0, 1), lambda: Mixed(4.0, 1)),
    (lambda: functools.partial(pow, 2.0), lambda: functools.partial(pow, 3.0)),
    (lambda: ValueError("a", Slotted(1.0)), lambda: ValueError("a", Slotted(2.0))),
]


@pytest.mark.parametrize(("one", "other"), CONSTANTS)
def test_objects_are_compared_by_all_they_hold(one: Any, other: Any) -> None:
    program = capture(Calls(lambda self, x, setting: x * 2), A, one())
    assert torch.equal(program(X, one()), X * 2)
    assert torch.equal(program(X, copy.deepcopy(one())), X * 2)
    with pytest.raises(GuardError, match=r"setting was .* at capture"):
        program(X, other())
    program = capture(Calls(lambda self, x, setting: x * 2), A, other())
    with pytest.raises(GuardError, match=r"setting was .* at capture"):
        program(X, one())


def test_an_object_with_slots_is_captured_once() -> None:
    lens = lensfx.wrap(Calls(lambda self, x, o: x * o.gain), A, Slotted(2.0), passes=None)
    for gain in (2.0, 3.0, 2.0, 3.0):
        assert torch.equal(lens(X, Slotted(gain)), X * gain)
    assert len(lens.programs) == 2


def test_an_object_in_itself_is_compared_as_far_as_it_goes() -> None:
    def ring(gain: float) -> Mixed:
        made = Mixed(gain, None)
        made.extra = [made]
        return made

    program = capture(Calls(lambda self, x, o: x * o.gain), A, ring(2.0))
    assert torch.equal(program(X, ring(2.0)), X * 2)
    with pytest.raises(GuardError, match=r"o was .* at capture"):
        program(X, ring(3.0))


def test_functions_and_locks_pass_only_as_themselves() -> None:
    def double(value: Tensor) -> Tensor:
        return value * 2

    program = capture(Calls(lambda self, x, f: f(x)), A, double)
    assert torch.equal(program(X, double), X * 2)
    with pytest.raises(GuardError, match=r"f was .* at capture"):
        program(X, lambda value: value * 3)
