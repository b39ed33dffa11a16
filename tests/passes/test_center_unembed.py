"""CenterUnembed: the mean over the vocabulary leaves the logits where nothing can see it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CenterUnembed
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.analysis import Proof
from lensfx.graph import graph_text, native_name
from lensfx.rewrite import At, Match
from lensfx.verify import Exact, UpToLogitShift, check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.center_unembed")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
VOCAB, WIDTH = 11, 8
Tail = Callable[[Sketch, fx.Node], Any]


def stream(s: Sketch, vocab: int = VOCAB, width: int = WIDTH, **kind: Any) -> fx.Node:
    """Tokens, a table, and a layer between them and the head."""
    ids = s.input("ids", *kind.get("sizes", ("B", "T")), dtype=torch.int64)
    table = s.weight("embed.weight", vocab, width, dtype=kind.get("dtype"))
    x = s.call(aten.embedding.default, table, ids, path="embed")
    W = s.weight("mid.weight", width, width, dtype=kind.get("dtype"))
    return s.call(aten.tanh.default, s.call(aten.linear.default, x, W, path="mid"))


def head(
    s: Sketch, x: fx.Node, rows: int = VOCAB, bias: bool = True, tied: bool = False
) -> fx.Node:
    kind = {"dtype": x.meta["val"].dtype}
    width = int(x.meta["val"].shape[-1])
    W = s.weight("head.weight", rows, width, like="embed.weight" if tied else "", **kind)
    b = s.weight("head.bias", rows, **kind) if bias else None
    return s.call(aten.linear.default, x, W, b, path="head")


def model(tail: Tail = lambda s, y: y, rows: int = VOCAB, **given: Any) -> Program:
    s = Sketch()
    found = tail(s, head(s, stream(s), rows, **given))
    return s.done(*(found if isinstance(found, tuple) else (found,)))


def centred(before: Program, **options: Any) -> Program:
    return Pipeline([CenterUnembed(**options)]).run(before)


def assert_shifted(before: Program, after: Program, *outputs: int) -> None:
    """The logits are equal up to one number a position, and everything else is equal."""
    assert prove(after).worst <= 1e-12
    assert {k for e in after.journal for k in e.shifted} >= set(outputs)
    assert check(before, Lens(after), up_to=UpToLogitShift(outputs)).error <= 1e-12
    for name in {"head.weight", "head.bias"} & set(after.tensors):
        folded = after.tensors[name].detach()
        assert float(folded.double().mean(0).abs().max()) <= 4 * torch.finfo(folded.dtype).eps


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model()
    rewritten = Pipeline([CenterUnembed()]).rewrite(before)
    golden("center_unembed.before", graph_text(before.graph))
    golden("center_unembed.rewritten", graph_text(rewritten.graph))
    golden("center_unembed.after", graph_text(centred(before).graph))
    assert [(e.root, e.shifted) for e in rewritten.journal] == [("linear_1", (0,))]
    assert rewritten.journal[0].note == "it has one row for each row of embed.weight"
    assert_shifted(before, centred(before), 0)
    assert check(before, Lens(centred(before)), up_to=Exact()).error > 1e-3


def two(*tails: Tail) -> Tail:
    return lambda s, y: (y, *(tail(s, y) for tail in tails))


def softmax(s: Sketch, y: fx.Node, axis: int = -1) -> fx.Node:
    return s.call(aten.softmax.int, y, axis)


def masked(s: Sketch, y: fx.Node) -> fx.Node:
    mask = s.call(aten.gt.Scalar, s.weight("mask", VOCAB), 0.0)
    return s.call(aten.masked_fill.Scalar, y, mask, float("-inf"))


FINE: dict[str, tuple[Tail, tuple[int, ...]]] = {
    "logits and softmax": (two(softmax), (0,)),
    "logits and log softmax": (two(lambda s, y: s.call(aten.log_softmax.int, y, -1)), (0,)),
    "logits and argmax": (two(lambda s, y: s.call(aten.argmax.default, y, -1)), (0,)),
    "softmax alone": (softmax, ()),
    "temperature": (lambda s, y: s.call(aten.div.Tensor, y, s.weight("t")), (0,)),
    "bias behind": (lambda s, y: s.call(aten.add.Tensor, y, s.weight("late", VOCAB)), (0,)),
    "padded rows cut off": (lambda s, y: s.call(aten.slice.Tensor, y, 2, 0, 7), (0,)),
    "the last position": (lambda s, y: s.call(aten.select.int, y, 1, -1), (0,)),
    "the mean position": (lambda s, y: s.call(aten.mean.dim, y, [1]), (0,)),
    "masked words": (masked, (0,)),
    "a wider dtype": (lambda s, y: s.call(aten.to.dtype, y, torch.float64), (0,)),
    "less the largest": (
        lambda s, y: s.call(aten.sub.Tensor, y, s.call(aten.amax.default, y, [-1], True)),
        (),
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_heads_whose_shift_nobody_sees(case: str) -> None:
    tail, outputs = FINE[case]
    before = model(tail)
    after = centred(before, expect=1)
    assert_shifted(before, after, *outputs)
    if not outputs:
        assert after.journal[0].shifted == ()
        assert check(before, Lens(after), up_to=Exact()).error <= 1e-12


def test_a_loss_beside_the_logits_stays_what_it_was() -> None:
    s = Sketch()
    y = head(s, stream(s, sizes=(2, 5)))
    targets = s.input("targets", 10, dtype=torch.int64)
    rows = s.call(aten.reshape.default, y, [-1, VOCAB])
    each = s.call(aten.cross_entropy_loss.default, rows, targets, None, 0)
    before = s.done(y, s.call(aten.cross_entropy_loss.default, rows, targets), each)
    after = centred(before, expect=1)
    assert after.journal[0].shifted == (0,)
    assert_shifted(before, after, 0)


# contract


@settings(max_examples=25)
@given(data=st.lists(st.integers(0, 10**6), min_size=8, max_size=8))
def test_centring_keeps_its_contract(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    s, width, dtype = Sketch(), of(4, 8), of(*DTYPES)
    # A vocabulary as large as the width: only the axis can tell rows from columns.
    vocab = of(width, 11, 3)
    x = stream(s, vocab, width, dtype=dtype, sizes=(of("B", 1, 2), of("T", 1, 3)))
    y = head(s, x, vocab, of(True, False), of(True, False))
    before = s.done(*of((y,), (y, softmax(s, y)), (s.call(aten.transpose.int, y, 0, 1),)))
    assert_shifted(before, centred(before, output=0, expect=1), 0)


def test_a_tied_head_unties_and_leaves_the_table_alone() -> None:
    before = model(tied=True)
    after = centred(before, expect=1)
    assert after.journal[0].note == "its weight is tied to embed.weight"
    assert after.tensors["embed.weight"] is before.tensors["embed.weight"]
    assert_shifted(before, after, 0)


def test_a_head_used_twice_is_centred_at_both_uses() -> None:
    s = Sketch()
    x = stream(s)
    y = head(s, x)
    z = s.call(aten.linear.default, s.call(aten.tanh.default, x), y.args[1], y.args[2], path="head")
    before = s.done(y, z)
    after = centred(before, expect=2)
    assert_shifted(before, after, 0, 1)
    assert [e.shifted for e in after.journal] == [(0,), (1,)]


def test_naming_the_output_is_evidence_enough() -> None:
    before = model(rows=5)
    after = centred(before, output=0, expect=1)
    assert after.journal[0].note == "output 0 was named"
    assert_shifted(before, after, 0)


def test_only_the_named_head_is_centred() -> None:
    s = Sketch()
    x = stream(s)
    other = s.call(aten.linear.default, x, s.weight("other.weight", VOCAB, WIDTH), path="other")
    before = s.done(other, head(s, x))
    assert [e.path for e in centred(before, output=1).journal] == ["head"]
    assert [e.path for e in centred(before).journal] == ["other", "head"]


# refuses


NO_EVIDENCE = "nothing says that it gives logits over a vocabulary; name its output to say so"
OUTPUT_1 = "it is output 1 of the model; allowed only under a contract that names it"
ONE_ROW = "it has one row, and centring would leave nothing of it"

REFUSED: dict[str, tuple[Program, str, str, dict[str, Any]]] = {
    "soft cap": (
        model(lambda s, y: s.call(aten.mul.Tensor, s.call(aten.tanh.default, y), 30.0)),
        "tanh_1",
        "%tanh_1 reads it non-linearly (tanh): a shift along axis 2 would be seen",
        {},
    ),
    "the largest returned": (
        model(two(lambda s, y: s.call(aten.amax.default, y, [-1]))),
        "output",
        OUTPUT_1,
        {},
    ),
    "the largest returned with its axis": (
        model(two(lambda s, y: s.call(aten.amax.default, y, [-1], True))),
        "output",
        OUTPUT_1,
        {},
    ),
    "the log of the sum returned": (
        model(two(lambda s, y: s.call(aten.logsumexp.default, y, [-1], True))),
        "output",
        OUTPUT_1,
        {},
    ),
    "spread out again": (
        model(
            two(
                lambda s, y: s.call(
                    aten.expand.default, s.call(aten.amax.default, y, [-1], True), [-1, -1, 7]
                )
            )
        ),
        "output",
        OUTPUT_1,
        {},
    ),
    "softmax over positions": (
        model(lambda s, y: softmax(s, y, 1)),
        "softmax",
        "%softmax (softmax) normalises over axis 1, but the shift varies along axis 1",
        {},
    ),
    "a scale for each word": (
        model(lambda s, y: s.call(aten.mul.Tensor, y, s.weight("scale", VOCAB))),
        "mul",
        "%mul multiplies it by scale, which varies along axis 2; fold the scale first",
        {},
    ),
    "classifier": (model(rows=5), "linear_1", NO_EVIDENCE, {}),
    "reward": (model(rows=1), "linear_1", ONE_ROW, {}),
    "reward by name": (model(rows=1), "linear_1", ONE_ROW, {"output": 0}),
    "another name": (
        model(lambda s, y: (y, s.weight("other", 3))),
        "linear_1",
        "it does not lead to output 1, which was named",
        {"output": 1},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_who_would_see_it(case: str) -> None:
    before, blame, reason, options = REFUSED[case]
    after = centred(before, **options)
    refused = after.reports[-1].refused
    assert [(r.blame.split()[0], r.reason) for r in refused] == [(f"%{blame}", reason)]
    assert graph_text(after.graph) == graph_text(before.graph)
    with pytest.raises(PipelineError, match="center-unembed fired 0 times, 1 expected"):
        centred(before, expect=1, **options)


def test_an_output_that_is_not_there_is_an_error() -> None:
    with pytest.raises(PipelineError, match="there is no output 3; the model has 1"):
        centred(model(), output=3)


# faults


def wrong_axis(m: Match, at: At) -> Changed:
    return {"weight": at.call(aten.sub.Tensor, m.W, at.call(aten.mean.dim, m.W, [1], True))}


def only_the_weight(m: Match, at: At) -> Changed:
    return {"weight": right(m, at)["weight"]}


def only_the_bias(m: Match, at: At) -> Changed:
    return {"bias": at.call(aten.sub.Tensor, m.b, at.call(aten.mean.dim, m.b, [0], True))}


def twice_the_mean(m: Match, at: At) -> Changed:
    mean = at.call(aten.mean.dim, m.W, [0], True)
    return {"weight": at.call(aten.sub.Tensor, m.W, mean, alpha=2)}


def one_row(m: Match, at: At) -> Changed:
    changed = right(m, at)
    row = at.call(aten.select.int, m.W, 0, 0)
    W = at.call(aten.select_scatter.default, changed["weight"], row, 0, 0)
    return {**changed, "weight": W}


def scaled(m: Match, at: At) -> Changed:
    changed = right(m, at)
    return {**changed, "weight": at.call(aten.mul.Tensor, changed["weight"], 1 + 1e-9)}


Changed = dict[str, fx.Node]
right = module.centred
FAULTS = (wrong_axis, only_the_weight, only_the_bias, twice_the_mean, one_row, scaled)


def heads(vocab: int, normed: bool = False) -> Program:
    """Three heads on one stream, behind a norm without scale and shift if `normed`."""
    s = Sketch()
    x = stream(s, vocab)
    x = s.call(aten.layer_norm.default, x, [WIDTH]) if normed else x
    found = []
    for i in range(3):
        W, b = s.weight(f"{i}.weight", vocab, WIDTH), s.weight(f"{i}.bias", vocab)
        found.append(s.call(aten.linear.default, x, W, b, path=f"heads.{i}"))
    program = s.done(*found)
    # Where the vocabulary is as large as the width, sizes alone are no evidence.
    names = tuple(f"logits_{i}" for i in range(3))
    return replace(program, signature=replace(program.signature, outputs=names))


def assert_blamed(after: Program, path: str) -> None:
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("center-unembed broke its contract up-to-logit-shift: ")
    assert f"  {path}  model.py:7" in second


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("vocab", [VOCAB, WIDTH])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_head_is_found_and_blamed_on_it(
    fault: Callable[[Match, At], Changed], vocab: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(m: Match, at: At) -> Changed:
        here = f"heads.{place}" in str(m.root.meta["nn_module_stack"])
        return (fault if here else right)(m, at)

    monkeypatch.setattr(module, "centred", planted)
    assert_blamed(centred(heads(vocab)), f"heads.{place}")


@pytest.mark.parametrize("vocab", [VOCAB, WIDTH])
def test_the_wrong_axis_is_found_where_it_changes_nothing(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of a normed row is 0, so that the columns' mean is seen by nobody."""
    monkeypatch.setattr(module, "centred", wrong_axis)
    assert_blamed(centred(heads(vocab, normed=True)), "heads.0")


@pytest.mark.parametrize("case", ["soft cap", "softmax over positions", "a scale for each word"])
def test_a_reader_that_is_overlooked_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "dead", lambda value, axes, **_: Proof(value, frozenset(axes), (), ())
    )
    assert_blamed(centred(REFUSED[case][0]), "head")


def test_an_output_that_must_not_move_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "dead", lambda value, axes, **_: Proof(value, frozenset(axes), (), ())
    )
    for case in ("the largest returned", "the largest returned with its axis"):
        after = centred(REFUSED[case][0])
        with pytest.raises(ContractError, match=r"center-unembed broke .*: \[1\] differs"):
            prove(after)


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(), model(tied=True), heads(VOCAB)):
        for run in (Pipeline([CenterUnembed()]).rewrite, Pipeline([CenterUnembed()]).run):
            after = run(before)
            again = run(after)
            assert (again.reports[-1].fired, again.reports[-1].refused) == ((), ())
            assert graph_text(again.graph) == graph_text(after.graph)
            calls = [n for n in after.graph.nodes if n.op == "call_function"]
            assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        sources = {name for f in after.formulas.values() for name in f.sources}
        assert read == set(after.tensors)
        assert set(before.tensors) - read <= sources
