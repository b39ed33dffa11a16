"""Random models out of a grammar, at random shapes: a capture is bitwise the model.

LENSFX_FUZZ=5000 draws that many, at random; without it a fixed set is drawn.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from models.compare import gradients, ran

from lensfx.capture import capture


def _grammar() -> ModuleType:
    # Tests are no package, and the grammar belongs to this folder alone.
    path = Path(__file__).with_name("grammar.py")
    spec = importlib.util.spec_from_file_location("fuzz_grammar", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


g = _grammar()
torch.set_num_threads(1)

MANY = int(os.environ.get("LENSFX_FUZZ", "0"))
recipes = st.builds(g.Recipe, **{k: st.sampled_from(v) for k, v in g.OPTIONS.items()})
sizes = st.tuples(st.integers(1, 3), st.integers(1, g.POSITIONS))


def check(recipe: Any, first: tuple[int, int], second: tuple[int, int]) -> None:
    model = g.build(recipe)
    program = capture(model, *g.inputs(recipe, *first, 0))
    assert program.guards.specialised == ()
    for size in (first, second):
        call = g.inputs(recipe, *size, 1), {}
        assert ran(program, call) == ran(model, call), f"{recipe} from {first} at {size}"
    weights = list(model.parameters())
    call = g.inputs(recipe, *second, 2), {}
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
@given(recipe=recipes, first=sizes, second=sizes)
@example(recipe=g.Recipe(), first=(1, 1), second=(2, 12))
def test_a_random_model_is_captured_bitwise(
    recipe: Any, first: tuple[int, int], second: tuple[int, int]
) -> None:
    check(recipe, first, second)


@pytest.mark.parametrize("option", g.OPTIONS)
def test_every_choice_of_the_grammar_makes_a_model(option: str) -> None:
    for choice in dict.fromkeys(g.OPTIONS[option]):
        recipe = g.Recipe(**{option: choice})
        model = g.build(recipe)
        for batch, length in [(1, 1), (2, g.POSITIONS)]:
            out = model(*g.inputs(recipe, batch, length, 0))
            leaves = torch.utils._pytree.tree_leaves(out)
            assert all(bool(leaf.isfinite().all()) for leaf in leaves), recipe
