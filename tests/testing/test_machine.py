"""The state machine finds passes that are wrong, and passes that are wrong in one order only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import lensfx
from lensfx.rewrite import Any as Whatever
from lensfx.rewrite import Const, Edit, Match, Maybe, Op, Param, Pass, Rule
from lensfx.testing import pass_machine, programs
from lensfx.verify import Exact, UpToLogitShift

aten = torch.ops.aten

LINEAR = Op(
    "linear",
    (aten.linear.default,),
    {"input": Whatever("x"), "weight": Param("W", axes=2), "bias": Maybe(Param("b"))},
    readers=1,
)


def has_bias(m: Match) -> str | None:
    return "" if m.b is None else None


def take_bias_out(m: Match, edit: Edit) -> None:
    at = edit.before(m.linear)
    bare = at.call(aten.linear.default, m.x, m.W)
    at.replace(m.linear, at.call(aten.add.Tensor, bare, m.b))


@dataclass(frozen=True)
class BiasOut(Pass):
    """linear(x; W, b)  =  linear(x; W) + b"""

    rules = (Rule(LINEAR, has_bias, take_bias_out),)
    contract = Exact()


PLUS = Op("add", (aten.add.Tensor,), {"self": LINEAR, "other": Param("shift")})
DOUBLED = Op("mul", (aten.mul.Tensor,), {"self": LINEAR, "other": Const("c")})
DOUBLED_PLUS = Op("mul", (aten.mul.Tensor,), {"self": PLUS, "other": Const("c")})


def always(m: Match) -> str | None:
    return None


def scale_linear(m: Match, edit: Edit) -> None:
    at = edit.before(m.mul)
    W = at.call(aten.mul.Tensor, m.W, m.c)
    b = None if m.b is None else at.call(aten.mul.Tensor, m.b, m.c)
    at.replace(m.mul, at.call(aten.linear.default, m.x, W, b))


def scale_forgetful(m: Match, edit: Edit) -> None:
    """Looks through the add and leaves its shift as it was."""
    at = edit.before(m.mul)
    made = at.call(aten.linear.default, m.x, at.call(aten.mul.Tensor, m.W, m.c))
    edit.before(m.mul).replace(m.mul, at.call(aten.add.Tensor, made, m.shift))


@dataclass(frozen=True)
class ScaleIn(Pass):
    """c * linear(x; W, b)  =  linear(x; c*W, c*b), and wrong about a bias that stands outside."""

    rules = (
        Rule(DOUBLED, always, scale_linear),
        Rule(DOUBLED_PLUS, always, scale_forgetful),
    )
    contract = Exact()


def drop_bias(m: Match, edit: Edit) -> None:
    edit.before(m.linear).set(m.linear, bias=None)


@dataclass(frozen=True)
class DropBias(Pass):
    """linear(x; W, b)  is not  linear(x; W)"""

    rules = (Rule(LINEAR, has_bias, drop_bias),)
    contract = Exact()


FEW = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
    stateful_step_count=5,
)
# Few models, so that few are captured; their branch is a linear op times a number, where both toys
# have something to do.
BIASES = [False, True]
SCALED = programs(only=(), mlp="gelu", bias=BIASES, residual="constant")
HEADS = programs(only=(), head=["untied", "biased"])


def found(machine: Any) -> str:
    with pytest.raises((AssertionError, lensfx.ContractError)) as error:
        run_state_machine_as_test(machine, settings=settings(FEW, max_examples=500))
    return "\n".join([str(error.value), *error.value.__notes__])


def steps_of(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("state.")]
    return [line for line in lines if not line.startswith("state.equivalent")]


def test_a_wrong_pass_is_found_on_the_smallest_model() -> None:
    some = programs(only=["norm", "head", "bias"])
    text = found(pass_machine((DropBias(), BiasOut()), programs=some))
    assert "not equivalent under exact: output" in text
    start, *steps = steps_of(text)
    assert steps == ["state.run_drop_bias()", "state.teardown()"]
    assert start == "state.start(program=captured(Recipe(head='biased')))"


def test_an_order_that_is_wrong_is_found_and_nothing_else_is_run() -> None:
    toys = (BiasOut(), ScaleIn(), lensfx.Pipeline.default().passes[0])
    start, *steps = steps_of(found(pass_machine(toys, programs=SCALED)))
    assert steps == ["state.run_bias_out()", "state.run_scale_in()", "state.teardown()"]
    assert start == (
        "state.start(program=captured(Recipe(mlp='gelu', bias=True, residual='constant')))"
    )


@pytest.mark.parametrize("entry", [BiasOut(), ScaleIn()], ids=lambda p: p.name)
def test_each_of_the_two_is_right_alone(entry: Any) -> None:
    machine = pass_machine((entry,), programs=SCALED)
    run_state_machine_as_test(machine, settings=settings(FEW, max_examples=8))


def test_the_default_passes_are_right_in_every_order() -> None:
    run_state_machine_as_test(pass_machine(), settings=settings(FEW, max_examples=5))


def test_a_contract_may_be_asked_for_that_the_passes_do_not_keep() -> None:
    run_state_machine_as_test(
        pass_machine(programs=HEADS, contract=UpToLogitShift()),
        settings=settings(FEW, max_examples=4),
    )
    text = found(pass_machine(programs=HEADS, contract=Exact()))
    assert "run_center_unembed()" in text


def test_rules_stand_for_passes_and_keep_to_their_order() -> None:
    @dataclass(frozen=True)
    class Later(BiasOut):
        needs = ("bias-out",)

    machine = pass_machine((BiasOut(), Later(), BiasOut()), programs=HEADS)
    names = {name for name in vars(machine) if name.startswith("run_")}
    assert names == {"run_bias_out", "run_later", "run_bias_out_2"}
    run_state_machine_as_test(machine, settings=settings(FEW, max_examples=4))
