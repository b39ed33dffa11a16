"""The order of passes: declared where it matters, free where it does not."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from models import CASES

from lensfx import Pipeline, PipelineError, Program, capture
from lensfx import passes as p
from lensfx.graph import graph_text
from lensfx.rewrite import Pass
from lensfx.verify import prove

FORMS = (p.CanonicalLinear(), p.CanonicalNorm())
MODELS = ("nanogpt", "llamalike", "hf_bert")
ALL: tuple[Pass, ...] = tuple(
    getattr(p, name)() for name in p.__all__ if name not in ("InsertHooks", "FreezeNorm")
)
PAIRS = {f"{a.name}, {b.name}": (a, b) for a, b in combinations(ALL, 2)}


def is_free(a: Pass, b: Pass) -> bool:
    return a.name not in b.needs and b.name not in a.needs


@cache
def captured(name: str) -> Program:
    case = CASES[name]
    args, kwargs = case.inputs(2, 7, 0)
    return capture(case.build(), *args, **kwargs)


def forms(*passes: Pass) -> tuple[Pass, ...]:
    """The canonical forms that these passes stand behind, where they are none themselves."""
    names = {entry.name for entry in passes}
    return tuple(form for form in FORMS if form.name not in names)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pair", [k for k, (a, b) in PAIRS.items() if is_free(a, b)])
def test_passes_whose_order_is_free_commute(pair: str, name: str) -> None:
    a, b = PAIRS[pair]
    first = forms(a, b)
    one = Pipeline((*first, a, b)).run(captured(name))
    other = Pipeline((*first, b, a)).run(captured(name))
    assert settled(one) == settled(other)


def settled(program: Program) -> str:
    """The text of a graph whose nodes are in an order that follows from the graph alone."""
    return graph_text(program.graph)


@pytest.mark.parametrize("pair", [k for k, (a, b) in PAIRS.items() if not is_free(a, b)])
def test_a_declared_order_is_enforced(pair: str) -> None:
    a, b = PAIRS[pair]
    first, second = (a, b) if a.name in b.needs else (b, a)
    with pytest.raises(PipelineError, match=f"{second.name} stands before {first.name}"):
        Pipeline((second, first))
    program = Pipeline((*forms(first, second), first, second)).run(captured("nanogpt"))
    assert prove(program).worst <= 1e-12


def test_no_two_passes_need_each_other() -> None:
    done: list[str] = []
    waiting = list(ALL)
    while waiting:
        ready = [e for e in waiting if not {w.name for w in waiting} & set(e.needs)]
        assert ready, [e.name for e in waiting]
        done += [e.name for e in ready]
        waiting = [e for e in waiting if e not in ready]
    assert len(done) == len(ALL)
