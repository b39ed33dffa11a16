"""Hypothesis strategies: random models, captured ones, calls of any program, orders of passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import nn

import lensfx
from lensfx.errors import LensError
from lensfx.graph.program import Program
from lensfx.rewrite.pipeline import Pipeline
from lensfx.rewrite.rule import Pass
from lensfx.testing.calls import KINDS, call_of, sizes_of
from lensfx.testing.extra import hypothesis_for
from lensfx.testing.grammar import OPTIONS, Recipe

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["captured", "inputs_for", "models", "pipelines", "programs"]

# Sizes that no other size of a drawn model is equal to by accident.
EXAMPLE = (3, 5)


def models(*, only: Iterable[str] | None = None, **options: Any) -> SearchStrategy[Recipe]:
    """Recipes of random transformers; `recipe.build()` is the model, `recipe.inputs(2, 5)` a call.

    An option given by name is fixed to a value, or drawn from a list of them: `norm="rms"`,
    `heads=[2, 4]`. With `only=["norm", "head"]` no others are drawn; those stay plain. A failing
    recipe shrinks to a small and plain model that still fails, and its text makes it again.

    Raises: LensError for an unknown option, or if hypothesis is not installed.
    """
    st = hypothesis_for("models()").strategies
    known = {**OPTIONS, "seed": tuple(range(10))}
    wanted = tuple(known if only is None else only)
    for name in (*wanted, *options):
        if name not in known:
            raise LensError(f"models have no option {name!r}", hint=f"one of {', '.join(known)}")
    choices = {name: known[name] for name in wanted}
    choices |= {name: _choices(given) for name, given in options.items()}
    drawn = {name: st.sampled_from(values) for name, values in choices.items()}
    # Recipes of one model are one recipe, so that it is captured once.
    made = st.builds(Recipe, **drawn)
    return made.map(lambda recipe: recipe.plainest(options))  # type: ignore[no-any-return]


def _choices(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


@lru_cache(maxsize=512)
def captured(recipe: Recipe) -> Program:
    """The captured model of a recipe; the same recipe is captured once."""
    return lensfx.capture(recipe.build(), *recipe.inputs(*EXAMPLE))


def programs(*, only: Iterable[str] | None = None, **options: Any) -> SearchStrategy[Program]:
    """Captured random models, cached by their recipe; arguments as for `models`.

    Raises: LensError as `models` does.
    """
    st = hypothesis_for("programs()").strategies
    return st.builds(captured, models(only=only, **options))  # type: ignore[no-any-return]


def inputs_for(
    target: Any, *example: Any, **keywords: Any
) -> SearchStrategy[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls, as pairs of arguments and keywords, that a program or lens takes and that are hard.

    A module is captured on the example call first. Every size is within the guards, 1 included;
    token ids are drawn over the whole table; floats have the dtype and the scale of the example,
    with constant rows, zero rows, an outlier row or channel, or all of them tiny or large; masks
    leave at least one place of each row. Lists of them are `inputs` of `assert_equivalent`.

    Raises: LensError for what cannot be captured, or if hypothesis is not installed.
    """
    st = hypothesis_for("inputs_for()").strategies
    program = _program_of(target, example, keywords)
    sizes = {name: st.integers(low, high) for name, (low, high) in sizes_of(program).items()}
    return st.builds(  # type: ignore[no-any-return]
        lambda sizes, kind, seed: call_of(program, sizes, kind, seed),
        st.fixed_dictionaries(sizes),
        st.sampled_from(KINDS),
        st.integers(0, 2**16),
    )


def _program_of(target: Any, example: tuple[Any, ...], keywords: dict[str, Any]) -> Program:
    found = getattr(target, "program", target)
    if isinstance(found, Program):
        return found
    if not isinstance(target, nn.Module):
        raise LensError(
            f"{type(target).__name__} does not say how it is called",
            hint="give a program, a lens, or a module and an example call",
        )
    return lensfx.capture(target, *example, **keywords)


def pipelines(passes: Iterable[Pass] | None = None) -> SearchStrategy[Pipeline]:
    """Pipelines of some of the passes in any order that their `needs` allow.

    `passes` are those of `Pipeline.default()` if left out. Shrinks to few passes.

    Raises: LensError if hypothesis is not installed, PipelineError for what is not a pass.
    """
    st = hypothesis_for("pipelines()").strategies
    given = tuple(Pipeline.default().passes if passes is None else passes)
    for entry in given:
        Pipeline((entry,))
    # One draw for each pass and not a list of them: leaving one out leaves the others as they are.
    kept = st.tuples(*(st.booleans() for _ in given))
    ranks = st.tuples(*(st.integers(0, len(given)) for _ in given))

    def made(kept: tuple[bool, ...], ranks: tuple[int, ...]) -> Pipeline:
        order = sorted(range(len(given)), key=lambda i: (ranks[i], i))
        return Pipeline(_legal([given[i] for i in order if kept[i]]))

    return st.builds(made, kept, ranks)  # type: ignore[no-any-return]


def _legal(wanted: Sequence[Pass]) -> list[Pass]:
    """The passes as near to the wanted order as their needs allow.

    Raises: LensError if they need each other in a circle.
    """
    left, found = list(wanted), []
    while left:
        names = {p.name for p in left}
        ready = next((p for p in left if not names & set(p.needs) - {p.name}), None)
        if ready is None:
            raise LensError(f"these passes need each other: {', '.join(sorted(names))}")
        found.append(ready)
        left.remove(ready)
    return found
