"""RotateStream: the stream in another orthogonal basis, every reader none the wiser."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import CanonicalLinear, CanonicalNorm, FoldNorm
from lensfx.passes.rotate_stream import RotateStream
from models import CASES
from torch import Tensor, fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program, capture
from lensfx.analysis import Basis, Bound, basis_of, orthogonal, random_rotation
from lensfx.graph import graph_text, is_op, native_name
from lensfx.rewrite import At
from lensfx.verify import check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.passes.rotate_stream")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Step = Callable[[Sketch, fx.Node], fx.Node]


def norm(s: Sketch, x: fx.Node, kind: str = "rms") -> fx.Node:
    size = [int(x.meta["val"].shape[-1])]
    if kind == "layer":
        return s.call(aten.layer_norm.default, x, size, path="norm")
    return s.call(aten.rms_norm.default, x, size, None, 1e-5, path="norm")


def linear(s: Sketch, x: fx.Node, name: str, out: int, **given: Any) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    W = s.weight(f"{name}.weight", out, size, dtype=dtype, like=given.get("like", ""))
    b = s.weight(f"{name}.bias", out, dtype=dtype) if given.get("bias", True) else None
    return s.call(aten.linear.default, x, W, b, path=name)


def model(
    blocks: int = 2,
    d: int = 8,
    vocab: int = 11,
    kind: str = "rms",
    tied: bool = False,
    bias: bool = True,
    dtype: torch.dtype | None = None,
    sizes: tuple[Any, ...] = ("B", "T"),
    start: Step = lambda s, x: x,
    between: Step = lambda s, x: x,
    end: Step = lambda s, x: x,
) -> Program:
    """A stream with blocks of two linear ops each, and a head behind a last norm."""
    s = Sketch()
    ids = s.input("ids", *sizes, dtype=torch.int64)
    x = s.call(
        aten.embedding.default, s.weight("embed.weight", vocab, d, dtype=dtype), ids, path="embed"
    )
    x = start(s, x)
    for i in range(blocks):
        up = linear(s, norm(s, x, kind), f"h.{i}.up", d, bias=bias)
        down = linear(s, s.call(aten.tanh.default, up), f"h.{i}.down", d, bias=bias)
        x = between(s, s.call(aten.add.Tensor, x, down, path=f"h.{i}"))
    like = "embed.weight" if tied else ""
    n = norm(s, end(s, x), kind)
    return s.done(linear(s, n, "head", vocab, bias=bias, like=like))


def rotated(program: Program, Q: Tensor | None = None, **options: Any) -> Program:
    return Pipeline([RotateStream(Q, **options)]).run(program)


def assert_turned(before: Program, after: Program, Q: Tensor | None = None) -> None:
    """Equal outputs, and a stream that is what it was times Q."""
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12
    if Q is None:
        return
    held, now = every_value(before.unfolded or before), every_value(after)
    for change in after.journal[-1].changes:
        if change.value in now and isinstance(held.get(change.value), Tensor):
            wanted = held[change.value].double() @ Q
            torch.testing.assert_close(now[change.value].double(), wanted, rtol=1e-4, atol=1e-4)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before, Q = model(blocks=1, d=4), random_rotation(4, 3)
    rewritten = Pipeline([RotateStream(Q)]).rewrite(before)
    golden("rotate_stream.before", graph_text(before.graph))
    golden("rotate_stream.rewritten", graph_text(rewritten.graph))
    golden("rotate_stream.after", graph_text(rotated(before, Q).graph))
    (entry,) = rewritten.journal
    assert (entry.root, entry.note) == ("embedding", "2 writes and 2 reads turned")
    assert {c.value for c in entry.changes} == {
        "embedding", "rms_norm", "linear_1", "add", "rms_norm_1"
    }  # fmt: skip
    assert {new for _, new in entry.sites} == {"linear", "linear_2"}
    assert_turned(before, rotated(before, Q), Q)


def rows_added(s: Sketch, x: fx.Node) -> fx.Node:
    table = s.weight("pos", 9, int(x.meta["val"].shape[-1]), dtype=x.meta["val"].dtype)
    length = s.call(aten.sym_size.int, x, 1)
    return s.call(aten.add.Tensor, x, s.call(aten.slice.Tensor, table, 0, 0, length))


def vector(s: Sketch, x: fx.Node, name: str) -> fx.Node:
    return s.weight(name, int(x.meta["val"].shape[-1]), dtype=x.meta["val"].dtype)


def direct(s: Sketch, x: fx.Node) -> fx.Node:
    """A linear op from the stream to the stream."""
    return s.call(aten.add.Tensor, x, linear(s, x, "direct", int(x.meta["val"].shape[-1])))


def flipped(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.transpose.int, x, 0, 1)


STEPS: dict[str, Step] = {
    "positions": rows_added,
    "vector": lambda s, x: s.call(aten.add.Tensor, vector(s, x, "v"), x),
    "twice": lambda s, x: s.call(aten.sub.Tensor, x, s.call(aten.mul.Tensor, x, 0.3)),
    "single scale": lambda s, x: s.call(aten.mul.Tensor, x, s.weight("scale")),
    "computed scale": lambda s, x: s.call(
        aten.mul.Tensor, x, s.call(aten.tanh.default, linear(s, x, "gate", 1))
    ),
    "from the stream to the stream": direct,
    "cast": lambda s, x: s.call(
        aten.to.dtype, s.call(aten.to.dtype, x, torch.float64), x.meta["val"].dtype
    ),
    "turned axes": lambda s, x: flipped(s, s.call(aten.clone.default, flipped(s, x))),
    "mean over positions": lambda s, x: s.call(
        aten.sub.Tensor, x, s.call(aten.mean.dim, x, [1], True)
    ),
    "masked": lambda s, x: s.call(
        aten.masked_fill.Scalar,
        x,
        s.call(aten.gt.Scalar, s.call(aten.sum.dim_IntList, linear(s, x, "m", 3), [-1], True), 0.0),
        0.0,
    ),
    "joined along positions": lambda s, x: s.call(aten.cat.default, [x, x], 1),
}  # fmt: skip


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("case", STEPS)
def test_what_a_stream_goes_through(case: str, place: str) -> None:
    if place == "start" and case.startswith("joined"):
        pytest.skip("a stream of twice the length")
    Q = random_rotation(8, 1)
    before = model(**{place: STEPS[case]})  # type: ignore[arg-type]
    assert_turned(before, Pipeline([RotateStream(Q, expect=1)]).run(before), Q)


CAPTURED = [
    "hf_gpt2", "hf_llama", "nanogpt_vocab_is_width", "nanogpt_mlp_is_width", "nanogpt_shared_block",
    "llamalike", "llamalike_offset", "flat", "einsum", "no_norm", "no_grad_embedding",
]  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_models(name: str) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(2, 5, 0)
    before = capture(case.build(), *args, **kwargs)
    first = (CanonicalLinear(), CanonicalNorm(), FoldNorm())
    after = Pipeline((*first, RotateStream(expect=1))).run(before)
    assert_turned(before, after)


# contract


@settings(max_examples=20)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_turning_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    d = of(4, 8)
    before = model(
        blocks=of(1, 2),
        d=d,
        # A vocabulary as large as the width: only the axis tells the two apart.
        vocab=of(d, 11),
        kind=of("rms", "layer"),
        tied=of(True, False),
        bias=of(True, False),
        dtype=of(*DTYPES),
        sizes=(of("B", 1, 2), of("T", 1, 3)),
    )
    after = rotated(before, seed=data[0], expect=1)
    assert_turned(before, after)
    for name, t in after.tensors.items():
        assert t.dtype == before.tensors[name.removesuffix("_folded")].dtype


def test_a_tied_table_comes_apart() -> None:
    before, Q = model(tied=True), random_rotation(8, 2)
    after = rotated(before, Q)
    table = before.tensors["embed.weight"].double()
    found = [n for n in after.graph.nodes if is_op(n, aten.embedding.default, aten.linear.default)]
    for node, wanted in ((found[0], table @ Q), (found[-1], table @ Q)):
        weight: Any = node.args[0] if node is found[0] else node.args[1]
        torch.testing.assert_close(after.tensors[weight.target].double(), wanted, rtol=0, atol=1e-6)


def test_a_rotation_that_keeps_the_mean_goes_through_layer_norms() -> None:
    before = model(kind="layer")
    Q = random_rotation(8, 4, keeps_ones=True)
    torch.testing.assert_close(Q.sum(0).abs(), torch.ones(8).double())
    for turn in (Q, -Q):
        assert_turned(before, rotated(before, turn, expect=1), turn)


def test_what_was_there_is_what_is_there_turned_back() -> None:
    before, Q = model(), random_rotation(8, 5)
    lens = Lens(rotated(before, Q))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(lens.to_raw("h.0.add", x).double(), x.double() @ Q.T)


# refuses


def answer(s: Sketch, x: fx.Node) -> fx.Node:
    return s.call(aten.mul.Tensor, x, s.call(aten.tanh.default, x))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "scaled norm": (
        lambda: model(
            end=lambda s, x: s.call(aten.rms_norm.default, x, [8], vector(s, x, "g"), 1e-5)
        ),
        "rms_norm_2",
        "it has a scale or a shift for each channel; fold it into what reads it first",
    ),
    "layer scale": (
        lambda: model(end=lambda s, x: s.call(aten.mul.Tensor, x, vector(s, x, "g"))),
        "mul",
        "multiplied by %g, which varies along the channels",
    ),
    "tanh": (lambda: model(end=answer), "tanh_2", "no rule says what tanh makes of another basis"),
    "number": (
        lambda: model(end=lambda s, x: s.call(aten.add.Tensor, x, 1.0)),
        "add_2",
        "1.0 is the same number for all channels",
    ),
    "cut": (
        lambda: model(
            end=lambda s, x: s.call(
                aten.cat.default,
                [s.call(aten.slice.Tensor, x, -1, 0, 4), s.call(aten.slice.Tensor, x, -1, 4, 8)],
                -1,
            )
        ),
        "slice_1",
        "it takes the channels apart or moves them to another axis",
    ),
    "divided": (
        lambda: model(end=lambda s, x: s.call(aten.div.Tensor, linear(s, x, "one", 1), x)),
        "div",
        "it divides by it, channel by channel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_who_would_see_it(case: str) -> None:
    build, blame, reason = REFUSED[case]
    before = build()
    after = rotated(before)
    refused = after.reports[-1].refused
    assert [(r.blame.split()[0], r.reason) for r in refused] == [(f"%{blame}", reason)]
    assert graph_text(after.graph) == graph_text(before.graph)
    with pytest.raises(PipelineError, match="fired 0 times, 1 expected"):
        rotated(before, expect=1)


def test_a_stream_that_is_returned_stays_what_it_is() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    y = s.call(aten.add.Tensor, linear(s, x, "a", 8), linear(s, x, "b", 8))
    program = s.done(linear(s, y, "c", 8), y)
    assert basis_of(y) == Bound(program.graph.output_node(), "it is output 1 of the model")
    assert basis_of(x) == Bound(x, "it is an input of the model, which comes in the basis it has")


def test_rotations_that_do_not_fit() -> None:
    (wide,) = rotated(model(), torch.eye(6)).reports[-1].refused
    assert wide.reason == "its stream has 8 channels, and Q is for 6"
    (mean,) = rotated(model(kind="layer"), random_rotation(8, 0)).reports[-1].refused
    assert mean.reason == "it takes off a mean, whose direction Q moves"
    assert mean.blame.startswith("%layer_norm  norm")


def test_a_matrix_that_is_no_rotation_is_an_error() -> None:
    with pytest.raises(PipelineError, match=r"Q is not orthogonal: Q @ Q.T is .* from the id"):
        RotateStream(torch.eye(4) * (1 + 1e-6))
    with pytest.raises(PipelineError, match=r"a rotation is a square matrix, .* \[4, 3\]"):
        RotateStream(torch.ones(4, 3))
    near = orthogonal(random_rotation(6, 0) * (1 + 1e-11))
    assert float((near @ near.T - torch.eye(6)).abs().max()) <= 1e-14


# faults

right = module.turned


def no_bias(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    return {k: v for k, v in right(at, n, Q, basis).items() if k == "weight"}


def forgets_the_last_read(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    return {} if n is basis.reads[-1] else right(at, n, Q, basis)


def forgets_the_table(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    return {} if is_op(n, aten.embedding.default) else right(at, n, Q, basis)


def turned_back(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    return right(at, n, at.call(aten.t.default, Q) if n in basis.reads else Q, basis)


def wrong_side(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    if n is not basis.writes[-1]:
        return right(at, n, Q, basis)
    return right(at, n, Q, replace(basis, reads=(n,), writes=()))


def one_row(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    changed = right(at, n, Q, basis)
    row = at.call(aten.select.int, n.args[0 if is_op(n, aten.embedding.default) else 1], 0, 0)
    W = at.call(aten.select_scatter.default, changed["weight"], row, 0, 0)
    return {**changed, "weight": W}


def scaled(at: At, n: fx.Node, Q: fx.Node, basis: Basis) -> Changed:
    changed = right(at, n, Q, basis)
    if n is basis.reads[0]:
        changed["weight"] = at.call(aten.mul.Tensor, changed["weight"], 1 + 1e-9)
    return changed


Changed = dict[str, fx.Node]
FAULTS = {
    f.__name__: ("turned", f)
    for f in (
        no_bias, forgets_the_last_read, forgets_the_table, turned_back, wrong_side, one_row, scaled
    )
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_blamed_on_the_stream(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, instead = FAULTS[fault]
    monkeypatch.setattr(module, name, instead)
    after = rotated(model(), expect=1)
    with pytest.raises(ContractError) as caught:
        prove(after)
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("rotate-stream broke its contract exact: ")
    assert second.strip().startswith("at %embedding  embed  model.py:7  self.embed(x)")


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (model(tied=True), model(kind="layer", start=rows_added)):
        after = rotated(before)
        again = rotated(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        assert read == set(after.tensors)
        sources = {name for f in after.formulas.values() for name in f.sources}
        assert set(before.tensors) - read <= sources
        twice = Pipeline([RotateStream(), RotateStream()]).rewrite(before)
        assert [len(r.fired) for r in twice.reports] == [1, 0]
