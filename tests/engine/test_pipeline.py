"""The pipeline runs what is written in the order it is written, or says why it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from graphs import FoldScale, Once, Sketch
from torch import fx

from lensfx.errors import PipelineError, RewriteError
from lensfx.graph import Program, graph_text, is_op
from lensfx.rewrite import (
    Any,
    Edit,
    Match,
    Miss,
    Op,
    Pass,
    Pipeline,
    Rule,
    Sites,
)

aten = torch.ops.aten

RELU = Op("relu", (aten.relu.default,), {"self": Any("x")})
TANH = Op("tanh", (aten.tanh.default,), {"self": Any("x")})


def becomes(target: object) -> object:
    def rewrite(m: Match, edit: Edit) -> None:
        at = edit.before(m.root)
        at.replace(m.root, at.call(target, m.x))

    return rewrite


def swap(wanted: Op, target: object, unless: object = lambda m: None) -> Rule:
    return Rule(wanted, unless, becomes(target))


@dataclass(frozen=True)
class ToTanh(Pass):
    rules = (swap(RELU, aten.tanh.default),)


@dataclass(frozen=True)
class ToSin(Pass):
    rules = (swap(TANH, aten.sin.default),)
    needs: ClassVar[tuple[str, ...]] = ("to-tanh",)


@dataclass(frozen=True)
class CanonicalCos(Pass):
    rules = (swap(Op("cos", (aten.cos.default,), {"self": Any("x")}), aten.sin.default),)


@dataclass(frozen=True)
class ToNeg(Pass):
    rules = (swap(RELU, aten.neg.default),)
    needs: ClassVar[tuple[str, ...]] = ("canonical-cos",)


def relus(count: int) -> Program:
    """relu applied that often to x, each in a module of its own."""
    s = Sketch()
    value = s.input("x", "B", 4)
    for i in range(count):
        value = s.call(aten.relu.default, value, path=f"act.{i}")
    return s.done(value)


def ops(program: Program) -> list[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    return [n.target.overloadpacket.__name__ for n in calls]


def test_passes_run_in_the_written_order() -> None:
    after = Pipeline([ToTanh(), ToSin()]).rewrite(relus(2))
    assert ops(after) == ["sin", "sin"]
    assert after.passes == ("to-tanh", "to-sin")
    assert [e.pass_name for e in after.journal] == ["to-tanh"] * 2 + ["to-sin"] * 2
    assert [e.index for e in after.journal] == [0, 1, 2, 3]
    assert [s.name for s in after.stages] == ["start", "to-tanh", "to-sin"]
    assert [set(ops(replace(after, graph=s.graph))) for s in after.stages] == [
        {"relu"},
        {"tanh"},
        {"sin"},
    ]


def test_roots_are_visited_from_the_outputs_backwards() -> None:
    after = Pipeline([ToTanh()]).rewrite(relus(3))
    assert [e.path for e in after.journal] == ["act.2", "act.1", "act.0"]


def test_a_pass_that_stands_before_one_it_needs() -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline([ToSin(), ToTanh()])
    assert str(caught.value) == (
        "to-sin stands before to-tanh, which must run first\n  try: write to-tanh before to-sin"
    )
    assert Pipeline([ToSin()]).passes == (ToSin(),)


def test_a_program_that_has_been_through_a_later_pass() -> None:
    done = Pipeline([ToTanh(), ToSin()]).rewrite(relus(1))
    with pytest.raises(PipelineError) as caught:
        Pipeline([ToTanh()]).rewrite(done)
    assert caught.value.headline == (
        "to-tanh must run before to-sin, which this program has been through"
    )
    assert Pipeline([ToSin()]).rewrite(done).passes == ("to-tanh", "to-sin", "to-sin")


@pytest.mark.parametrize("entry", [ToTanh, "to-tanh", None, lambda program: program])
def test_what_is_no_pass(entry: object) -> None:
    with pytest.raises(PipelineError, match="is not a pass"):
        Pipeline([entry])


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_another_number_of_rewrites_than_expected(wanted: int) -> None:
    program = relus(2)
    with pytest.raises(PipelineError) as caught:
        Pipeline([ToTanh(expect=wanted)]).run(program)
    assert caught.value.headline == f"to-tanh fired 2 times, {wanted} expected"
    assert Pipeline([ToTanh(expect=2)]).run(program).passes == ("to-tanh",)


def test_strict() -> None:
    program = relus(1)
    assert ops(Pipeline([CanonicalCos()]).run(program)) == ["relu"]
    with pytest.raises(PipelineError) as caught:
        Pipeline([CanonicalCos()], strict=True).run(program)
    assert caught.value.headline == "canonical-cos fired nowhere"
    assert caught.value.at == ("no site was found",)
    assert Pipeline([ToTanh()], strict=True).run(program).passes == ("to-tanh",)
    assert Pipeline([CanonicalCos(expect=0)]).run(program).passes == ("canonical-cos",)


def reluctant(m: Match) -> str | None:
    path = next(iter(m.root.meta["nn_module_stack"]))
    return {"act.0": "it is the first", "act.1": ""}.get(path)


def test_reports_say_what_fired_and_what_did_not() -> None:
    entry = Once(pattern=RELU, rewrite=becomes(aten.tanh.default), unless=reluctant)
    after = Pipeline([entry]).rewrite(relus(3))
    (report,) = after.reports
    assert (report.name, report.fired) == ("once", after.journal)
    assert [e.root for e in report.fired] == ["relu_2"]
    # act.1 was none of the rule's business, so nothing is said of it.
    assert [str(r) for r in report.refused] == ["%relu  act.0: it is the first"]
    assert report.refused[0].blame == "%relu  act.0  model.py:7  self.act.0(x)"
    assert ops(after) == ["relu", "relu", "tanh"]


def test_a_miss_at_a_site_is_a_refusal_and_any_other_miss_is_not() -> None:
    s = Sketch()
    x, y, g = s.input("x", "B", 8), s.input("y", 8), s.weight("ln.weight", 8)
    n = s.call(aten.layer_norm.default, x, [8], g, path="ln")
    other = s.call(aten.layer_norm.default, x, [8], y)
    program = s.done(s.call(aten.add.Tensor, n, x), other)
    after = Pipeline([FoldScale()]).rewrite(program)
    refused = [(r.root, r.path, r.reason, r.blame) for r in after.reports[0].refused]
    assert refused == [("layer_norm", "ln", "reader add is add, not linear", "%add")]
    assert after.journal == ()
    assert after.graph is program.graph


def test_a_needed_canonical_pass_that_did_not_run_is_noted() -> None:
    program = relus(1)
    alone = Pipeline([ToNeg()]).rewrite(program).reports[0]
    assert alone.notes == (
        "canonical-cos has not run: sites only it brings into form are not seen",
    )
    both = Pipeline([CanonicalCos(), ToNeg()]).rewrite(program)
    assert [r.notes for r in both.reports] == [(), ()]
    assert both.reports[1].needs == ("canonical-cos",)
    # Another kind of pass may be left out without harm to what this one sees.
    assert Pipeline([ToSin()]).rewrite(program).reports[0].notes == ()


def state(program: Program) -> object:
    return (
        graph_text(program.graph),
        [(n.name, n.op, n.target, n.meta.copy()) for n in program.graph.nodes],
        [(k, id(t), t._version) for k, t in program.tensors.items()],
        (program.passes, program.journal, program.reports, program.stages),
    )


def breaks(m: Match, edit: Edit) -> None:
    becomes(aten.tanh.default)(m, edit)
    if m.root.name == "relu":
        raise ZeroDivisionError("no such number")


def reshapes(m: Match, edit: Edit) -> None:
    at = edit.before(m.root)
    at.replace(m.root, at.call(aten.unsqueeze.default, m.x, 0))


def goes_round(m: Match, edit: Edit) -> None:
    at = edit.after(m.root)
    first = at.call(aten.tanh.default, m.root)
    at.replace(m.root, at.call(aten.neg.default, first))


FAILURES = {
    "an exception": (
        breaks,
        "once failed while rewriting: ZeroDivisionError: no such number",
        "%relu  act.0  model.py:7  self.act.0(x)",
    ),
    "another shape": (reshapes, "once would change relu_1 from", "%relu_1  act.1"),
    "a circle": (goes_round, "once left a broken graph: ", ""),
}


@pytest.mark.parametrize(("rewrite", "headline", "place"), FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_the_program_as_it_was(rewrite: object, headline: str, place: str) -> None:
    program = relus(2)
    before = state(program)
    with pytest.raises(RewriteError) as caught:
        Pipeline([Once(pattern=RELU, rewrite=rewrite)]).run(program)
    assert caught.value.headline.startswith(headline)
    assert "".join(caught.value.at).startswith(place)
    assert caught.value.__cause__ is not None or rewrite is reshapes
    assert state(program) == before


def test_a_success_leaves_the_program_as_it_was() -> None:
    s = Sketch()
    x, g = s.input("x", "B", 8), s.weight("ln.weight", 8)
    n = s.call(aten.layer_norm.default, x, [8], g)
    program = s.done(s.call(aten.linear.default, n, s.weight("q", 4, 8)))
    before = state(program)
    after = Pipeline([FoldScale()], strict=True).run(program)
    assert state(program) == before
    assert state(after) != before
    assert after.signature is program.signature
    assert after.example is program.example


def test_limit_gives_every_prefix_of_the_journal() -> None:
    program = relus(3)
    pipeline = Pipeline([ToTanh(), ToSin(expect=3)])
    whole = pipeline.rewrite(program)
    texts = []
    for limit in range(len(whole.journal) + 2):
        part = pipeline.rewrite(program, limit=limit)
        assert part.journal == whole.journal[:limit]
        part.graph.lint()
        texts.append(ops(part))
    assert texts == [
        ["relu", "relu", "relu"],
        ["relu", "relu", "tanh"],
        ["relu", "tanh", "tanh"],
        ["tanh", "tanh", "tanh"],
        ["tanh", "tanh", "sin"],
        ["tanh", "sin", "sin"],
        ["sin", "sin", "sin"],
        ["sin", "sin", "sin"],
    ]


def test_limit_counts_from_where_the_program_stands() -> None:
    first = Pipeline([ToTanh()]).rewrite(relus(2))
    part = Pipeline([ToSin()]).rewrite(first, limit=1)
    assert ops(part) == ["tanh", "sin"]
    assert part.journal[:2] == first.journal


def test_running_again_does_nothing() -> None:
    s = Sketch()
    x, g, b = s.input("x", "B", 8), s.weight("ln.weight", 8), s.weight("ln.bias", 8)
    n = s.call(aten.layer_norm.default, x, [8], g, b)
    program = s.done(s.call(aten.linear.default, n, s.weight("q.weight", 4, 8)))
    once = Pipeline([FoldScale()]).run(program)
    twice = Pipeline([FoldScale()]).run(once)
    assert len(once.journal) == 1
    assert twice.reports[1].fired == ()
    assert twice.journal == once.journal
    assert graph_text(twice.graph) == graph_text(once.graph)
    assert all(twice.tensors[k] is t for k, t in once.tensors.items())


def found_by(target: object) -> Rule:
    def find(program: Program) -> Iterator[Match | Miss]:
        for node in reversed(program.graph.nodes):
            if is_op(node, aten.relu.default):
                x: fx.Node = node.args[0]
                first = x.op == "placeholder"
                yield (
                    Miss("it reads the input", x, at_site=True)
                    if first
                    else Match({"root": node, "x": x}, (), program)
                )

    return Rule(Sites(find), lambda m: None, becomes(target))


@dataclass(frozen=True)
class Found(Pass):
    rules = (found_by(aten.tanh.default), swap(RELU, aten.neg.default))


def test_sites_and_the_order_of_rules() -> None:
    after = Pipeline([Found()]).rewrite(relus(3))
    assert ops(after) == ["neg", "tanh", "tanh"]
    (report,) = after.reports
    assert [(r.root, r.reason) for r in report.refused] == [("x", "it reads the input")]


def test_a_root_that_an_earlier_rewrite_removed_is_passed_over() -> None:
    pair = Op("outer", (aten.relu.default,), {"self": RELU})
    after = Pipeline([Once(pattern=pair, rewrite=becomes(aten.tanh.default))]).rewrite(relus(4))
    assert [e.root for e in after.journal] == ["relu_3", "relu_1"]
    assert [e.removed for e in after.journal] == [2, 2]
    assert ops(after) == ["tanh", "tanh"]


def test_dead_code_of_a_pass_is_removed() -> None:
    def leaves_one_behind(m: Match, edit: Edit) -> None:
        edit.before(m.root).call(aten.cos.default, m.x)
        becomes(aten.tanh.default)(m, edit)

    after = Pipeline([Once(pattern=RELU, rewrite=leaves_one_behind)]).rewrite(relus(2))
    assert ops(after) == ["tanh", "tanh"]


def test_claims_of_a_value_that_was_replaced_again_are_taken_back() -> None:
    @dataclass(frozen=True)
    class Twice(Pass):
        rules = (swap(RELU, aten.tanh.default), swap(TANH, aten.sin.default))

    program = relus(1)
    after = Pipeline([Twice()]).rewrite(program)
    assert ops(after) == ["sin"]
    names = {n.name for n in after.graph.nodes}
    claims = [site for entry in after.journal for site in entry.sites]
    assert [old for old, _ in claims] == ["relu"]
    assert {new for _, new in claims} <= names


def test_a_pass_is_named_after_its_class_and_must_have_rules() -> None:
    @dataclass(frozen=True)
    class EmptyPass(Pass):
        pass

    assert EmptyPass().name == "empty-pass"
    with pytest.raises(TypeError, match="EmptyPass defines no rules"):
        Pipeline([EmptyPass()]).run(relus(1))
    assert repr(Pipeline([ToTanh()])) == "Pipeline([ToTanh(expect=None)])"
