"""Random models out of a grammar, at random shapes: a capture is bitwise the model.

LENSFX_FUZZ=5000 draws that many, at random; without it a fixed set is drawn.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from models.compare import gradients, ran

from lensfx.capture import capture
from lensfx.testing import Recipe, models
from lensfx.testing.grammar import OPTIONS, POSITIONS

torch.set_num_threads(1)

MANY = int(os.environ.get("LENSFX_FUZZ", "0"))
RICH = {"attention": "matmul", "mlp": "gelu", "norm": "layer", "head": "tied", "heads": 2}
sizes = st.tuples(st.integers(1, 3), st.integers(1, POSITIONS))


def check(recipe: Recipe, first: tuple[int, int], second: tuple[int, int]) -> None:
    model = recipe.build()
    program = capture(model, *recipe.inputs(*first, 0))
    assert program.guards.specialised == ()
    for size in (first, second):
        call = recipe.inputs(*size, 1), {}
        assert ran(program, call) == ran(model, call), f"{recipe} from {first} at {size}"
    weights = list(model.parameters())
    call = recipe.inputs(*second, 2), {}
    assert gradients(program, call, weights) == gradients(model, call, weights), f"{recipe}"


@settings(
    max_examples=MANY or 200,
    derandomize=not MANY,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
@given(recipe=models(), first=sizes, second=sizes)
@example(recipe=Recipe(**RICH, bias=True), first=(1, 1), second=(2, 12))
def test_a_random_model_is_captured_bitwise(
    recipe: Recipe, first: tuple[int, int], second: tuple[int, int]
) -> None:
    check(recipe, first, second)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_choice_of_the_grammar_makes_a_model(option: str) -> None:
    for choice in dict.fromkeys(OPTIONS[option]):
        for plain in ({}, RICH):
            recipe = Recipe(**{**plain, option: choice})
            model = recipe.build()
            for batch, length in [(1, 1), (2, POSITIONS)]:
                out = model(*recipe.inputs(batch, length, 0))
                leaves = torch.utils._pytree.tree_leaves(out)
                assert all(bool(leaf.isfinite().all()) for leaf in leaves), recipe
