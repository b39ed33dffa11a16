"""Heads and token tables: which linear op gives the logits, what it reaches, and how one knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Sketch
from torch import fx

from lensfx import Program
from lensfx.analysis import heads, token_tables, unembedding
from lensfx.graph.ops import hook_point

aten = torch.ops.aten
VOCAB, WIDTH = 11, 8
Tail = Callable[[Sketch, fx.Node], Any]


def model(tail: Tail = lambda s, y: y, rows: int = VOCAB, **given: Any) -> Program:
    """Tokens, a table, a layer and a head, and what is made of its result."""
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    x = s.call(aten.embedding.default, s.weight("embed", given.get("vocab", VOCAB), WIDTH), ids)
    x = s.call(aten.tanh.default, s.call(aten.linear.default, x, s.weight("mid", WIDTH, WIDTH)))
    x = given.get("before", lambda s, x: x)(s, x)
    W = s.weight("head", rows, WIDTH, like=given.get("like", ""))
    found = tail(s, s.call(aten.linear.default, x, W))
    return s.done(*(found if isinstance(found, tuple) else (found,)))


def named(program: Program, *outputs: str) -> Program:
    return replace(program, signature=replace(program.signature, outputs=outputs))


def evidence(program: Program) -> str:
    (head,) = heads(program)
    return head.evidence


def on_last(name: str, *args: Any) -> Tail:
    packet, _, overload = name.partition(".")
    target = getattr(getattr(aten, packet), overload or "default")
    return lambda s, y: s.call(target, y, *args)


def cross_entropy(s: Sketch, y: fx.Node) -> fx.Node:
    targets = s.call(aten.reshape.default, s.input("targets", "B", "T", dtype=torch.int64), [-1])
    return s.call(
        aten.cross_entropy_loss.default, s.call(aten.flatten.using_ints, y, 0, 1), targets
    )


def likelihood(s: Sketch, y: fx.Node) -> fx.Node:
    targets = s.call(aten.reshape.default, s.input("targets", "B", "T", dtype=torch.int64), [-1])
    rows = s.call(aten.log_softmax.int, s.call(aten.flatten.using_ints, y, 0, 1), -1)
    return s.call(aten.nll_loss_nd.default, rows, targets)


def test_what_is_evidence() -> None:
    assert evidence(model()) == "it has one row for each row of embed"
    assert evidence(model(like="embed")) == "its weight is tied to embed"
    assert evidence(model(on_last("softmax.int", -1), 5)) == "a softmax reads it"
    assert evidence(model(on_last("log_softmax.int", -1), 5)) == "a log_softmax reads it"
    assert evidence(model(cross_entropy, 5)) == "a cross_entropy_loss reads it"
    assert evidence(model(likelihood, 5)) == "a log_softmax reads it"
    words = "the model calls it logits, and it has one row for each row of embed"
    for name in ("logits", "['logits']", "out.logits", "0['lm_logits']"):
        assert evidence(named(model(), name)) == words, name


def test_what_is_none() -> None:
    assert evidence(model(rows=5)) == ""
    assert evidence(named(model(rows=5), "logits")) == ""
    assert evidence(named(model(), "last_hidden_state")) == ""
    # A single number is no distribution, whatever it is called.
    assert evidence(named(model(rows=1, vocab=1), "logits")) == ""
    assert evidence(model(on_last("softmax.int", -1), 1)) == ""


def test_equal_sizes_are_no_evidence_where_they_may_coincide() -> None:
    square = model(rows=WIDTH, vocab=WIDTH)
    assert evidence(square) == ""
    assert evidence(named(square, "logits")).startswith("the model calls it logits")
    assert evidence(model(rows=WIDTH, vocab=WIDTH, like="embed")) == "its weight is tied to embed"
    pooled = model(before=lambda s, x: s.call(aten.mean.dim, x, [1]))
    assert evidence(pooled) == ""


def test_a_table_of_segments_is_not_the_vocabulary() -> None:
    s = Sketch()
    given = [s.input(name, "B", "T", dtype=torch.int64) for name in ("kinds", "ids")]
    tables = [s.weight("kinds.weight", 5, WIDTH), s.weight("words.weight", VOCAB, WIDTH)]
    looked_up = [s.call(aten.embedding.default, *p) for p in zip(tables, given, strict=True)]
    x = s.call(aten.add.Tensor, *looked_up)
    program = s.done(s.call(aten.linear.default, x, s.weight("head", 5, WIDTH)))
    assert evidence(program) == ""


def test_a_tie_is_seen_through_a_transposition_and_a_cast() -> None:
    s = Sketch()
    ids = s.input("ids", "B", dtype=torch.int64)
    table = s.weight("embed", VOCAB, VOCAB)
    x = s.call(aten.embedding.default, table, ids)
    W = s.call(aten.to.dtype, s.call(aten.t.default, table), torch.float32)
    assert evidence(s.done(s.call(aten.linear.default, x, W))) == "its weight is tied to embed"


# which outputs it reaches, and which of them are still its rows


def pair(tail: Tail) -> Tail:
    return lambda s, y: (y, tail(s, y))


REACHED: dict[str, tuple[Tail, tuple[int, ...], tuple[int, ...]]] = {
    "itself": (lambda s, y: y, (0,), (0,)),
    "twice": (lambda s, y: (y, y), (0, 1), (0, 1)),
    "scaled and shifted": (
        lambda s, y: s.call(
            aten.add.Tensor, s.call(aten.mul.Tensor, y, 0.5), s.weight("late", VOCAB)
        ),
        (0,),
        (0,),
    ),
    "the last position": (on_last("select.int", 1, -1), (0,), (0,)),
    "some positions": (
        lambda s, y: s.call(aten.index.Tensor, y, [None, s.call(aten.arange.default, 1)]),
        (0,),
        (0,),
    ),
    "masked positions": (
        lambda s, y: s.call(
            aten.index.Tensor, y, [s.call(aten.gt.Scalar, s.input("mask", "B", "T"), 0.0)]
        ),
        (0,),
        (0,),
    ),
    "rows cut off": (on_last("slice.Tensor", 2, 0, 7), (0,), (0,)),
    "flat": (on_last("flatten.using_ints", 0, 1), (0,), (0,)),
    "mean over positions": (on_last("mean.dim", [1]), (0,), (0,)),
    "a hook": (lambda s, y: s.call(hook_point, y, "unembed.hook_out"), (0,), (0,)),
    "mean over rows": (pair(on_last("mean.dim", [-1], True)), (0, 1), (0,)),
    "sum of everything": (pair(on_last("sum")), (0, 1), (0,)),
    "the largest": (pair(on_last("amax", [-1], True)), (0, 1), (0,)),
    "the largest, spread out": (
        pair(
            lambda s, y: s.call(
                aten.expand.default, s.call(aten.amax.default, y, [-1], True), [-1, -1, 7]
            )
        ),
        (0, 1),
        (0,),
    ),
    "turned": (on_last("transpose.int", 1, 2), (0,), ()),
    "one row": (on_last("select.int", 2, 0), (0,), ()),
    "picked rows": (
        lambda s, y: s.call(aten.index.Tensor, y, [None, None, s.call(aten.arange.default, 2)]),
        (0,),
        (),
    ),
    "probabilities": (on_last("softmax.int", -1), (0,), ()),
    "joined": (lambda s, y: s.call(aten.cat.default, [y, y], -1), (0,), ()),
}


@pytest.mark.parametrize("case", REACHED)
def test_outputs_and_logits(case: str) -> None:
    tail, outputs, logits = REACHED[case]
    (head,) = heads(model(tail))
    assert head.linear.name == "linear_1"
    assert (head.outputs, head.logits) == (outputs, logits)


NO_HEAD: dict[str, Tail] = {
    "another weight": lambda s, y: s.call(aten.matmul.default, y, s.weight("V", VOCAB, 3)),
    "a norm": on_last("layer_norm", [VOCAB]),
    "a product with itself": lambda s, y: s.call(
        aten.matmul.default, y, s.call(aten.transpose.int, y, 1, 2)
    ),
    "joined with an input": lambda s, y: s.call(
        aten.add.Tensor, y, s.input("other", "B", "T", VOCAB)
    ),
    "unread": lambda s, y: s.call(aten.zeros_like.default, y),
}


@pytest.mark.parametrize("case", NO_HEAD)
def test_what_goes_on_is_no_head(case: str) -> None:
    assert "linear_1" not in [h.linear.name for h in heads(model(NO_HEAD[case]))]


def test_a_computed_weight_is_no_head() -> None:
    s = Sketch()
    x, W = s.input("x", "B", WIDTH), s.input("W", 5, WIDTH)
    assert heads(s.done(s.call(aten.linear.default, x, W))) == []


def test_the_unembedding_is_the_only_one_or_the_likely_one() -> None:
    assert unembedding(model(rows=5)) is not None
    s = Sketch()
    ids = s.input("ids", "B", dtype=torch.int64)
    x = s.call(aten.embedding.default, s.weight("embed", VOCAB, WIDTH), ids)
    value, logits, aux = (
        s.call(aten.linear.default, x, s.weight(f"w{rows}", rows, WIDTH)) for rows in (1, VOCAB, 3)
    )
    program = s.done(value, logits, aux)
    assert [h.outputs for h in heads(program)] == [(0,), (1,), (2,)]
    assert unembedding(program) is logits
    s = Sketch()
    x = s.input("x", "B", WIDTH)
    both = [s.call(aten.linear.default, x, s.weight(f"w{i}", 3, WIDTH)) for i in range(2)]
    assert unembedding(s.done(*both)) is None


# token tables


def tables(feed: Callable[[Sketch, fx.Node], fx.Node]) -> list[str]:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    return [n.name for n in token_tables(s.done(feed(s, ids)))]


def test_token_tables() -> None:
    def embedded(s: Sketch, ids: fx.Node) -> fx.Node:
        return s.call(aten.embedding.default, s.weight("W", VOCAB, WIDTH), ids)

    assert tables(embedded) == ["embedding"]
    assert tables(lambda s, ids: s.call(aten.index.Tensor, s.weight("W", VOCAB, WIDTH), [ids])) == [
        "index"
    ]
    assert tables(
        lambda s, ids: embedded(
            s, s.call(aten.to.dtype, s.call(aten.reshape.default, ids, [-1]), torch.int32)
        )
    ) == ["embedding"]
    assert tables(lambda s, ids: embedded(s, s.call(aten.add.Tensor, ids, 1))) == ["embedding"]


def test_what_is_no_token_table() -> None:
    def table(s: Sketch, ids: Any) -> fx.Node:
        return s.call(aten.embedding.default, s.weight("W", VOCAB, WIDTH), ids)

    assert tables(lambda s, ids: table(s, s.call(aten.arange.default, 5))) == []
    assert (
        tables(
            lambda s, ids: table(
                s, s.call(aten.mul.Tensor, ids, s.input("m", "B", "T", dtype=torch.int64))
            )
        )
        == []
    )
    assert (
        tables(
            lambda s, ids: s.call(
                aten.index.Tensor, s.call(aten.tanh.default, s.input("y", VOCAB, 3)), [ids]
            )
        )
        == []
    )
    whole = torch.arange(VOCAB)
    assert tables(lambda s, ids: s.call(aten.index.Tensor, s.stored("remap", whole), [ids])) == []
