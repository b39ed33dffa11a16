"""The residual stream: found where it is plain and pre-norm, and never where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch, node
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lensfx import Program
from lensfx.analysis import Block, Stream, Unknown, residual_stream
from lensfx.graph.ops import hook_point

aten = torch.ops.aten
WIDTH, HEADS, VOCAB = 8, 2, 11
Part = Callable[["Plan", fx.Node], fx.Node]


class Plan(Sketch):
    """A decoder written by its parts; weights are numbered as they come."""

    def __init__(self, *lead: int | str) -> None:
        super().__init__()
        self.ids = self.input("ids", *(lead or ("B", "T")), dtype=torch.int64)
        self.count = 0

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        packet, _, overload = name.partition(".")
        return self.call(getattr(getattr(aten, packet), overload or "default"), *args, **kwargs)

    def fresh(self, *sizes: int) -> fx.Node:
        self.count += 1
        return self.weight(f"w{self.count}", *sizes)

    def size(self, axis: int) -> Any:
        n = self.ids.meta["val"].shape[axis]
        return n if isinstance(n, int) else self("sym_size.int", self.ids, axis)

    def embed(self) -> fx.Node:
        return self("embedding", self.fresh(VOCAB, WIDTH), self.ids)

    def places(self) -> fx.Node:
        return self("slice.Tensor", self.fresh(16, WIDTH), 0, 0, self.size(1))

    def norm(self, x: fx.Node) -> fx.Node:
        return self("layer_norm", x, [WIDTH])

    def linear(self, x: fx.Node, out: int = WIDTH) -> fx.Node:
        return self("linear", x, self.fresh(out, int(x.meta["val"].shape[-1])))

    def heads(self, x: fx.Node) -> fx.Node:
        apart = self("unflatten.int", self.linear(x), -1, [HEADS, WIDTH // HEADS])
        return self("transpose.int", apart, 1, 2)

    def joined(self, z: fx.Node) -> fx.Node:
        return self.linear(self("flatten.using_ints", self("transpose.int", z, 1, 2), 2))

    def attend(self, h: fx.Node) -> fx.Node:
        q, k, v = self.heads(h), self.heads(h), self.heads(h)
        return self.joined(self("scaled_dot_product_attention", q, k, v, None, 0.0, True))

    def attn(self, x: fx.Node) -> fx.Node:
        return self.attend(self.norm(x))

    def mlp(self, x: fx.Node) -> fx.Node:
        return self.linear(self("relu", self.linear(self.norm(x), 12)))

    def add(self, a: fx.Node, b: fx.Node, **alpha: int) -> fx.Node:
        return self("add.Tensor", a, b, **alpha)

    def finish(self, x: fx.Node) -> Program:
        return self.done(self.linear(self.norm(x), VOCAB))


def plain(p: Plan, x: fx.Node) -> fx.Node:
    x = p.add(x, p.attn(x))
    return p.add(x, p.mlp(x))


def stack(block: Part, depth: int = 2, start: Part = lambda p, x: x, *lead: int | str) -> Program:
    p = Plan(*lead)
    x = start(p, p.add(p.embed(), p.places()))
    for _ in range(depth):
        x = block(p, x)
    return p.finish(x)


def shape(found: Stream | Unknown) -> list[str]:
    assert isinstance(found, Stream), found
    return [_words(block) for block in found.blocks]


def _words(block: Block) -> str:
    parts = [w.kind for w in block.writes]
    return " | ".join(parts) if block.parallel else " ".join(parts)


def assert_joined(stream: Stream) -> None:
    """Every write is carry + branch, and each block starts where the one before it ended."""
    at = stream.start
    for block in stream.blocks:
        first, *_, last = [*block.writes, block.writes[-1]]
        assert first.carry is at
        for write in block.writes:
            assert write.branch in write.reader.args
            sides = (write.carry, write.branch if write.reader is write.add else write.reader)
            assert set(write.add.args) == set(sides)
        at = last.add
    assert at is stream.end


# what a plain stream is


def test_the_parts_of_a_plain_decoder() -> None:
    program = stack(plain)
    found = residual_stream(program)
    assert isinstance(found, Stream)
    assert shape(found) == ["attn mlp", "attn mlp"]
    assert_joined(found)
    names = (found.embed, found.pos_embed, found.start, found.end, found.ln_final, found.unembed)
    assert [n and n.name for n in names] == [
        *("embedding", "slice_1", "add", "add_4", "layer_norm_4", "linear_12")
    ]


FOUND: dict[str, tuple[Part, list[str]]] = {
    "attention alone": (lambda p, x: p.add(x, p.attn(x)), ["attn"] * 2),
    "mlp alone": (lambda p, x: p.add(x, p.mlp(x)), ["mlp"] * 2),
    "two attentions": (
        lambda p, x: plain(p, p.add(x, p.attn(x))),
        ["attn", "attn mlp", "attn", "attn mlp"],
    ),
    "two mlps": (
        lambda p, x: p.add(y := plain(p, x), p.mlp(y)),
        ["attn mlp", "mlp", "attn mlp", "mlp"],
    ),
    "parallel": (lambda p, x: p.add(p.add(x, p.attn(x)), p.mlp(x)), ["attn | mlp"] * 2),
    "parallel, mlp first": (lambda p, x: p.add(p.add(x, p.mlp(x)), p.attn(x)), ["mlp | attn"] * 2),
    "parallel in brackets": (
        lambda p, x: p.add(x, p.add(p.attn(x), p.mlp(x))),
        ["attn | mlp"] * 2,
    ),
    "brackets in front": (lambda p, x: p.add(p.add(p.mlp(x), p.attn(x)), x), ["attn | mlp"] * 2),
    "one norm for both": (
        lambda p, x: p.add(p.add(x, p.attend(h := p.norm(x))), p.linear(h)),
        ["attn | mlp"] * 2,
    ),
    "scaled branches": (
        lambda p, x: p.add(x, p("mul.Tensor", p.attn(x), p.fresh(WIDTH))),
        ["attn"] * 2,
    ),
    "norm behind as well": (lambda p, x: p.add(x, p.norm(p.attn(x))), ["attn"] * 2),
    "casts between": (
        lambda p, x: plain(p, p("to.dtype", p("to.dtype", x, torch.float64), torch.float32)),
        ["attn mlp"] * 2,
    ),
    "views between": (
        lambda p, x: plain(
            p,
            p("reshape", p("reshape", x, [-1, WIDTH]), [p.size(0), p.size(1), WIDTH]),
        ),
        ["attn mlp"] * 2,
    ),
    "gated mlp": (
        lambda p, x: p.add(
            x,
            p.linear(p("mul.Tensor", p("silu", p.linear(h := p.norm(x), 12)), p.linear(h, 12))),
        ),
        ["mlp"] * 2,
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
        ["mlp"] * 2,
    ),
    "rows and back": (
        lambda p, x: p.add(
            x,
            p(
                "reshape",
                p.linear(p("reshape", p.norm(x), [-1, WIDTH])),
                [p.size(0), p.size(1), WIDTH],
            ),
        ),
        ["mlp"] * 2,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_streams_that_are_found(case: str) -> None:
    block, blocks = FOUND[case]
    found = residual_stream(stack(block))
    assert shape(found) == blocks
    assert isinstance(found, Stream)
    assert case.endswith("between") or assert_joined(found) is None


def experts(p: Plan, h: fx.Node) -> tuple[fx.Node, fx.Node]:
    gates = p("softmax.int", p.linear(h, 3), -1)
    each = p("unflatten.int", p.linear(h, 3 * WIDTH), -1, [3, WIDTH])
    return gates, each


def summed(p: Plan, h: fx.Node) -> fx.Node:
    gates, each = experts(p, h)
    return p("sum.dim_IntList", p("mul.Tensor", p("unsqueeze", gates, -1), each), [-2])


def multiplied(p: Plan, h: fx.Node) -> fx.Node:
    gates, each = experts(p, h)
    return p("squeeze.dim", p("matmul", p("unsqueeze", gates, -2), each), -2)


@pytest.mark.parametrize(
    "mix",
    [
        summed,
        multiplied,
        lambda p, h: p("einsum", "bte,bteh->bth", list(experts(p, h))),
        lambda p, h: p("linear", summed(p, h), p.fresh(WIDTH, WIDTH)),
    ],
)
def test_a_softmax_over_experts_is_no_attention(mix: Part) -> None:
    found = residual_stream(stack(lambda p, x: p.add(p.add(x, p.attn(x)), mix(p, p.norm(x)))))
    assert shape(found) == ["attn | mlp"] * 2


def test_attention_written_out() -> None:
    def attn(p: Plan, x: fx.Node) -> fx.Node:
        h = p.norm(x)
        scores = p("matmul", p.heads(h), p("mT", p.heads(h)))
        z = p("matmul", p("to.dtype", p("softmax.int", scores, -1), torch.float32), p.heads(h))
        return p.joined(z)

    assert shape(residual_stream(stack(lambda p, x: p.add(x, attn(p, x))))) == ["attn"] * 2


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
        kinds.append("attn | mlp" if parallel else "attn mlp")
    found = residual_stream(p.finish(x))
    assert shape(found) == kinds


def test_batch_and_length_may_be_fixed_and_equal() -> None:
    assert shape(residual_stream(stack(plain, 2, lambda p, x: x, 4, 4))) == ["attn mlp"] * 2


def test_hook_points_are_looked_through() -> None:
    def hooked(p: Plan, x: fx.Node) -> fx.Node:
        x = p.call(hook_point, x, "a")
        y = p.call(hook_point, p.add(x, p.call(hook_point, p.attn(x), "b")), "c")
        return p.add(y, p.mlp(y))

    assert shape(residual_stream(stack(hooked))) == ["attn mlp"] * 2


# what is none


def mixed(mix: Part) -> Part:
    """A block with a third branch beside attention and the MLP."""
    return lambda p, x: plain(p, p.add(x, p.linear(mix(p, p.norm(x)))))


def time_mixed(p: Plan, x: fx.Node) -> fx.Node:
    turned = p("transpose.int", p.norm(x), 1, 2)
    return p.add(x, p("transpose.int", p("linear", turned, p.fresh(5, 5)), 1, 2))


def scrambled(p: Plan, h: fx.Node) -> fx.Node:
    return p("transpose.int", p("reshape", h, [p.size(1), p.size(0), WIDTH]), 0, 1)


NEITHER: dict[str, tuple[Part, str]] = {
    "running sum": (mixed(lambda p, h: p("cumsum", h, 1)), "cumsum"),
    "convolution": (
        mixed(
            lambda p, h: p(
                "transpose.int",
                p("conv1d", p("transpose.int", h, 1, 2), p.fresh(WIDTH, WIDTH, 1)),
                1,
                2,
            )
        ),
        "transpose",
    ),
    "mean over positions": (mixed(lambda p, h: p("mean.dim", h, [1], True)), "mean"),
    "the first position": (mixed(lambda p, h: p("slice.Tensor", h, 1, 0, 1)), "slice_2"),
    "picked positions": (
        mixed(lambda p, h: p("index.Tensor", h, [None, p("arange", 1)])),
        "index",
    ),
    "turned round": (mixed(lambda p, h: p("flip", h, [1])), "flip"),
    "shifted": (mixed(lambda p, h: p("roll", h, [1], [1])), "roll"),
    "scrambled rows": (mixed(scrambled), "reshape"),
    "softmax over positions": (mixed(lambda p, h: p("softmax.int", h, 1)), "softmax"),
    "weights by position": (
        mixed(lambda p, h: p("matmul", p("softmax.int", p.fresh(5, 5), -1), h)),
        "matmul",
    ),
    "norm over positions": (
        mixed(lambda p, h: p("layer_norm", h, [5, WIDTH])),
        "layer_norm_1",
    ),
}


@pytest.mark.parametrize("case", NEITHER)
def test_a_mixer_that_is_neither_ends_the_search(case: str) -> None:
    block, blamed = NEITHER[case]
    lead = ("B", 5) if case.startswith(("weights", "norm")) else ()
    program = stack(block, 2, lambda p, x: x, *lead)
    found = residual_stream(program)
    assert found == Unknown(
        f"%{blamed} is part of neither attention nor an MLP", node(program, blamed)
    )


def test_an_mlp_across_positions_is_none() -> None:
    program = stack(time_mixed, 2, lambda p, x: x, "B", 5)
    found = residual_stream(program)
    assert found == Unknown(
        "%transpose is part of neither attention nor an MLP", node(program, "transpose")
    )


RAW = "%{} reads the stream without a norm in front"
NOT_PLAIN: dict[str, tuple[Part, str, str]] = {
    "no norm": (lambda p, x: p.add(x, p.attend(x)), RAW, "linear"),
    "no norm at the mlp": (
        lambda p, x: p.add(y := p.add(x, p.attn(x)), p.linear(y)),
        RAW,
        "linear_4",
    ),
    "a gate without norm": (
        lambda p, x: p.add(x, p("mul.Tensor", p.attn(x), p("sigmoid", p.linear(x)))),
        RAW,
        "linear_4",
    ),
    "norm of twice the stream": (
        lambda p, x: p.add(x, p.attn(p("mul.Tensor", x, 2.0))),
        RAW,
        "mul",
    ),
    "alpha": (
        lambda p, x: p.add(x, p.attn(x), alpha=2),
        "%{} scales what it adds by its alpha",
        "add_1",
    ),
    "alpha on the stream": (
        lambda p, x: p.add(p.attn(x), x, alpha=2),
        "%{} scales what it adds by its alpha",
        "add_1",
    ),
    "post-norm": (
        lambda p, x: p.norm(p.add(x, p.attend(x))),
        "no residual add leads to %{}",
        "layer_norm_1",
    ),
    "subtracted": (
        lambda p, x: p("sub.Tensor", x, p.attn(x)),
        "no residual add leads to %{}",
        "sub_1",
    ),
    "scaled stream": (
        lambda p, x: plain(p, p("mul.Tensor", x, p.fresh())),
        "%{} mixes positions before the stream starts",
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_unknown(case: str) -> None:
    block, words, blamed = NOT_PLAIN[case]
    program = stack(block)
    assert residual_stream(program) == Unknown(words.format(blamed), node(program, blamed))


def test_programs_without_tokens_or_without_a_stream() -> None:
    s = Sketch()
    x = s.input("x", "B", WIDTH)
    vision = s.done(s.call(aten.linear.default, x, s.weight("W", WIDTH, WIDTH)))
    assert residual_stream(vision) == Unknown("no table is indexed by token ids")
    p = Plan()
    flat = p.finish(p.embed())
    assert residual_stream(flat) == Unknown(
        "no residual add leads to %embedding", node(flat, "embedding")
    )


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
    "computed positions": (
        lambda p, e: p.add(
            e,
            p(
                "sin",
                p(
                    "mul.Tensor",
                    p("unsqueeze", p("arange", p.size(1)), -1),
                    p("arange", WIDTH),
                ),
            ),
        ),
        "sin",
    ),
    "positions, then a norm": (lambda p, e: p.norm(p.add(e, p.places())), "slice_1"),
}


@pytest.mark.parametrize("case", START)
def test_the_position_embedding(case: str) -> None:
    start, wanted = START[case]
    p = Plan()
    found = residual_stream(p.finish(plain(p, start(p, p.embed()))))
    assert isinstance(found, Stream)
    assert (found.pos_embed and found.pos_embed.name) == wanted


def test_token_types_are_not_positions() -> None:
    p = Plan()
    kinds = p.input("kinds", "B", "T", dtype=torch.int64)
    types = p("embedding", p.fresh(7, WIDTH), kinds)
    x = p.add(p.add(p.embed(), types), p.places())
    found = residual_stream(p.finish(plain(p, x)))
    assert isinstance(found, Stream)
    assert found.pos_embed is not None
    assert found.pos_embed.name == "slice_1"


@pytest.mark.parametrize("scale", [3.0, "weight"])
def test_the_embedding_is_taken_with_its_scale(scale: float | str) -> None:
    p = Plan()
    by = p.fresh() if scale == "weight" else scale
    x = p.add(p("mul.Tensor", p.embed(), by), p.places())
    found = residual_stream(p.finish(plain(p, x)))
    assert isinstance(found, Stream)
    assert found.embed.name == "mul"


def test_the_head_is_the_one_with_evidence() -> None:
    p = Plan()
    h = p.norm(plain(p, p.embed()))
    value, logits = p.linear(h, 1), p.linear(h, VOCAB)
    found = residual_stream(p.done(value, logits))
    assert isinstance(found, Stream)
    assert found.unembed is logits


def test_of_two_heads_without_evidence_neither_is_named() -> None:
    p = Plan()
    h = p.norm(plain(p, p.embed()))
    found = residual_stream(p.done(p.linear(h, 3), p.linear(h, 4)))
    assert isinstance(found, Stream)
    assert found.unembed is None


def test_no_final_norm_and_no_head() -> None:
    p = Plan()
    x = plain(p, p.embed())
    found = residual_stream(p.done(x))
    assert isinstance(found, Stream)
    assert (found.ln_final, found.unembed, found.end) == (None, None, x)
