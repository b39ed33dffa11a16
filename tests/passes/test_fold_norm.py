"""FoldNorm: the scale and shift of a norm move into the linear ops that read it."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch, every_value, node
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import FoldNorm
from torch import fx

from lensfx import ContractError, Lens, Pipeline, PipelineError, Program, RewriteError
from lensfx.analysis import Sink
from lensfx.graph import dtype_of, graph_text, native_name
from lensfx.rewrite import At, Edit, Match, Rule
from lensfx.verify import check, prove

aten = torch.ops.aten
fold_norm = importlib.import_module("lensfx.passes.fold_norm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Feed = Callable[[Sketch, fx.Node], fx.Node]


def norm(s: Sketch, x: fx.Node, name: str = "ln", kind: str = "layer", **given: Any) -> fx.Node:
    """A norm over the last axis: `layer` has scale and shift, `scale` and `rms` no shift."""
    size = int(x.meta["val"].shape[-1])
    g = given.get("g") or s.weight(f"{name}.weight", size, dtype=dtype_of(x))
    if kind == "rms":
        return s.call(aten.rms_norm.default, x, [size], g, 1e-5, path=name)
    b = s.weight(f"{name}.bias", size, dtype=dtype_of(x)) if kind == "layer" else None
    return s.call(aten.layer_norm.default, x, [size], g, b, 1e-5, path=name)


def linear(
    s: Sketch, x: fx.Node, name: str, out: int, bias: bool = True, like: str = ""
) -> fx.Node:
    size, dtype = int(x.meta["val"].shape[-1]), dtype_of(x)
    W = s.weight(f"{name}.weight", out, size, dtype=dtype, like=like)
    b = s.weight(f"{name}.bias", out, dtype=dtype) if bias else None
    return s.call(aten.linear.default, x, W, b, path=name)


def one(feed: Feed, kind: str = "layer", d: int = 8, dtype: torch.dtype | None = None) -> Program:
    """One norm, and what is made of it."""
    s = Sketch()
    x = s.input("x", "B", "T", d, dtype=dtype)
    return s.done(feed(s, norm(s, x, kind=kind)))


def stack(
    kind: str = "layer", sites: int = 3, d: int = 8, dtype: torch.dtype | None = None
) -> Program:
    """Norms on a stream, each read by a linear with a bias and by one without."""
    s = Sketch()
    x = s.input("x", "B", "T", d, dtype=dtype)
    for i in range(sites):
        n = norm(s, x, f"h.{i}.ln", kind)
        q, k = linear(s, n, f"h.{i}.q", d), linear(s, n, f"h.{i}.k", d, bias=False)
        x = s.call(aten.add.Tensor, x, s.call(aten.mul.Tensor, q, s.call(aten.tanh.default, k)))
    return s.done(x)


def folded(program: Program, **options: Any) -> Program:
    return Pipeline([FoldNorm(**options)]).run(program)


def fired(program: Program) -> list[str]:
    return [entry.root for entry in program.reports[-1].fired]


def assert_equal(before: Program, after: Program) -> None:
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = one(lambda s, n: linear(s, n, "q", 4, bias=False))
    rewritten = Pipeline([FoldNorm()]).rewrite(before)
    golden("fold_norm.before", graph_text(before.graph))
    golden("fold_norm.rewritten", graph_text(rewritten.graph))
    golden("fold_norm.after", graph_text(folded(before).graph))
    assert fired(rewritten) == ["layer_norm"]
    assert [e.sites for e in rewritten.journal] == [(("linear", "linear"),)]
    assert {k: f.text for k, f in folded(before).formulas.items()} == {
        "q.weight": "mul(q.weight, ln.weight)",
        "q.bias": "mv(q.weight, ln.bias)",
    }


@pytest.mark.parametrize("kind", ["layer", "scale", "rms"])
def test_every_site_of_a_stack(kind: str) -> None:
    before = stack(kind)
    after = folded(before, expect=3)
    assert_equal(before, after)
    assert not [k for k in after.tensors if ".ln." in k]
    assert ("h.0.k.bias" in after.tensors) == (kind == "layer")
    with pytest.raises(PipelineError, match="fold-norm fired 3 times, 4 expected"):
        folded(before, expect=4)


# contract


@settings(max_examples=30)
@given(data=st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_folding_is_exact(data: list[int]) -> None:
    pick = iter(data)

    def of(*options: Any) -> Any:
        return options[next(pick) % len(options)]

    s = Sketch()
    dtype, d = of(*DTYPES), of(4, 6, 8)
    # Square weights as well: vocabulary, MLP and width of one size.
    x = s.input("x", of("B", 2, 1), of("T", 3, 1), d, dtype=dtype)
    n = norm(s, x, kind=of("layer", "scale", "rms"))
    views = of((), ((aten.reshape.default, [-1, d]),), ((aten.transpose.int, 0, 1),))
    for view in views:
        n = s.call(view[0], n, *view[1:])
    first = linear(s, n, "a", of(d, 5), of(True, False))
    second = linear(s, n, "b", d, of(True, False))
    tied = s.call(aten.linear.default, n, s.weight("tied", d, d, dtype=dtype, like="b.weight"))
    before = s.done(first, second, tied)
    assert_equal(before, folded(before, expect=1))


def test_a_tied_head_unties_and_leaves_the_table_alone() -> None:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    table = s.weight("embed.weight", 11, 8)
    n = norm(s, s.call(aten.embedding.default, table, ids))
    head = s.call(aten.linear.default, n, s.weight("head.weight", 11, 8, like="embed.weight"))
    before = s.done(head)
    after = folded(before)
    assert_equal(before, after)
    assert after.tensors["embed.weight"] is before.tensors["embed.weight"]
    assert after.tensors["head.weight"] is not before.tensors["embed.weight"]


def test_a_block_applied_three_times_is_three_weights() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    parts = [s.weight(k, *n) for k, n in {"g": [8], "s": [8], "W": [8, 8], "b": [8]}.items()]
    for _ in range(3):
        n = s.call(aten.layer_norm.default, x, [8], *parts[:2], 1e-5, path="ln")
        x = s.call(aten.add.Tensor, x, s.call(aten.linear.default, n, *parts[2:], path="q"))
    before = s.done(x)
    after = folded(before, expect=3)
    assert_equal(before, after)
    assert {f.text for f in after.formulas.values()} == {"mul(W, g)", "add(b, mv(W, s))"}


def test_one_plus_the_weight_folds_as_it_is_computed() -> None:
    s = Sketch()
    x = s.input("x", "B", "T", 8)
    g = s.call(aten.add.Tensor, s.weight("ln.weight", 8), 1.0)
    before = s.done(linear(s, norm(s, x, kind="rms", g=g), "q", 8))
    after = folded(before, expect=1)
    assert_equal(before, after)
    assert after.formulas["q.weight"].text == "mul(q.weight, add(ln.weight, 1.0))"


def test_readers_behind_views_and_casts() -> None:
    def feed(s: Sketch, n: fx.Node) -> fx.Node:
        last = s.call(aten.index.Tensor, n, [None, s.call(aten.arange.default, 1)])
        flat = s.call(aten.reshape.default, s.call(aten.to.dtype, n, torch.float32), [-1, 8])
        s.call(aten.linear.default, last, s.weight("last", 5, 8, dtype=torch.bfloat16))
        return s.call(aten.linear.default, flat, s.weight("flat", 5, 8), s.weight("b", 5))

    before = one(feed, dtype=torch.bfloat16)
    after = folded(before, expect=1)
    assert_equal(before, after)
    assert {k: t.dtype for k, t in after.tensors.items()} == {
        "flat": torch.float32,
        "b": torch.float32,
    }


def test_a_reader_of_less_precision() -> None:
    def feed(s: Sketch, n: fx.Node) -> fx.Node:
        return linear(s, s.call(aten.to.dtype, n, torch.bfloat16), "q", 5)

    after = folded(before := one(feed), expect=1)
    assert_equal(before, after)
    assert {t.dtype for t in after.tensors.values()} == {torch.bfloat16}


def test_a_norm_read_by_a_router_and_by_every_expert() -> None:
    def feed(s: Sketch, n: fx.Node) -> fx.Node:
        gates = s.call(aten.softmax.int, linear(s, n, "router", 3, bias=False), -1)
        experts = s.call(aten.reshape.default, s.weight("experts", 3, 5, 8), [15, 8])
        each = s.call(aten.unflatten.int, s.call(aten.linear.default, n, experts), -1, [3, 5])
        return s.call(aten.einsum.default, "bte,bteh->bth", [gates, each])

    before = one(feed)
    assert_equal(before, folded(before, expect=1))


def test_split_keeps_the_value_of_the_other_readers() -> None:
    def feed(s: Sketch, n: fx.Node) -> fx.Node:
        turned = s.call(aten.transpose.int, n, 0, 1)
        q = s.call(aten.transpose.int, linear(s, turned, "q", 8), 0, 1)
        return s.call(aten.add.Tensor, q, s.call(aten.tanh.default, n))

    before = one(feed)
    assert fired(folded(before)) == []
    after = folded(before, split=True, expect=1)
    assert_equal(before, after)
    assert after.journal[0].note == "kept affine for tanh"
    kept = every_value(before)["tanh"], every_value(after)["tanh"]
    torch.testing.assert_close(*kept, rtol=0, atol=0)
    assert fired(folded(after, split=True)) == []
    whole = stack()
    assert graph_text(folded(whole, split=True).graph) == graph_text(folded(whole).graph)


def parts(s: Sketch, n: fx.Node) -> fx.Node:
    """Heads of channels, halves, one channel and all of them twice, each read by a linear op."""
    first = linear(s, s.call(aten.slice.Tensor, n, 2, 0, 4), "first", 8)
    pieces = s.call(aten.split.Tensor, n, 4, -1)
    second = linear(s, s.call(operator.getitem, pieces, 1), "second", 8, bias=False)
    heads = s.call(aten.transpose.int, s.call(aten.unflatten.int, n, -1, [2, 4]), 1, 2)
    third = s.call(aten.sum.dim_IntList, linear(s, heads_of(s, heads), "third", 8), [1])
    twice = linear(s, s.call(aten.cat.default, [n, s.call(aten.flip.default, n, [-1])], -1), "l", 8)
    total = s.call(aten.add.Tensor, s.call(aten.add.Tensor, first, second), third)
    return s.call(aten.add.Tensor, total, twice)


def heads_of(s: Sketch, heads: fx.Node) -> fx.Node:
    back = s.call(aten.transpose.int, heads, 1, 2)
    return s.call(aten.unsqueeze.default, s.call(aten.reshape.default, back, [3, -1, 8]), 1)


def experts(s: Sketch, n: fx.Node) -> fx.Node:
    """Each expert sees every row; then each row is read by the expert an index picks for it."""
    rows = s.call(aten.reshape.default, n, [-1, 8])
    every = s.call(aten.matmul.default, rows, s.weight("up", 3, 8, 5))
    chosen = s.input("chosen", 15, dtype=torch.int64)
    own = s.call(aten.index.Tensor, s.weight("own", 5, 5, 8), [chosen])
    turned = s.call(aten.transpose.int, own, 1, 2)
    one_each = s.call(aten.bmm.default, s.call(aten.unsqueeze.default, rows, 1), turned)
    einsum = s.call(aten.einsum.default, "td,edh->teh", [rows, s.weight("dense", 3, 8, 5)])
    return s.call(
        aten.add.Tensor,
        s.call(aten.sum.dim_IntList, every, [0]),
        s.call(
            aten.add.Tensor,
            s.call(aten.squeeze.dim, one_each, 1),
            s.call(aten.sum.dim_IntList, einsum, [1]),
        ),
    )


def gated(s: Sketch, n: fx.Node) -> fx.Node:
    gate = s.call(aten.sigmoid.default, linear(s, n, "gate", 8))
    padded = s.call(aten.constant_pad_nd.default, s.call(aten.mul.Tensor, n, gate), [0, 0, 1, 0])
    return linear(s, s.call(aten.slice.Tensor, padded, 1, 0, 3), "q", 8)


def mixed(s: Sketch, n: fx.Node) -> fx.Node:
    scores = s.call(aten.softmax.int, s.input("scores", "B", 3, 3), -1)
    return linear(s, s.call(aten.matmul.default, scores, n), "o", 8)


def convolved(s: Sketch, n: fx.Node) -> fx.Node:
    rows = s.call(aten.transpose.int, n, 1, 2)
    return s.call(aten.conv1d.default, rows, s.weight("conv", 5, 8, 2), s.weight("b", 5))


FOLLOWED: dict[str, tuple[Feed, tuple[str, ...]]] = {
    "parts of the channels": (parts, ("layer", "rms")),
    "experts": (experts, ("layer", "rms")),
    "gates": (gated, ("scale", "rms")),
    "attention": (mixed, ("layer", "rms")),
    "convolution": (convolved, ("layer", "rms")),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_readers_a_few_steps_away(case: str) -> None:
    feed, kinds = FOLLOWED[case]
    for kind in kinds:
        s = Sketch()
        n = norm(s, s.input("x", 5 if case == "experts" else "B", 3, 8), kind=kind)
        before = s.done(feed(s, n))
        after = folded(before, expect=1)
        assert_equal(before, after)
        assert fired(folded(after)) == []


# refuses


def both(s: Sketch, n: fx.Node, other: fx.Node) -> fx.Node:
    return s.call(aten.add.Tensor, linear(s, n, "q", 8), other)


def as_weight(s: Sketch, n: fx.Node) -> fx.Node:
    rows = s.call(aten.reshape.default, n, [-1, 8])
    return s.call(aten.linear.default, s.weight("y", 3, 8), rows)


def crossed(s: Sketch, n: fx.Node) -> fx.Node:
    return linear(s, s.call(aten.transpose.int, n, 1, 2), "q", 3)


def rotated(s: Sketch, n: fx.Node) -> fx.Node:
    halves = [s.call(aten.slice.Tensor, n, 2, *cut) for cut in ((4, 8), (0, 4))]
    turned = s.call(aten.cat.default, [s.call(aten.neg.default, halves[0]), halves[1]], -1)
    cos, sin = (s.call(op, s.input(op.__name__, 3, 8)) for op in (aten.cos, aten.sin))
    a, b = s.call(aten.mul.Tensor, n, cos), s.call(aten.mul.Tensor, turned, sin)
    return s.call(aten.add.Tensor, a, b)


REFUSED: dict[str, tuple[Feed, str, str]] = {
    "residual": (
        lambda s, n: both(s, n, n),
        "layer",
        "%add also adds it to the stream %linear; only linear readers can absorb the gain",
    ),
    "activation": (
        lambda s, n: both(s, n, s.call(aten.tanh.default, n)),
        "layer",
        "%tanh reads it non-linearly (tanh): a scale would be seen",
    ),
    "output": (
        lambda s, n: n,
        "layer",
        "it is output 0 of the model; allowed only under a contract that names it",
    ),
    "vector": (
        lambda s, n: s.call(aten.linear.default, n, s.weight("w", 8)),
        "layer",
        "%linear (linear) has no weight of two axes that could take it up",
    ),
    "computed weight": (
        lambda s, n: s.call(aten.linear.default, n, s.call(aten.tanh.default, s.input("y", 8, 8))),
        "layer",
        "%linear (linear) multiplies it by %tanh, computed from the input",
    ),
    "as weight": (
        as_weight,
        "layer",
        "%linear (linear) has no weight of two axes that could take it up",
    ),
    "twice": (
        lambda s, n: s.call(aten.linear.default, n, s.call(aten.reshape.default, n, [-1, 8])),
        "layer",
        "%linear (linear) reads it twice, or beside its factors",
    ),
    "transposed": (crossed, "layer", "%linear (linear) also adds it to %q_bias"),
    "unread": (
        lambda s, n: s.call(aten.zeros_like.default, n),
        "layer",
        "no reader can take it up",
    ),
    "another norm": (
        lambda s, n: norm(s, n, "post"),
        "rms",
        "%layer_norm (layer_norm) normalises it",
    ),
    "rotary": (
        rotated,
        "rms",
        "joined with a rotated copy of itself at %add: channels 0 and 4 meet",
    ),
    "gate with a shift": (
        lambda s, n: linear(s, s.call(aten.mul.Tensor, n, s.input("y", "B", 3, 8)), "q", 8),
        "layer",
        "%mul multiplies it by %y, computed from the input: the shift would follow the gate",
    ),
    "query": (
        lambda s, n: s.call(
            aten.scaled_dot_product_attention.default, n, *[s.input(k, "B", 3, 8) for k in "kv"]
        ),
        "rms",
        "%scaled_dot_product_attention (scaled_dot_product_attention) reads it as its query",
    ),
    "padding with a shift": (
        lambda s, n: linear(s, s.call(aten.constant_pad_nd.default, n, [0, 0, 1, 0]), "q", 8),
        "layer",
        "%constant_pad_nd pads rows that do not carry the shift",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_who_reads_it(case: str) -> None:
    feed, kind, reason = REFUSED[case]
    s = Sketch()
    n = norm(s, s.input("x", "B", 3, 8), kind=kind)
    before = s.done(feed(s, n))
    after = folded(before)
    refused = [r for r in after.reports[-1].refused if r.path == "ln"]
    assert [(r.root, r.reason) for r in refused] == [(n.name, reason)]
    named = re.search(r"%(\w+)", reason)
    blamed = "output" if "output 0" in reason else named[1] if named else n.name
    assert refused[0].blame.split()[0] == f"%{blamed}"
    assert graph_text(after.graph) == graph_text(before.graph)
    again = folded(after, split=True)
    assert graph_text(again.graph) == graph_text(before.graph) or case in SPLIT


SPLIT = ("residual", "activation")


def test_a_norm_over_two_axes_is_refused() -> None:
    s = Sketch()
    x = s.input("x", "B", 4, 8)
    n = s.call(aten.layer_norm.default, x, [4, 8], s.weight("g", 4, 8), s.weight("s", 4, 8))
    after = folded(s.done(linear(s, n, "q", 8)))
    reason = "the scale has 2 axes; the fold is written for one"
    assert [r.reason for r in after.reports[-1].refused] == [reason]


def test_a_norm_without_scale_is_none_of_its_business() -> None:
    s = Sketch()
    n = s.call(aten.layer_norm.default, s.input("x", "B", 8), [8])
    after = folded(s.done(linear(s, n, "q", 8)))
    assert (after.reports[-1].fired, after.reports[-1].refused) == ((), ())


# faults


Fold = Callable[[At, Sink, Any, Any], dict[str, fx.Node]]
right: Fold = fold_norm.fold_into


def call(at: At, op: Any, *args: Any) -> fx.Node:
    return at.call(op, *args)


def one_column(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    changed = right(at, r, g, s)
    column = call(at, aten.select.int, r.W, 1, 2)
    W = call(at, aten.select_scatter.default, changed["weight"], column, 1, 2)
    return {**changed, "weight": W}


def twice(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    changed = right(at, r, g, s)
    return {**changed, "weight": call(at, aten.mul.Tensor, changed["weight"], g)}


def rows(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    column = call(at, aten.unsqueeze.default, g, 1)
    return {**right(at, r, g, s), "weight": call(at, aten.mul.Tensor, r.W, column)}


def scaled_shift(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    W = call(at, aten.mul.Tensor, r.W, g)
    Ws = call(at, aten.mv.default, W, s)
    return {"weight": W, "shift": Ws}


def wrong_sign(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    changed = right(at, r, g, s)
    return {**changed, "shift": call(at, aten.neg.default, changed["shift"])}


def one_plus(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
    return right(at, r, call(at, aten.add.Tensor, g, 1.0), s)


FAULTS: dict[str, Fold] = {
    "no bias": lambda at, r, g, s: {"weight": right(at, r, g, s)["weight"]},
    "no weight": lambda at, r, g, s: {"shift": right(at, r, g, s)["shift"]},
    "one reader": lambda at, r, g, s: right(at, r, g, s) if r.b is not None else {},
    "one plus": one_plus,
    "one column": one_column,
    "twice": twice,
    "rows": rows,
    "scaled shift": scaled_shift,
    "wrong sign": wrong_sign,
}


def test_a_weight_edited_in_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = stack()

    def in_place(at: At, r: Sink, g: fx.Node, s: fx.Node) -> dict[str, fx.Node]:
        with torch.no_grad():
            before.tensors[str(r.W.target)].mul_(before.tensors[str(g.target)])  # type: ignore[arg-type]
        return right(at, r, None, s)

    monkeypatch.setattr(fold_norm, "fold_into", in_place)
    with pytest.raises(RewriteError, match=r"fold-norm wrote to h\.\d\.\w\.weight"):
        folded(before)


def blamed(after: Program) -> str:
    with pytest.raises(ContractError) as caught:
        prove(after)
    text = str(caught.value)
    assert text.startswith("fold-norm broke its contract exact: %linear")
    return text.splitlines()[1].strip()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_norm_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(at: At, r: Sink, g: Any, s: Any) -> dict[str, fx.Node]:
        here = r.value.name == ("layer_norm", "layer_norm_1", "layer_norm_2")[place]
        return (FAULTS[fault] if here else right)(at, r, g, s)

    monkeypatch.setattr(fold_norm, "fold_into", planted)
    before = stack()
    root = "layer_norm" + (f"_{place}" if place else "")
    line = f"at %{root}  h.{place}.ln  model.py:7  self.h.{place}.ln(x)"
    assert blamed(folded(before)) == f"{line}  (rewrite {2 - place} of 3)"


def test_the_gain_of_one_plus_the_weight_taken_for_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fold_norm, "fold_into", lambda at, r, g, s: right(at, r, g.args[0], s))
    s = Sketch()
    g = s.call(aten.add.Tensor, s.weight("ln.weight", 8), 1.0)
    before = s.done(linear(s, norm(s, s.input("x", "B", 8), kind="rms", g=g), "q", 8))
    assert blamed(folded(before)).startswith("at %rms_norm  ln")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_changed_eps_is_found_and_blamed(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(m: Match, edit: Edit) -> None:
        fold_norm.replace(m, edit)
        if m.norm.name == ("layer_norm", "layer_norm_1", "layer_norm_2")[place]:
            edit.before(m.norm).set(m.norm, eps=1e-6)

    pattern = fold_norm.WHOLE.pattern
    monkeypatch.setattr(fold_norm, "WHOLE", Rule(pattern, fold_norm.unless, planted))
    assert f"h.{place}.ln" in blamed(folded(stack()))


def test_an_output_forgotten_as_a_reader_is_found_at_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgetful = Rule(fold_norm.SPLIT.pattern, fold_norm.unless, fold_norm.replace)
    monkeypatch.setattr(fold_norm, "WHOLE", forgetful)
    s = Sketch()
    n = norm(s, s.input("x", "B", 8))
    after = folded(s.done(linear(s, n, "q", 8), n))
    with pytest.raises(ContractError, match=r"exact: \[1\] differs"):
        prove(after)


def test_a_fault_is_found_at_the_outputs_when_no_site_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fold_norm, "fold_into", FAULTS["one column"])
    after = Pipeline([FoldNorm()]).rewrite(stack())
    silent = tuple(replace(e, sites=()) for e in after.stages[1].rewrites)
    stages = (after.stages[0], replace(after.stages[1], rewrites=silent))
    with pytest.raises(ContractError, match=r"fold-norm broke its contract exact: \[0\] differs"):
        prove(replace(after, stages=stages))


# again


@pytest.mark.parametrize("split", [False, True])
def test_a_second_run_changes_nothing(split: bool) -> None:
    for before in (stack(), stack("rms")):
        for run in (
            Pipeline([FoldNorm(split=split)]).rewrite,
            Pipeline([FoldNorm(split=split)]).run,
        ):
            after = run(before)
            again = run(after)
            assert again.reports[-1].fired == ()
            assert graph_text(again.graph) == graph_text(after.graph)


def test_every_node_is_described_and_every_parameter_is_read() -> None:
    before = stack()
    for after in (Pipeline([FoldNorm()]).rewrite(before), folded(before)):
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        assert len({native_name(n) for n in calls}) == len(calls)
        assert {str(n.target) for n in after.graph.nodes if n.op == "get_attr"} <= set(
            after.tensors
        )
    sources = {s for f in after.formulas.values() for s in f.sources}
    assert set(before.tensors) - set(after.tensors) <= sources
    assert node(after, "layer_norm").meta["nn_module_stack"]
