"""The report says what fired, what did not and why, in data and in print."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from models import CASES
from rich.console import Console
from torch import nn

import lensfx
from lensfx import passes as p
from lensfx.report import Report
from lensfx.rewrite import PassReport, Refusal


def wrapped(name: str, verify: bool) -> lensfx.Lens:
    args, kwargs = CASES[name].inputs(2, 7, 0)
    return lensfx.wrap(CASES[name].build(), *args, verify=verify, **kwargs)


@pytest.fixture(scope="module")
def proved() -> lensfx.Lens:
    """A model whose last norm is returned: four norms are folded and one is not."""
    return wrapped("norm_returned", True)


@pytest.fixture(scope="module")
def refused() -> lensfx.Lens:
    """A model whose norms are all added to something but the last, so that they stay."""
    return wrapped("norm_residual", False)


def test_passes_are_found_by_class_name(proved: lensfx.Lens) -> None:
    found = proved.report.passes
    assert list(found) == [type(q).__name__ for q in lensfx.Pipeline.default().passes]
    assert [e.path for e in found["FoldNorm"].fired] == [
        "blocks.1.norm2", "blocks.1.norm1", "blocks.0.norm2", "blocks.0.norm1"
    ]  # fmt: skip
    assert found["CanonicalLinear"].fired == ()
    hooks = {entry.note for entry in found["InsertHooks"].fired}
    # What is computed only where it is asked for needs no node. The folded norms are bare.
    parts = (
        "scale",
        "_input",
        "attn_in",
        "scores",
        "pattern",
        "result",
        "ln_final.hook_normalized",
    )
    assert hooks == {n for n in proved.hook_names if "hook_" in n and not n.endswith(parts)}


def test_a_refusal_says_where_why_and_because_of_what(refused: lensfx.Lens) -> None:
    folds = refused.report.passes["FoldNorm"]
    assert [e.path for e in folds.fired] == ["norm"]
    places = {r.path: r for r in folds.refused}
    assert set(places) == {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}
    first = places["blocks.0.norm1"]
    words = "%add_1 also adds it to the stream %linear_3; only linear readers can absorb the gain"
    assert first.reason == words
    assert first.blame.startswith("%add_1  blocks.0  oddities.py:")
    assert first.blame.endswith("x = h + self.attn(h, mask)")
    assert refused.report.passes["InsertHooks"].refused == ()


def test_a_model_without_a_stream_says_so() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 9))
    found = lensfx.wrap(model, torch.arange(6).view(2, 3), verify=False).report
    (refusal,) = found.passes["InsertHooks"].refused
    assert refusal.reason.startswith("no hook points on blocks: no residual stream leads to")
    assert "no residual stream leads to an output" in str(found)


def test_the_print_shows_passes_figures_and_refusals(
    proved: lensfx.Lens, refused: lensfx.Lens
) -> None:
    text = str(proved.report)
    assert "captured NormReturningDecoder" in text
    for name, report in proved.report.passes.items():
        line = next(line for line in text.splitlines() if f"│ {name} " in line)
        assert f" {len(report.fired)} " in line
    assert proved.report.equivalence is not None
    assert f"{proved.report.equivalence.worst:.1e} relative" in text
    assert "x the model's own rounding noise" in text
    assert "ids.size(0) >= 1" in text
    assert f"{proved.report.parameters:,}" in text
    told = str(refused.report)
    assert "left alone, and why" in told
    assert "only linear readers" in " ".join(told.split())
    assert "blocks.0.norm1" in told
    assert "rounding noise" not in told


def test_hook_points_are_not_counted_as_operators(proved: lensfx.Lens) -> None:
    native = [n for n in proved.hook_names if "hook_" not in n]
    assert len(native) <= proved.report.operators < len(native) + 15


def test_every_way_to_print_it_is_the_same_and_narrow(proved: lensfx.Lens) -> None:
    file = io.StringIO()
    Console(file=file, width=110, color_system=None).print(proved.report)
    assert file.getvalue() == str(proved.report) == repr(proved.report)
    assert max(map(len, str(proved.report).splitlines())) <= 110
    assert len(repr(proved)) < 100


def test_a_narrow_terminal_loses_no_word(refused: lensfx.Lens) -> None:
    file = io.StringIO()
    Console(file=file, width=60, color_system=None).print(refused.report)
    assert "…" not in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) <= 60


def test_source_lines_are_shown_as_they_are(proved: lensfx.Lens) -> None:
    """Rich would take these for markup: a style, the end of a style, an emoji."""
    odd = Refusal("embedding", "emb[ids]", "it is [bold] and [/x]", "tok[ids] + pos[:a:b] :cat:")
    program = replace(proved.program, reports=(PassReport("fold-norm", refused=(odd,)),))
    text = str(Report.of(program))
    for part in ("emb[ids]", "[bold]", "[/x]", "tok[ids] + pos[:a:b] :cat:"):
        assert part in text


def test_long_lists_of_refusals_are_cut_and_say_so(proved: lensfx.Lens) -> None:
    many = tuple(Refusal(f"n{i}", f"path.{i}", "no", f"%n{i}") for i in range(40))
    program = replace(proved.program, reports=(PassReport("fold-norm", refused=many),))
    report = Report.of(program)
    assert len(report.passes["FoldNorm"].refused) == 40
    assert "and 28 more" in str(report)
    assert "path.11" in str(report)
    assert "path.12" not in str(report)


def test_a_pass_that_ran_twice_is_reported_whole() -> None:
    case = CASES["norm_returned"]
    program = lensfx.capture(case.build(), *case.inputs(2, 7, 0)[0])
    once = lensfx.Pipeline([p.FoldNorm()]).run(program)
    twice = lensfx.Pipeline([p.FoldNorm(), p.InsertHooks()]).run(once)
    found = lensfx.Lens(twice).report.passes
    assert list(found) == ["FoldNorm", "InsertHooks"]
    assert len(found["FoldNorm"].fired) == 4
    assert len(found["FoldNorm"].refused) == 1
    assert "has not run" in str(lensfx.Lens(twice).report)


def test_an_unproved_lens_and_a_bare_program_report_too() -> None:
    case = CASES["norm_returned"]
    program = lensfx.capture(case.build(), *case.inputs(2, 7, 0)[0])
    report = lensfx.Lens(program).report
    assert dict(report.passes) == {}
    assert report.equivalence is None
    assert "captured NormReturningDecoder" in str(report)
    assert "passes, in order" not in str(report)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("blocks.0.norm1", ["fold-norm fired", "insert-hooks fired"]),
        ("blocks.0.norm1.layer_norm", ["fold-norm fired", "insert-hooks fired"]),
        ("%layer_norm", ["fold-norm fired", "insert-hooks fired"]),
        ("blocks.0", ["fold-norm fired", "insert-hooks fired"]),
        ("norm", ["fold-norm left it alone: it is output 1 of the model"]),
        ("norm.layer_norm", ["fold-norm left it alone: it is output 1 of the model"]),
        ("blocks.1.hook_resid_mid", ["insert-hooks fired"]),
        ("head", ["center-unembed fired", "unembed.hook_out"]),
        ("blocks.0.mlp.1", ["insert-hooks fired", "blocks.0.mlp.hook_post"]),
        ("blocks.0.mlp.1.gelu", ["insert-hooks fired", "blocks.0.mlp.hook_post"]),
        ("blocks.0.ln1.hook_scale", ["no pass has a rule that meets"]),
        ("ids", ["no pass has a rule that meets ids"]),
    ],
)
def test_explain_answers_for_every_kind_of_place(
    proved: lensfx.Lens, place: str, said: list[str]
) -> None:
    text = lensfx.explain(proved, place)
    for part in said:
        assert part in text
    if place != "blocks.0.ln1.hook_scale":
        assert lensfx.explain(proved.program, place) == text


def test_explain_of_a_part_keeps_to_that_part(proved: lensfx.Lens) -> None:
    text = lensfx.explain(proved, "blocks.0.norm1")
    assert "blocks.1" not in text
    assert text.count("fold-norm fired") == 1


@pytest.mark.parametrize(
    "place", ["blocks.0.norm3", "block.0.norm1", "nothing", "", "blocks.0.nor"]
)
def test_explain_refuses_a_place_that_is_not_there(proved: lensfx.Lens, place: str) -> None:
    with pytest.raises(lensfx.UnknownNameError, match="has no node, name or path"):
        lensfx.explain(proved, place)


def test_explain_lists_the_nearest_places(proved: lensfx.Lens) -> None:
    with pytest.raises(lensfx.UnknownNameError, match=r"nearest are .*hook_resid_mid"):
        lensfx.explain(proved, "blocks.0.hook_resid_mud")
