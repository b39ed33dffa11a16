"""CenterWriters: the mean over the model axis leaves a stream that only layer norms read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from customs import TABLE, custom
from graphs import Sketch, every_value
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm, FoldNorm
from lensfx.passes.center_writers import CenterWriters
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program
from lensfx.analysis import Proof
from lensfx.graph import dtype_of, graph_text, is_op, is_weight, native_name
from lensfx.rewrite import At
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.center_writers")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def norm(s: Sketch, x: fx.Node, kind: str = "layer") -> fx.Node:
    d = int(x.meta["val"].shape[-1])
    if kind == "rms":
        return s.call(aten.rms_norm.default, x, [d], None, 1e-5)
    return s.call(aten.layer_norm.default, x, [d], None, None, 1e-5)


def linear(s: Sketch, x: fx.Node, name: str, out: int, bias: bool = True) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), dtype_of(x)
    W = s.weight(f"{name}.weight", out, size, dtype=dtype)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    return s.call(aten.linear.default, x, W, b, path=name)


def model(
    layers: int = 1, kind: str = "layer", d: int = 8, vocab: int = 11, **given: Any
) -> Program:
    """A table, layers of one hidden linear op and one that writes, a head tied to the table."""
    s, dtype = Sketch(), given.get("dtype")
    ids = s.input("ids", *given.get("sizes", ("B", "T")), dtype=torch.int64)
    E = s.weight("embed.weight", vocab, d, dtype=dtype)
    x = s.call(aten.embedding.default, E, ids, given.get("padding", -1), path="embed")
    for i in range(layers):
        y = s.call(aten.tanh.default, linear(s, norm(s, x, kind), f"h.{i}.up", d))
        y = linear(s, y, f"h.{i}.down", d, given.get("bias", True))
        x = s.call(aten.add.Tensor, x, y)
    last = norm(s, x, kind)
    return s.done(s.call(aten.linear.default, last, E, None, path="head"), *given.get("out", []))


def centred(before: Program, **options: Any) -> Program:
    return Pipeline([CenterWriters(**options)]).run(before)


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


def means(program: Program) -> list[float]:
    """The mean of each norm's input over its root mean square, in float64."""
    program = program.unfolded or program
    seen = every_value(program)
    norms = [n for n in program.graph.nodes if is_op(n, aten.layer_norm.default)]
    rows = [seen[n.args[0].name] for n in norms]  # type: ignore[union-attr]
    return [float((x.mean(-1).abs() / x.pow(2).mean(-1).sqrt()).max()) for x in rows]


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = model()
    rewritten = Pipeline([CenterWriters()]).rewrite(before)
    golden("center_writers.before", graph_text(before.graph))
    golden("center_writers.rewritten", graph_text(rewritten.graph))
    golden("center_writers.after", graph_text(centred(before).graph))
    assert [(e.root, e.note) for e in rewritten.journal] == [
        ("embedding", "no mean is left"),
        ("linear_1", "no mean is left"),
    ]
    first = rewritten.journal[0]
    assert set(first.sites) == {(n, n) for n in ("embedding", "layer_norm", "layer_norm_1")}
    assert first.shifts == (("embedding", 2),)
    assert first.centred == ("embedding",)
    assert {c.value: c.free for c in first.changes} == {"embedding": (2,), "add": (2,)}


@pytest.mark.parametrize("name", TABLE)
def test_writers_of_models_that_differ_in_one_thing(name: str) -> None:
    passes = [CanonicalLinear(), CanonicalNorm(), CenterWriters(expect=TABLE[name].writers)]
    after = Pipeline(passes).run(custom(name))
    assert prove(after).worst <= 1e-12


@pytest.mark.parametrize("name", ["base", "all sizes equal, tied", "block three times", "experts"])
def test_the_mean_of_a_plain_stream_is_gone_at_every_norm(name: str) -> None:
    passes = [CanonicalLinear(), CanonicalNorm(), FoldNorm(), CenterWriters()]
    start = custom(name)
    wide = {k: t.double() if t.is_floating_point() else t for k, t in start.tensors.items()}
    after = Pipeline(passes).rewrite(start)
    after = after.with_graph(after.graph, tensors=wide)
    assert max(means(after)) <= 1e-12
    assert {e.note for e in after.reports[-1].fired} == {"no mean is left"}


def test_what_is_left_of_the_mean_is_said() -> None:
    after = Pipeline([CanonicalNorm(), CenterWriters()]).run(custom("embedding norm"))
    assert after.reports[-1].fired[-1].note == "its norms see a mean of %layer_norm still"
    (left,) = after.reports[-1].refused
    words = "its mean goes into the stream, and no weight that it adds could take it out"
    assert (left.root, left.reason) == ("layer_norm", words)


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=8, max_size=8))
def test_centring_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    d = of(4, 8)
    # A vocabulary and an inner width as large as the model's: only the axis tells them apart.
    before = model(
        of(1, 2),
        d=d,
        vocab=of(d, 11),
        bias=of(True, False),
        dtype=of(*DTYPES),
        sizes=(of("B", 2, 1), of("T", 3, 1)),
        padding=of(-1, 0),
    )
    assert_equal(before, centred(before))


Feed = Callable[[Sketch, fx.Node, fx.Node], fx.Node]


def rows_of_a_table(s: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    t = s.call(aten.sym_size.int, ids, 1)
    rows = s.call(aten.slice.Tensor, s.weight("pos", 20, 8), 0, 0, t)
    rows = s.call(aten.expand.default, s.call(aten.unsqueeze.default, rows, 0), [-1, -1, 8])
    return s.call(aten.add.Tensor, x, rows)


def experts(s: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    W = s.call(aten.index.Tensor, s.weight("experts", 5, 8, 8), [ids])
    turned = s.call(aten.transpose.int, W, -1, -2)
    y = s.call(aten.matmul.default, s.call(aten.unsqueeze.default, norm(s, x), 2), turned)
    return s.call(aten.add.Tensor, x, s.call(aten.squeeze.dim, y, 2))


def own_bias(s: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    y = linear(s, norm(s, x), "late", 8, bias=False)
    y = s.call(aten.add.Tensor, y, s.weight("b", 8))
    return s.call(aten.add.Tensor, x, y)


def first_token(s: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    b = s.call(aten.sym_size.int, ids, 0)
    token = s.call(aten.expand.default, s.weight("cls", 1, 1, 8), [b, -1, -1])
    x = s.call(aten.cat.default, [token, x], 1)
    return s.call(aten.add.Tensor, x, linear(s, norm(s, x), "late", 8))


def added_matrix(s: Sketch, x: fx.Node, ids: fx.Node) -> fx.Node:
    rows = s.call(aten.reshape.default, norm(s, x), [-1, 8])
    y = s.call(aten.addmm.default, s.weight("b", 8), rows, s.weight("V", 8, 8), beta=2, alpha=-3)
    return s.call(aten.add.Tensor, x, s.call(aten.reshape.default, y, [3, 5, 8]))


FORMS: dict[str, tuple[Feed, int, tuple[Any, Any]]] = {
    "rows of a table": (rows_of_a_table, 2, ("B", "T")),
    "experts": (experts, 2, ("B", "T")),
    "own bias": (own_bias, 3, ("B", "T")),
    "first token": (first_token, 3, ("B", "T")),
    "added matrix": (added_matrix, 2, (3, 5)),
}


@pytest.mark.parametrize("case", FORMS)
def test_every_form_of_a_writer(case: str) -> None:
    feed, count, sizes = FORMS[case]
    s = Sketch()
    ids = s.input("ids", *sizes, dtype=torch.int64)
    x = s.call(aten.embedding.default, s.weight("embed", 5, 8), ids)
    x = feed(s, x, ids)
    before = s.done(linear(s, norm(s, x), "head", 11))
    after = centred(before, expect=count)
    assert_equal(before, after)
    assert {e.note for e in after.journal} == {"no mean is left"}


def test_a_tied_table_is_centred_where_it_is_looked_up() -> None:
    after = centred(before := model(), expect=2)
    assert_equal(before, after)
    assert after.tensors["embed.weight"] is before.tensors["embed.weight"]
    assert after.formulas["embed.weight_folded"].text.endswith("mean(embed.weight, [1], True))")


# refuses


def output(k: int) -> str:
    return f"it is output {k} of the model; allowed only under a contract that names it"


def test_refusals_name_who_sees_the_mean() -> None:
    after = centred(model(kind="rms"))
    assert [(r.root, r.reason) for r in after.reports[-1].refused] == [
        (root, f"%{name} is a root-mean-square norm: it keeps the mean of axis 2")
        for root, name in (("embedding", "rms_norm"), ("linear_1", "rms_norm_1"))
    ]
    assert graph_text(after.graph) == graph_text(model(kind="rms").graph)
    with pytest.raises(PipelineError, match="center-writers fired 0 times, 2 expected"):
        centred(model(kind="rms"), expect=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stream returned", output(1)),
        ("layer scale", "which varies along axis 2; fold the scale first"),
        ("post-norm", "(linear) mixes it along axis 2"),
    ],
)
def test_refusals_of_whole_models(name: str, words: str) -> None:
    refused = Pipeline([CanonicalNorm(), CenterWriters()]).run(custom(name)).reports[-1].refused
    assert any(words in r.reason for r in refused)


def test_what_writes_to_no_stream_is_none_of_its_business() -> None:
    s = Sketch()
    y = linear(s, norm(s, linear(s, s.input("x", "B", 8), "in", 8)), "out", 8)
    after = centred(s.done(y))
    assert (after.reports[-1].fired, after.reports[-1].refused) == ((), ())


# faults


right = module.centred


def wrong_axis(at: At, value: fx.Node, axis: int) -> fx.Node:
    return right(at, value, 1 - axis) if value.meta["val"].ndim == 2 else right(at, value, axis)


def doubled(at: At, value: fx.Node, axis: int) -> fx.Node:
    if not is_weight(value):
        return right(at, value, axis)
    mean = at.call(aten.mean.dim, value, [axis], True)
    return at.call(aten.sub.Tensor, value, mean, alpha=2)


def no_bias(at: At, value: fx.Node, axis: int) -> fx.Node:
    return value if value.meta["val"].ndim == 1 else right(at, value, axis)


def one_row(at: At, value: fx.Node, axis: int) -> fx.Node:
    row = at.call(aten.select.int, value, 0, 0)
    return at.call(aten.select_scatter.default, right(at, value, axis), row, 0, 0)


def whole_mean(at: At, value: fx.Node, axis: int) -> fx.Node:
    return at.call(aten.sub.Tensor, value, at.call(aten.mean.default, value))


def scaled(at: At, value: fx.Node, axis: int) -> fx.Node:
    return at.call(aten.mul.Tensor, right(at, value, axis), 1 + 1e-9)


Centre = Callable[[At, fx.Node, int], fx.Node]
FAULTS: dict[str, Centre] = {
    "wrong axis": wrong_axis,
    "doubled": doubled,
    "no bias": no_bias,
    "one row": one_row,
    "whole mean": whole_mean,
    "scaled": scaled,
}


def assert_blamed(after: Program, path: str) -> None:
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("center-writers broke its contract exact: ")
    assert f"  {path}  model.py:7" in second


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_writer_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, value: fx.Node, axis: int) -> fx.Node:
        here = f"h.{place}." in str(at._anchor.meta["nn_module_stack"])
        return (FAULTS[fault] if here else right)(at, value, axis)

    monkeypatch.setattr(module, "centred", planted)
    assert_blamed(centred(model(layers=3)), f"h.{place}.down")


def test_a_reader_that_is_overlooked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = importlib.import_module("lensfx.analysis.writers")

    def blind(self: Any, value: fx.Node, axes: Any, by: Any = None) -> Proof:
        leaf = next(n for n in value.graph.nodes if is_op(n, aten.rms_norm.default))
        step = analysis.Step(leaf, "kill", frozenset(axes), frozenset(), value)
        return Proof(value, frozenset(axes), (step,), (step,))

    monkeypatch.setattr(analysis.Gauge, "dead", blind)
    monkeypatch.setattr(module, "recheck", lambda proof: None)
    monkeypatch.setitem(
        analysis.TABLE, aten.rms_norm.default, analysis.TABLE[aten.layer_norm.default]
    )
    assert_blamed(centred(model(kind="rms"), expect=2), "embed")


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(), model(layers=3, dtype=torch.bfloat16), custom("base")):
        for run in (Pipeline([CenterWriters()]).rewrite, Pipeline([CenterWriters()]).run):
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
