"""The structure of small hand-written graphs: one case for each form a stream is written in."""

from __future__ import annotations

import cProfile
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import VOCAB, WIDTH, Part, Plan, plain, stack
from torch import fx

from lensfx import Program
from lensfx.analysis.structure import Stream, Structure, structure
from lensfx.graph.ops import hook_point

aten = torch.ops.aten


def of(program: Program) -> tuple[Structure, Stream]:
    found = structure(program)
    assert found.stream is not None
    assert found.complete
    return found, found.stream


def words(program: Program) -> list[str]:
    """The kinds of each block, with a bar between those that read the same stream."""
    return [
        (" | " if b.parallel else " ").join(w.kind for w in b.writes) for b in of(program)[1].blocks
    ]


def test_the_parts_of_a_plain_decoder() -> None:
    program = stack(plain)
    found, stream = of(program)
    assert words(program) == ["attention mlp", "attention mlp"]
    names = (found.embed.node, found.pos_embed.node, stream.start, stream.end)
    assert [n.name for n in names] == ["embedding", "slice_1", "add", "add_4"]
    assert stream.final_norm is not None
    assert (stream.final_norm.node.name, found.unembed.name) == ("layer_norm_4", "linear_12")
    assert [w.add.name for w in stream.writes] == ["add_1", "add_2", "add_3", "add_4"]
    assert [w.value.name for w in stream.writes] == [
        "linear_3",
        "linear_5",
        "linear_9",
        "linear_11",
    ]
    assert [b.pre.name for b in stream.blocks] == ["add", "add_2"]


A, M = "attention", "mlp"
FOUND: dict[str, tuple[Part, list[str]]] = {
    "attention alone": (lambda p, x: p.add(x, p.attn(x)), [A] * 2),
    "mlp alone": (lambda p, x: p.add(x, p.mlp(x)), [M] * 2),
    "parallel": (lambda p, x: p.add(p.add(x, p.attn(x)), p.mlp(x)), [f"{A} | {M}"] * 2),
    "parallel, mlp first": (
        lambda p, x: p.add(p.add(x, p.mlp(x)), p.attn(x)),
        [f"{M} | {A}"] * 2,
    ),
    "parallel in brackets": (
        lambda p, x: p.add(x, p.add(p.attn(x), p.mlp(x))),
        [f"{A} | {M}"] * 2,
    ),
    "brackets in front": (
        lambda p, x: p.add(p.add(p.mlp(x), p.attn(x)), x),
        [f"{M} | {A}"] * 2,
    ),
    "one norm for both": (
        lambda p, x: p.add(p.add(x, p.attend(h := p.norm(x))), p.linear(h)),
        [f"{A} | {M}"] * 2,
    ),
    "no norm": (lambda p, x: p.add(x, p.attend(x)), [A] * 2),
    "post-norm": (lambda p, x: p.norm(p.add(x, p.attend(x))), [A] * 2),
    "scaled branches": (
        lambda p, x: p.add(x, p("mul.Tensor", p.attn(x), p.fresh(WIDTH))),
        [A] * 2,
    ),
    "scaled stream": (
        lambda p, x: plain(p, p("mul.Tensor", x, p.fresh())),
        [f"{A} {M}"] * 2,
    ),
    "norm behind as well": (lambda p, x: p.add(x, p.norm(p.attn(x))), [A] * 2),
    "subtracted": (lambda p, x: p("sub.Tensor", x, p.attn(x)), [A] * 2),
    "alpha": (lambda p, x: p.add(x, p.attn(x), alpha=2), [A] * 2),
    "alpha on the stream": (lambda p, x: p.add(p.attn(x), x, alpha=2), [A] * 2),
    "casts between": (
        lambda p, x: plain(p, p("to.dtype", p("to.dtype", x, torch.float64), torch.float32)),
        [f"{A} {M}"] * 2,
    ),
    "views between": (
        lambda p, x: plain(
            p, p("reshape", p("reshape", x, [-1, WIDTH]), [p.size(0), p.size(1), WIDTH])
        ),
        [f"{A} {M}"] * 2,
    ),
    "gate cut from one product": (
        lambda p, x: p.add(
            x,
            p.linear(
                p(
                    "mul.Tensor",
                    p("slice.Tensor", h := p.linear(p.norm(x), 12), 2, 0, 6),
                    p("slice.Tensor", h, 2, 6, 12),
                )
            ),
        ),
        ["gated_mlp"] * 2,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_streams_that_are_found(case: str) -> None:
    block, blocks = FOUND[case]
    assert words(stack(block)) == blocks


@pytest.mark.parametrize(
    ("case", "signs"), [("subtracted", -1.0), ("alpha", 2.0), ("alpha on the stream", 1.0)]
)
def test_the_sign_of_a_write(case: str, signs: float) -> None:
    assert {w.sign for w in of(stack(FOUND[case][0]))[1].writes} == {signs}


def turned(p: Plan, h: fx.Node) -> fx.Node:
    t = p("transpose.int", h, 1, 2)
    return p("transpose.int", p("conv1d", t, p.fresh(WIDTH, WIDTH, 3), None, [1], [1]), 1, 2)


@pytest.mark.parametrize("bracket", [True, False])
def test_one_norm_behind_two_parallel_branches_is_post_norm(bracket: bool) -> None:
    def block(p: Plan, x: fx.Node) -> fx.Node:
        a, m = p.attend(x), p.linear(p("relu", p.linear(x)))
        return p.norm(p.add(x, p.add(a, m)) if bracket else p.add(p.add(x, a), m))

    _, stream = of(stack(block))
    assert (stream.post_norm, stream.final_norm.node.name) == (True, "layer_norm_2")
    assert [w.norm_after is not None for w in stream.writes] == [False, True] * 2


def test_a_gate_made_of_the_other_gate_is_not_the_stream() -> None:
    def block(p: Plan, x: fx.Node) -> fx.Node:
        g = p("sigmoid", p.linear(x))
        kept = p("mul.Tensor", x, p("exp", p("neg", g)))
        return p.add(p("mul.Tensor", g, p.mlp(x)), kept)

    program = stack(block)
    assert words(program) == ["mlp"] * 2
    assert of(program)[1].start.name == "add"


MIXERS: dict[str, Part] = {
    "running sum": lambda p, h: p("cumsum", h, 1),
    "convolution": turned,
    "mean over positions": lambda p, h: p("mean.dim", h, [1], True),
    "the first position": lambda p, h: p("slice.Tensor", h, 1, 0, 1),
    "turned round": lambda p, h: p("flip", h, [1]),
    "shifted": lambda p, h: p("roll", h, [1], [1]),
    "softmax over positions": lambda p, h: p("softmax.int", h, 1),
}


@pytest.mark.parametrize("case", MIXERS)
def test_a_mixer_that_is_no_attention(case: str) -> None:
    program = stack(
        lambda p, x: p.add(y := p.add(x, p.linear(MIXERS[case](p, p.norm(x)))), p.mlp(y))
    )
    assert words(program) == ["mixer mlp"] * 2


def test_positions_that_the_stream_itself_moves_along_are_no_part_of_the_carry() -> None:
    def shifted(p: Plan, x: fx.Node) -> fx.Node:
        return plain(p, p.add(x, p("mul.Tensor", p("roll", x, [1], [1]), 0.5)))

    program = stack(shifted)
    assert [w.kind for b in of(program)[1].blocks for w in b.writes].count("attention") == 2
    assert sum(bool(set(w.branch.mixes) & {"shift"}) for w in of(program)[1].writes) == 2


@settings(max_examples=25)
@given(bits=st.integers(0, 2**16 - 1), depth=st.integers(1, 3))
def test_operands_views_and_casts_do_not_matter(bits: int, depth: int) -> None:
    bit = iter(bits >> i & 1 for i in range(99))
    p = Plan()

    def noise(x: fx.Node) -> fx.Node:
        if next(bit, 0):
            x = p("to.dtype", p("to.dtype", x, torch.float64), torch.float32)
        if next(bit, 0):
            x = p("reshape", p("unsqueeze", x, 0), [p.size(0), p.size(1), WIDTH])
        return x

    def add(a: fx.Node, b: fx.Node) -> fx.Node:
        a, b = noise(a), noise(b)
        return p.add(b, a) if next(bit, 0) else p.add(a, b)

    x = p.add(p.embed(), p.places())
    kinds = []
    for _ in range(depth):
        parallel = next(bit, 0)
        y = add(x, p.attn(x))
        x = add(y, p.mlp(x if parallel else y))
        kinds.append("attention | mlp" if parallel else "attention mlp")
    assert words(p.finish(x)) == kinds


def test_batch_and_length_may_be_fixed_and_equal() -> None:
    assert words(stack(plain, 2, lambda p, x: x, 4, 4)) == ["attention mlp"] * 2


def test_hook_points_are_looked_through() -> None:
    def hooked(p: Plan, x: fx.Node) -> fx.Node:
        x = p.call(hook_point, x, "a")
        y = p.call(hook_point, p.add(x, p.call(hook_point, p.attn(x), "b")), "c")
        return p.add(y, p.mlp(y))

    assert words(stack(hooked)) == ["attention mlp"] * 2


def test_no_add_is_no_stream() -> None:
    p = Plan()
    found = structure(p.finish(p.embed()))
    assert (found.stream, found.complete) == (None, False)


# the two ends

START: dict[str, tuple[Part, str | None]] = {
    "positions": (lambda p, e: p.add(e, p.places()), "slice_1"),
    "positions in front": (lambda p, e: p.add(p.places(), e), "slice_1"),
    "none": (lambda p, e: e, None),
    "one vector": (lambda p, e: p.add(e, p.fresh(WIDTH)), None),
    "one row": (lambda p, e: p.add(e, p.fresh(1, WIDTH)), None),
    "a row beside positions": (
        lambda p, e: p.add(p.add(e, p.fresh(1, WIDTH)), p.places()),
        "slice_1",
    ),
    "two tables": (lambda p, e: p.add(p.add(e, p.places()), p.places()), None),
    "positions, then a norm": (lambda p, e: p.norm(p.add(e, p.places())), "slice_1"),
}


@pytest.mark.parametrize("case", START)
def test_the_position_embedding(case: str) -> None:
    start, wanted = START[case]
    p = Plan()
    found, _ = of(p.finish(plain(p, start(p, p.embed()))))
    assert (found.pos_embed and found.pos_embed.node.name) == wanted


def test_the_bias_of_a_norm_is_no_embedding() -> None:
    p = Plan()
    scaled = p("mul.Tensor", flat_mean(p, p.add(p.embed(), p.places())), p.fresh(WIDTH))
    found, _ = of(p.finish(plain(p, p.add(scaled, p.fresh(WIDTH)))))
    assert [e.kind for e in found.embeddings] == ["token", "position"]


@pytest.mark.parametrize("first", [True, False])
def test_token_types_are_not_positions(first: bool) -> None:
    p = Plan()
    kinds = p.input("kinds", "B", "T", dtype=torch.int64)
    types = p("embedding", p.fresh(7, WIDTH), kinds)
    a, b = (types, p.places()) if first else (p.places(), types)
    found, _ = of(p.finish(plain(p, p.add(p.add(p.embed(), a), b))))
    assert [e.kind for e in found.embeddings] == ["token", "position", "type"]
    assert found.pos_embed.node.name == "slice_1"


@pytest.mark.parametrize("scale", [3.0, "weight"])
def test_the_embedding_is_taken_with_its_scale(scale: float | str) -> None:
    p = Plan()
    by = p.fresh() if scale == "weight" else scale
    x = p.add(p("mul.Tensor", p.embed(), by), p.places())
    found, _ = of(p.finish(plain(p, x)))
    assert (found.embed.node.name, found.embed.scaled.name) == ("embedding", "mul")


def test_the_head_is_the_one_with_evidence() -> None:
    p = Plan()
    h = p.norm(plain(p, p.embed()))
    value, logits = p.linear(h, 1), p.linear(h, VOCAB)
    assert of(p.done(value, logits))[0].unembed is logits


def test_of_two_heads_without_evidence_neither_is_named() -> None:
    p = Plan()
    h = p.norm(plain(p, p.embed()))
    assert of(p.done(p.linear(h, 3), p.linear(h, 4)))[0].unembed is None


def test_no_final_norm_and_no_head() -> None:
    p = Plan()
    x = plain(p, p.embed())
    found, stream = of(p.done(x))
    assert (stream.final_norm, found.unembed, stream.end) == (None, None, x)


# norms, in the spellings that are not in the models


def flat_mean(p: Plan, x: fx.Node) -> fx.Node:
    """Statistics without keepdim, their axis put back."""
    mean = p("unsqueeze", p("mean.dim", x, [-1]), -1)
    centred = p("sub.Tensor", x, mean)
    spread = p("mean.dim", p("pow.Tensor_Scalar", centred, 2), [-1])
    return p("div.Tensor", centred, p("unsqueeze", p("sqrt", spread), -1))


def both(p: Plan, x: fx.Node) -> fx.Node:
    pair = p("var_mean.correction", x, [-1], correction=0, keepdim=True)
    var, mean = (p.call(operator.getitem, pair, i) for i in (0, 1))
    return p("mul.Tensor", p("sub.Tensor", x, mean), p("rsqrt", var))


def euclid(p: Plan, x: fx.Node) -> fx.Node:
    return p("div.Tensor", x, p("linalg_vector_norm", x, 2, [-1], True))


@pytest.mark.parametrize(("norm", "kind"), [(flat_mean, "layer"), (both, "layer"), (euclid, "rms")])
def test_a_norm_in_any_spelling(norm: Part, kind: str) -> None:
    _, stream = of(stack(lambda p, x: p.add(x, p.attend(norm(p, x)))))
    assert [w.norm and w.norm.kind for w in stream.writes] == [kind] * 2


def share(p: Plan, x: fx.Node) -> fx.Node:
    return p("div.Tensor", x, p("sum.dim_IntList", x, [-1], True))


def over_heads(p: Plan, x: fx.Node) -> fx.Node:
    """A statistic over an axis that is as long as the last one, put where it does not belong."""
    apart = p("reshape", p.linear(x, 16), [p.size(0), p.size(1), 4, 4])
    rms = p("mean.dim", p("pow.Tensor_Scalar", apart, 2), [2])
    put = p("div.Tensor", apart, p("unsqueeze", rms, -1))
    return p("reshape", put, [p.size(0), p.size(1), 16])


@pytest.mark.parametrize("norm", [share, over_heads])
def test_what_is_no_norm(norm: Part) -> None:
    _, stream = of(stack(lambda p, x: p.add(x, p.linear(norm(p, x)))))
    assert [w.norm for w in stream.writes] == [None] * 2


def test_the_work_grows_with_the_depth_and_no_faster() -> None:
    def calls(depth: int) -> int:
        program = stack(plain, depth)
        profile = cProfile.Profile()
        profile.runcall(structure, program)
        return sum(entry.callcount for entry in profile.getstats())

    small, large = calls(8), calls(32)
    assert large < 4.4 * small
