"""The levels of the proof: fast on two calls, full over all of them and with gradients."""

from __future__ import annotations

import operator
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import FoldScale, Once, Sketch
from models import CASES
from torch import fx, nn

import lensfx
from lensfx import ContractError, LensError, Pipeline, PipelineError, Program, capture
from lensfx.rewrite import Any as AnyNode
from lensfx.rewrite import Edit, Match, Op
from lensfx.verify import AtExample, Exact, Float64, UpToLogitShift, prove
from lensfx.verify.inputs import scenarios, seeded
from lensfx.verify.values import Values

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
TANH = Op("tanh", (aten.tanh.default,), {"self": AnyNode("x")})
NAMES = ["nanogpt", "llamalike_offset", "xt_decoder"]


def case(name: str, dtype: torch.dtype = torch.float32) -> Program:
    args, kwargs = CASES[name].inputs(2, 7, 0)
    model = CASES[name].build().to(dtype)
    return Pipeline.default().run(capture(model, *args, **kwargs))


@dataclass(frozen=True)
class Fold(FoldScale):
    contract = Exact()


@dataclass(frozen=True)
class Tanh(Once):
    """A pass that puts something in the place of every tanh."""

    contract = Exact()


def chain(count: int = 3, width: int = 8) -> Program:
    s = Sketch()
    x = s.input("x", "B", width)
    for i in range(count):
        x = s.call(
            aten.linear.default, x, s.weight(f"{i}.W", width, width), s.weight(f"{i}.b", width)
        )
        x = s.call(aten.tanh.default, x, path=f"t{i}")
    return s.done(s.call(aten.add.Tensor, x, x))


def changed(rewrite: Any, place: int = 0, contract: Any = None) -> Program:
    name = "tanh" + (f"_{place}" if place else "")

    def planted(m: Match, edit: Edit) -> None:
        at = edit.before(m.tanh)
        same = at.call(aten.tanh.default, m.x)
        at.replace(m.tanh, rewrite(at, same) if m.tanh.name == name else same)

    kind = type("Tanh", (Tanh,), {"contract": contract}) if contract else Tanh
    return Pipeline([kind(pattern=TANH, rewrite=planted)]).rewrite(chain())


# the levels


@pytest.mark.parametrize("name", NAMES)
def test_fast_makes_two_calls_and_full_all_of_them(name: str) -> None:
    program = case(name)
    fast, full = (prove(program, level=level) for level in ("fast", "full"))
    assert (fast.level, full.level) == ("fast", "full")
    assert [p.name for p in fast.passes] == [p.name for p in full.passes]
    assert {p.calls for p in fast.passes} == {2}
    assert all(p.calls >= 4 for p in full.passes)
    assert fast.gradient is None
    assert {p.gradient_error for p in fast.passes} == {None}
    assert full.gradient is not None
    assert max(fast.worst, full.worst, full.gradient) <= 1e-12
    assert all(p.gradient_error is not None for p in full.passes)
    assert (fast.drift, fast.folded) == (full.drift, full.folded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_in_other_dtypes(dtype: torch.dtype) -> None:
    assert (prove(case("nanogpt", dtype)).gradient or 1.0) <= 1e-12


def test_a_level_that_there_is_not() -> None:
    with pytest.raises(LensError, match="level='quick' is unknown\n  try: level='fast'"):
        prove(chain(), level="quick")  # type: ignore[arg-type]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x)).softmax(-1)


@pytest.mark.parametrize(
    ("verify", "level"), [("fast", "fast"), (True, "fast"), ("full", "full"), (False, None)]
)
def test_wrap_takes_the_level(verify: Any, level: str | None) -> None:
    x = torch.randn(3, 6)
    lens = lensfx.wrap(Normed(), x, verify=verify)
    proved = lens.report.equivalence
    assert (None if proved is None else proved.level) == level
    assert ("gradient error" in str(lens.report)) == (level == "full")
    assert lensfx.verify.prove(lens.program, level="full").gradient is not None
    assert lensfx.wrap(Normed(), x).report.equivalence.level == "fast"  # type: ignore[union-attr]
    # A call of another kind is proved as the first one was.
    other = lens._variants.anew((torch.randn(2, 3, 6),), {}, lens.program.mode)[0].report
    assert (None if other.equivalence is None else other.equivalence.level) == level


@pytest.mark.parametrize("verify", ["quick", None, 1.5, 2, []])
def test_a_verify_that_there_is_not(verify: Any) -> None:
    with pytest.raises(PipelineError, match="verify='fast', verify='full' or verify=False"):
        lensfx.wrap(Normed(), torch.randn(3, 6), verify=verify)


# gradients


def test_a_detached_value_shows_in_no_value_and_in_the_gradient() -> None:
    program = changed(lambda at, y: at.call(aten.detach.default, y), 1)
    assert prove(program, level="fast").worst == 0.0
    with pytest.raises(ContractError) as caught:
        prove(program)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("tanh broke its contract exact: the gradient at ")
    assert second.strip().startswith("at %tanh_1  t1  model.py:7")
    assert "torch.autograd.grad" in caught.value.script


def test_a_gradient_of_another_size_at_the_same_value() -> None:
    def bent(at: Any, y: fx.Node) -> fx.Node:
        still = at.call(aten.detach.default, y)
        return at.call(aten.add.Tensor, y, at.call(aten.sub.Tensor, y, still), alpha=1e-9)

    with pytest.raises(ContractError, match="the gradient at"):
        prove(changed(bent, 2))


def test_what_holds_at_the_example_has_no_gradient_to_keep() -> None:
    program = changed(lambda at, y: at.call(aten.detach.default, y), 1, AtExample())
    proved = prove(program)
    assert (proved.worst, proved.gradient) == (0.0, None)


def test_a_shift_of_the_logits_has_no_gradient_along_it() -> None:
    def shifted(at: Any, y: fx.Node) -> fx.Node:
        return at.call(aten.sub.Tensor, y, at.call(aten.mean.dim, y, [-1], True))

    s = Sketch()
    x = s.call(aten.linear.default, s.input("x", "B", 8), s.weight("W", 8, 8))
    before = s.done(s.call(aten.tanh.default, x))

    @dataclass(frozen=True)
    class Shift(Once):
        contract = UpToLogitShift()

    def planted(m: Match, edit: Edit) -> None:
        at = edit.before(m.tanh)
        y = shifted(at, at.call(aten.tanh.default, m.x))
        at.replace(m.tanh, y)
        edit.keeps(y, up_to=-1)
        edit.remark("the only output", shifted=[0])

    after = Pipeline([Shift(pattern=TANH, rewrite=planted)]).rewrite(before)
    assert (prove(after).gradient or 0.0) <= 1e-12


def test_an_operator_without_a_derivative_is_not_measured() -> None:
    s = Sketch()
    x = s.call(aten.tanh.default, s.input("x", "B", 8))
    program = s.done(s.call(aten.nextafter.default, x, x))
    after = Pipeline([Tanh(pattern=TANH, rewrite=same)]).rewrite(program)
    assert prove(after).gradient in (None, 0.0)


def same(m: Match, edit: Edit) -> None:
    at = edit.before(m.tanh)
    at.replace(m.tanh, at.call(aten.tanh.default, m.x))


# float64 without modes


@pytest.mark.parametrize("name", [*NAMES, "moe"] if "moe" in CASES else NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_widened_graph_computes_what_the_oracle_does(name: str, dtype: torch.dtype) -> None:
    base = case(name, dtype).unfolded
    assert base is not None
    run = Values(base.graph)
    assert run.can_be_differentiated
    for scenario in scenarios(base):
        with seeded(), torch.no_grad(), Float64(dtype=scenario.dtype) as oracle:
            reference = oracle.read(run._run(scenario, None)).outputs
        for a, b in zip(run(scenario).outputs, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_bits_read_as_another_dtype_are_left_to_the_oracle() -> None:
    s = Sketch()
    y = s.call(aten.view.dtype, s.input("x", "B", 8), torch.int32)
    run = Values(s.done(y).graph)
    assert not run.can_be_differentiated


# conditioning


def test_what_the_model_amplifies_itself_is_allowed_and_no_more() -> None:
    def cancelled(factor: float) -> Program:
        s = Sketch()
        x = s.input("x", "B", 8)
        t = s.call(aten.tanh.default, x)
        big = s.call(aten.add.Tensor, t, 3e4)
        return _scaled(s.done(s.call(aten.sub.Tensor, big, 3e4)), factor)

    proved = prove(cancelled(1 + 5e-13))
    assert 1e-14 < proved.worst < 1e-8
    with pytest.raises(ContractError):
        prove(cancelled(1 + 1e-7))


def _scaled(before: Program, factor: float) -> Program:
    def planted(m: Match, edit: Edit) -> None:
        at = edit.before(m.tanh)
        half = at.call(aten.mul.Tensor, at.call(aten.tanh.default, m.x), factor)
        at.replace(m.tanh, half)

    program = Pipeline([Tanh(pattern=TANH, rewrite=planted)]).rewrite(before)
    silent = tuple(replace(e, sites=()) for e in program.stages[1].rewrites)
    return replace(program, stages=(program.stages[0], replace(program.stages[1], rewrites=silent)))


# scripts


FAULTY = {
    "value": lambda at, y: at.call(aten.mul.Tensor, y, 1 + 1e-9),
    "infinite": lambda at, y: at.call(aten.mul.Tensor, y, float("inf")),
    "gradient": lambda at, y: at.call(aten.detach.default, y),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_the_saved_script_fails_as_the_proof_did(fault: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError) as caught:
        prove(changed(FAULTY[fault], 1))
    assert "save('repro.py')" in caught.value.hint
    path = tmp_path / "repro.py"
    path.write_text("was here")
    caught.value.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["repro.py"]
    assert path.read_text() == caught.value.script
    # Nothing but the guilty operator and what replaced it.
    functions = caught.value.script.partition("def before")[2].partition("a, b =")[0]
    assert 1 <= functions.count("aten.tanh.default") <= 2
    assert "aten.linear" not in functions
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("AssertionError: relative error ")


def test_a_script_of_a_pass_that_only_looks(tmp_path: Path) -> None:
    from lensfx.verify import Observes

    with pytest.raises(ContractError) as caught:
        prove(changed(lambda at, y: at.call(aten.mul.Tensor, y, 1.0 + 1e-6), 2, Observes()))
    caught.value.save(tmp_path / "repro.py")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "repro.py")], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "AssertionError: these must have the same bits"


def test_a_right_rewrite_has_no_script_and_an_error_without_one_saves_nothing(
    tmp_path: Path,
) -> None:
    assert prove(changed(lambda at, y: y)).worst == 0.0
    error = ContractError("they differ")
    with pytest.raises(LensError, match="this error has no script"):
        error.save(tmp_path / "repro.py")
    assert not list(tmp_path.iterdir())
    assert operator.not_(error.script)
