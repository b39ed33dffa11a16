"""The strategies: what they draw is legal, pasteable, the same in every CI run, and shrinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm, FoldNorm
from models import CASES

import lensfx
from lensfx.testing import (
    Recipe,
    assert_equivalent,
    captured,
    inputs_for,
    models,
    pipelines,
    programs,
)
from lensfx.testing.grammar import OPTIONS
from lensfx.verify import UpToLogitShift, prove

FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(models())
def test_the_text_of_a_recipe_makes_it_again(recipe: Recipe) -> None:
    again = eval(repr(recipe), {"Recipe": Recipe, "torch": torch})
    assert again == recipe
    left, right = recipe.build(), again.build()
    assert not left.training
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_parameter_is_left_where_it_starts() -> None:
    recipe = Recipe(attention="sinks", mlp="experts_shared", norm="layer", bias=True, head="biased")
    state = torch.random.get_rng_state()
    for name, parameter in recipe.build().named_parameters():
        assert not bool((parameter == 1).any()), name
        assert parameter.numel() < 4 or bool((parameter < 0).any()), name
    assert torch.equal(torch.random.get_rng_state(), state)


def test_options_are_fixed_or_drawn_from() -> None:
    @settings(FEW, max_examples=10)
    @given(models(norm="rms", heads=[2, 4]))
    def check(recipe: Recipe) -> None:
        assert recipe.norm == "rms"
        assert recipe.heads in (2, 4)

    check()
    two = {repr(r) for r in drawn(models(only=["bias"], head="untied", norm="layer"), 9)}
    assert two == {
        "Recipe(norm='layer', head='untied')",
        "Recipe(norm='layer', head='untied', bias=True)",
    }
    with pytest.raises(lensfx.LensError, match="models have no option 'depth'"):
        models(depth=3)


@FEW
@given(models())
def test_recipes_of_one_model_are_one_recipe(recipe: Recipe) -> None:
    assert recipe.plainest() == recipe
    for option in ("heads", "projection", "hidden", "order", "layers", "residual", "bias"):
        other = replace(recipe, **{option: OPTIONS[option][-1]})
        if other.plainest() == recipe:
            left, right = (r.build()(*recipe.inputs(2, 4)) for r in (recipe, other))
            torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wanted", "smallest"),
    [
        (lambda r: r.norm.startswith("layer"), "Recipe(norm='layer')"),
        (lambda r: r.kv_heads < r.heads, "Recipe(attention='matmul', heads=2, groups=2)"),
        (lambda r: r.mlp.startswith("experts") and r.bias, "Recipe(mlp='experts', bias=True)"),
    ],
)
def test_a_model_shrinks_to_the_plainest(wanted: Any, smallest: str) -> None:
    assert repr(find(models(), wanted, settings=settings(FEW, max_examples=500))) == smallest


def shown(strategy: st.SearchStrategy[Any]) -> list[str]:
    found: list[str] = []

    @settings(settings.get_profile("lensfx-ci"), max_examples=15)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(str(value))

    collect()
    return found


def test_two_runs_under_the_ci_profile_draw_the_same() -> None:
    profile = settings.get_profile("lensfx-ci")
    assert profile.derandomize
    assert profile.print_blob
    assert profile.deadline is None
    assert profile.max_examples == 50
    assert settings.get_profile("lensfx-nightly").max_examples == 2000
    program = captured(Recipe(mask="padding", attention="sdpa"))
    for strategy in (models(), pipelines(), inputs_for(program)):
        assert shown(strategy) == shown(strategy)


@FEW
@given(pipelines())
def test_pipelines_are_legal(pipeline: lensfx.Pipeline) -> None:
    # A Pipeline that is not legal cannot be made; here, that they are not all in one order.
    default = [type(p) for p in lensfx.Pipeline.default().passes]
    assert all(type(p) in default for p in pipeline.passes)


def test_pipelines_come_in_every_order_and_size() -> None:
    def names(pipeline: lensfx.Pipeline) -> list[str]:
        return [p.name for p in pipeline.passes]

    more = settings(FEW, max_examples=2000, phases=[Phase.generate])
    one, two = CanonicalNorm().name, CanonicalLinear().name
    for order in ([one, two], [two, one]):
        find(pipelines(), lambda p, order=order: names(p)[:2] == order, settings=more)
    every = len(lensfx.Pipeline.default().passes)
    find(pipelines(), lambda p: len(p.passes) == every, settings=more)
    assert find(pipelines(), lambda p: "fold-norm" in names(p)).passes == (FoldNorm(),)
    with pytest.raises(lensfx.PipelineError, match="is not a pass"):
        pipelines([object()])  # type: ignore[list-item]


@settings(FEW, max_examples=12)
@given(programs(), pipelines(), st.data())
def test_drawn_programs_are_proved_under_drawn_pipelines(
    program: lensfx.Program, pipeline: lensfx.Pipeline, data: st.DataObject
) -> None:
    rewritten = pipeline.run(program)
    assert prove(rewritten).worst < 1e-12
    call = data.draw(inputs_for(program))
    assert_equivalent(program, rewritten, up_to=UpToLogitShift(), inputs=[call])


@settings(FEW, max_examples=6)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_calls_of_any_captured_model_are_accepted(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(2, 5, 0)
    program = lensfx.capture(case.build(), *args, **kwargs)
    call = data.draw(inputs_for(program))
    program(*call[0], **call[1])


def test_calls_go_to_the_ends() -> None:
    program = captured(Recipe(mask="padding", attention="sdpa", positions="learned"))
    calls = [c for c, _ in drawn(inputs_for(program), 150)]
    assert {ids.shape[0] for ids, _ in calls} >= {1, 2}
    assert {ids.shape[1] for ids, _ in calls} >= {1, 8}
    assert {int(i) for ids, _ in calls for i in ids.flatten()} == set(range(13))
    assert all(mask.any(-1).all() for _, mask in calls)
    assert any(not mask.all() for _, mask in calls)


def test_floats_are_hard_and_of_the_model_s_dtype() -> None:
    linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    calls = [c[0] for c, _ in drawn(inputs_for(linear, torch.randn(2, 3, 4).bfloat16()), 100)]
    assert {x.dtype for x in calls} == {torch.bfloat16}
    assert any(bool((x == x[..., :1]).all()) for x in calls)
    assert any(bool((x[0, 0] == 0).all()) for x in calls)
    assert any(float(x.abs().max()) > 100 for x in calls)
    assert any(float(x.abs().max()) < 0.01 for x in calls)
    with pytest.raises(lensfx.LensError, match="function does not say how it is called"):
        inputs_for(lambda x: x)


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    found: list[Any] = []

    @settings(FEW, max_examples=count, derandomize=True)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def test_a_failing_program_is_shown_as_what_makes_it_again() -> None:
    @settings(FEW, phases=[Phase.generate, Phase.shrink], max_examples=50)
    @given(programs(norm=["none", "rms"]))
    def check(program: lensfx.Program) -> None:
        assert not any("norm.weight" in name for name in program.tensors)

    with pytest.raises(AssertionError) as error:
        check()
    notes = "\n".join(error.value.__notes__)
    assert "captured(Recipe(norm='rms'))" in notes
