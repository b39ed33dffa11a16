"""Right runs: random models under random pipelines of the shipped passes, proved in full."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from lensfx import Pipeline, Program, capture, passes
from lensfx.errors import ContractError, PipelineError
from lensfx.rewrite import Pass
from lensfx.testing.grammar import OPTIONS, Recipe
from lensfx.verify import prove

__all__ = ["Alarm", "right_runs"]

# Pipelines tried on each model: a capture costs more than a proof.
EACH = 5


@dataclass(frozen=True)
class Alarm:
    """A right run that the proof called wrong: the model, the passes, and what it said."""

    recipe: str
    passes: tuple[str, ...]
    text: str


def right_runs(count: int, seed: int = 0) -> Iterator[Alarm | None]:
    """`count` proofs of random runs; None for each that raised no alarm."""
    source = random.Random(seed)
    done = 0
    while done < count:
        recipe = Recipe(**{name: source.choice(values) for name, values in OPTIONS.items()})
        program = capture(recipe.build(), *recipe.inputs(3, 5))
        for _ in range(min(EACH, count - done)):
            done += 1
            yield _run(program, recipe, chosen(source), source.randrange(1000))


def _run(program: Program, recipe: Recipe, wanted: tuple[Pass, ...], seed: int) -> Alarm | None:
    names = tuple(p.name for p in wanted)
    try:
        proved = prove(Pipeline(wanted).run(program), seed)
    except ContractError as error:
        return Alarm(str(recipe), names, str(error))
    worst = max(proved.worst, proved.gradient or 0.0)
    return None if worst < 1e-6 else Alarm(str(recipe), names, f"worst {worst:.1e}")


def chosen(source: random.Random) -> tuple[Pass, ...]:
    """Some of the passes that need no options, in a random order that their `needs` allow."""
    pool = plain()
    left = source.sample(pool, source.randint(1, len(pool)))
    found: list[Pass] = []
    while left:
        names = {p.name for p in left}
        ready = next(p for p in left if not names & (set(p.needs) - {p.name}))
        found.append(ready)
        left.remove(ready)
    return tuple(found)


def plain() -> list[Pass]:
    """Every shipped pass as it is without options."""
    found = []
    for name in passes.__all__:
        try:
            found.append(getattr(passes, name)())
        except (TypeError, PipelineError):
            # It has to be told what to do.
            continue
    return found
