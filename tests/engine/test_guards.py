"""A program answers exactly where the model would answer the same; elsewhere it says why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lensfx.capture import capture
from lensfx.errors import GuardError
from lensfx.graph.guards import Guards

torch.set_num_threads(1)
Body = Callable[..., Any]
Inputs = Callable[[int, int], tuple[Tensor, ...]]


class Net(nn.Module):
    """A body that reads the module as `m`."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin = nn.Linear(6, 6)
            self.embed = nn.Embedding(9, 6)
            self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(6))
        self.body = (body,)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.body[0](self, x) if y is None else self.body[0](self, x, y)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one(batch: int, length: int) -> tuple[Tensor, ...]:
    return (noise(batch, length, seed=batch),)


def two(batch: int, length: int) -> tuple[Tensor, ...]:
    return noise(batch, length, seed=batch), noise(batch, length, seed=100 + batch)


def wide(batch: int, length: int) -> tuple[Tensor, ...]:
    return (noise(batch, length, 6, seed=batch),)


def ids(batch: int, length: int) -> tuple[Tensor, ...]:
    return (torch.randint(9, (batch, length), generator=torch.Generator().manual_seed(batch)),)


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def agree(a: Any, b: Any) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(
        x.shape == y.shape and torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in pairs
    )


def answers(model: nn.Module, program: Any, inputs: Inputs, sizes: Any) -> set[tuple[int, int]]:
    """The sizes at which the program answers; it must be right there and refuse elsewhere."""
    answered = set()
    for batch, length in sizes:
        call = inputs(batch, length)
        try:
            got = program(*call)
        except GuardError:
            continue
        assert agree(got, model(*call)), (batch, length)
        answered.add((batch, length))
    return answered


SIZES = list(itertools.product((1, 2, 3, 6, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9)))
LENGTHS = set(range(1, 10))


# What the model does, its inputs, and at which sizes the program must answer.
BRANCHES: dict[str, tuple[Body, Inputs, Callable[[int, int], bool]]] = {
    "range": (lambda m, x: x * 2 if x.shape[1] > 5 else x * 3, one, lambda b, t: t > 5),
    "parity": (lambda m, x: x * 2 if x.shape[1] % 2 else x * 3, one, lambda b, t: t % 2 == 1),
    "one size": (lambda m, x: x * 2 if x.shape[1] == 7 else x * 3, one, lambda b, t: t == 7),
    "not one size": (lambda m, x: x * 2 if x.shape[1] == 4 else x * 3, one, lambda b, t: t != 4),
    "size 1": (lambda m, x: x * 2 if x.shape[1] == 1 else x * 3, one, lambda b, t: t != 1),
    "square": (lambda m, x: x * 2 if x.shape[0] == x.shape[1] else x * 3, one, lambda b, t: b != t),
    "product": (lambda m, x: x * 2 if x.numel() > 12 else x * 3, one, lambda b, t: b * t > 12),
    "both 1": (
        lambda m, x: x * 2 if x.shape[0] == 1 and x.shape[1] == 1 else x * 3,
        one,
        lambda b, t: (b, t) != (1, 1),
    ),
    "loop over positions": (
        lambda m, x: torch.stack([x[:, i] * i for i in range(x.shape[1])], 1),
        one,
        lambda b, t: t == 7,
    ),
    "loop over the batch": (
        lambda m, x: torch.stack([row * i for i, row in enumerate(x)]),
        one,
        lambda b, t: b == 2,
    ),
    "a product that is never small": (
        lambda m, x: x * 2 if x.shape[0] * x.shape[1] < 3 else x * 3,
        one,
        lambda b, t: b * t >= 3 and t > 1,
    ),
    "a product of other sizes than it": (
        lambda m, x: x * 2 if x.shape[0] * x.shape[1] - 3 else x * 3,
        one,
        lambda b, t: b * t != 3,
    ),
    "length as a Python int": (lambda m, x: x * len(x), one, lambda b, t: b == 2),
    "a limit": (
        lambda m, x: m.embed.weight[: x.shape[1]].t() @ x.t() if x.shape[1] <= 8 else x,
        one,
        lambda b, t: t <= 8,
    ),
}
FREE: dict[str, tuple[Body, Inputs]] = {
    "layers": (lambda m, x: m.lin(x).softmax(-1), wide),
    "over positions": (lambda m, x: m.lin(x).softmax(1).cumsum(1), wide),
    "embedding": (lambda m, x: m.embed(x), ids),
    "attention": (lambda m, x: m.mix(x, x, x)[0], wide),
    "causal attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        wide,
    ),
    "arange": (lambda m, x: x + torch.arange(x.shape[1]) * x.shape[0], one),
    "triangle": (lambda m, x: torch.ones(x.shape[1], x.shape[1]).tril() @ x.t(), one),
    "sizes as numbers": (lambda m, x: x * x.shape[1] ** -0.5 + x.size(0) - x.numel(), one),
    "last position": (lambda m, x: x[:, -1], one),
    "one pad token": (lambda m, x: F.pad(x, (1, 0)), one),
    "squeeze": (lambda m, x: x.squeeze(), one),
    "mask": (lambda m, x: x[x > 0], one),
    "nonzero": (lambda m, x: x.nonzero(), one),
    "item": (lambda m, x: x * x.sum().item(), one),
    "top": (lambda m, x: x.topk(min(5, x.shape[1]), 1), one),
    "two inputs": (lambda m, x, y: x @ y.t(), two),
}


@pytest.mark.parametrize("case", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_a_size_is_guarded(case: tuple[Body, Inputs, Callable[..., bool]]) -> None:
    body, inputs, expected = case
    model = Net(body)
    program = capture(model, *inputs(2, 7))
    wanted = {(b, t) for b, t in SIZES if expected(b, t)}
    assert answers(model, program, inputs, SIZES) == wanted


@pytest.mark.parametrize("example", [(2, 7), (1, 1), (6, 6)])
@pytest.mark.parametrize("case", FREE.values(), ids=FREE)
def test_sizes_that_the_code_leaves_open_are_free(
    case: tuple[Body, Inputs], example: tuple[int, int]
) -> None:
    """Also from an example of one token, and where batch, length and width are one number."""
    model = Net(case[0])
    program = capture(model, *case[1](*example))
    assert answers(model, program, case[1], SIZES) == set(SIZES)


@settings(max_examples=25)
@given(
    st.sampled_from(["<", "==", "!=", ">="]),
    st.sampled_from(["b", "t", "b * t", "t - b", "t // 2", "t % 3", "b + 2 * t", "max(b, t)"]),
    st.integers(0, 9),
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
)
def test_any_branch_on_sizes_is_right_or_refused(
    compare: str, size: str, bound: int, example: tuple[int, int]
) -> None:
    choose = eval(f"lambda b, t: {size} {compare} {bound}")
    model = Net(lambda m, x: x * 2 if choose(*x.shape) else x + 1)
    program = capture(model, *one(*example))
    answered = answers(model, program, one, itertools.product((1, 2, 3, 4), LENGTHS))
    assert example in answered


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_mask_of_ones_does_not_hide_what_happens_at_length_one(dtype: torch.dtype) -> None:
    model = Net(lambda m, x, y: x * y if x.shape[1] > 1 else x)
    program = capture(model, noise(2, 7), torch.ones(2, 7, dtype=dtype))
    x, y = noise(2, 1), torch.zeros(2, 1, dtype=dtype)
    with pytest.raises(GuardError, match=r"x\.size\(1\) is 1; .* only for at least 2"):
        program(x, y)
    assert agree(program(noise(1, 4), y[:1].expand(1, 4)), noise(1, 4) * 0)


def test_a_parameter_that_is_zero_does_not_hide_what_happens_at_batch_one() -> None:
    model = Net(lambda m, x: x + m.bias if x.shape[0] > 1 else x)
    program = capture(model, noise(2, 6))
    with pytest.raises(GuardError, match=r"x\.size\(0\) is 1"):
        program(noise(1, 6))


def test_a_path_of_its_own_at_length_one_that_makes_no_difference_is_allowed() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        if x.shape[1] > 1:
            scores = scores + torch.full((x.shape[1],) * 2, float("-inf")).triu(1)
        return scores.softmax(-1) @ m.lin(x)

    model = Net(body)
    assert answers(model, capture(model, *wide(2, 7)), wide, SIZES) == set(SIZES)


def test_three_axes_two_of_which_may_not_be_one_together() -> None:
    model = Net(lambda m, x: x * 2 if x.shape[0] == 1 and x.shape[2] == 1 else x * 3)
    program = capture(model, noise(2, 3, 4))
    assert program.guards.relations == ("not (x.size(0) == 1 and x.size(2) == 1)",)
    for shape in itertools.product((1, 3), repeat=3):
        if shape[0] == shape[2] == 1:
            with pytest.raises(GuardError, match="assumes not"):
                program(noise(*shape))
        else:
            assert agree(program(noise(*shape)), noise(*shape) * 3)


def test_a_path_of_its_own_at_size_one_may_branch_further() -> None:
    """At batch 1 the code asks about a size that it does not ask about elsewhere."""
    model = Net(lambda m, x: x * 2 if x.shape[0] >= 2 or x.shape[1] // 2 == 2 else x * 3)
    program = capture(model, noise(2, 5))
    assert answers(model, program, one, SIZES) == {(b, t) for b, t in SIZES if b > 1}


def test_a_size_fixed_by_the_code_is_reported() -> None:
    guards = capture(Net(BRANCHES["one size"][0]), noise(2, 7)).guards
    assert [(a.label, a.size) for a in guards.specialised] == [("x.size(1)", 7)]
    assert [a.label for a in guards.dynamic] == ["x.size(0)"]
    # The axis says it; saying it again as a relation would be noise.
    assert guards.relations == ()


def test_an_example_that_takes_its_own_path_at_size_one_fixes_that_size() -> None:
    model = Net(BRANCHES["size 1"][0])
    program = capture(model, noise(2, 1))
    assert answers(model, program, one, SIZES) == {(b, t) for b, t in SIZES if t == 1}


def test_a_broadcast_example_is_not_taken_for_equal_sizes() -> None:
    model = Net(lambda m, x, y: x + y)
    even = capture(model, noise(2, 7), noise(2, 7))
    assert even.guards.relations == ("x.size(0) == y.size(0)", "x.size(1) == y.size(1)")
    shared = capture(model, noise(2, 7), noise(1, 7))
    for b, t in SIZES:
        x, y, row = noise(b, t), noise(b, t, seed=1), noise(1, t, seed=2)
        assert agree(even(x, y), model(x, y))
        assert agree(shared(x, row), model(x, row))
        if b > 1:
            with pytest.raises(GuardError, match=r"assumes x\.size\(0\) == y\.size\(0\)"):
                even(x, row)
            with pytest.raises(GuardError, match=r"y\.size\(0\) is \d; the model's code ties"):
                shared(x, y)


def test_sizes_that_are_multiples_of_each_other() -> None:
    model = Net(lambda m, x, y: torch.cat([x, x]) + y)
    program = capture(model, noise(2, 7), noise(4, 7))
    assert agree(program(noise(3, 5), noise(6, 5)), model(noise(3, 5), noise(6, 5)))
    with pytest.raises(GuardError, match=r"assumes \(2\*x\.size\(0\)\) == y\.size\(0\)"):
        program(noise(3, 5), noise(3, 5))


def test_a_quotient_that_comes_to_nothing_is_a_guard_that_fails() -> None:
    model = Net(lambda m, x: x.split(x.shape[1] // 2, 1)[0])
    program = capture(model, noise(2, 8))
    assert agree(program(noise(2, 6)), model(noise(2, 6)))
    with pytest.raises(GuardError):
        program(noise(2, 1))


@pytest.mark.parametrize(
    ("example", "given", "right"),
    [
        (torch.int64, torch.int32, False),
        (torch.int32, torch.int64, False),
        (torch.int64, torch.int64, True),
        (torch.bool, torch.int64, False),
        (torch.int64, torch.bool, False),
        (torch.uint8, torch.int64, False),
        (torch.int64, torch.float32, False),
        (torch.float32, torch.float64, False),
        (torch.float32, torch.int64, False),
        (torch.int64, torch.complex64, False),
        (torch.complex64, torch.float32, False),
    ],
)
def test_dtypes(example: torch.dtype, given: torch.dtype, right: bool) -> None:
    model = Net(lambda m, x: x * 2 if x.dtype.is_floating_point else x + x)
    program = capture(model, torch.ones(2, 3).to(example))
    x = torch.ones(3, 4).to(given)
    if right:
        assert agree(program(x), model(x))
    else:
        with pytest.raises(GuardError, match=f"x is {given}, {example} at capture"):
            program(x)


def test_ranks() -> None:
    program = capture(Net(lambda m, x: x * 2), noise(2, 3))
    for shape in ((), (3,), (2, 3, 4)):
        with pytest.raises(GuardError, match=f"x has {len(shape)} axes, 2 at capture"):
            program(noise(*shape))
    scalar = capture(Net(lambda m, x: x * 2), noise())
    assert scalar(torch.tensor(3.0)) == 6
    with pytest.raises(GuardError, match="x has 1 axes, 0 at capture"):
        scalar(noise(3))


def test_an_example_without_elements_is_the_model_on_such_inputs_only() -> None:
    model = Net(lambda m, x: m.embed(x).sum(1))
    program = capture(model, torch.zeros(2, 0, dtype=torch.long))
    for b in (1, 3):
        x = torch.zeros(b, 0, dtype=torch.long)
        assert agree(program(x), model(x))
    with pytest.raises(GuardError, match=r"x\.size\(1\) is 4; the model's code ties it to 0"):
        program(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(GuardError, match=r"x\.size\(1\) is 0"):
        capture(model, torch.zeros(2, 3, dtype=torch.long))(torch.zeros(2, 0, dtype=torch.long))


@pytest.mark.parametrize("turned", [False, True])
def test_strides_are_free_unless_the_model_looks_at_them(turned: bool) -> None:
    example = noise(7, 2).t() if turned else noise(2, 7)
    blind = Net(lambda m, x: x.reshape(-1) + x.contiguous().view(-1))
    program = capture(blind, example)
    for x in (noise(3, 5), noise(5, 3).t(), noise(1, 5).expand(3, 5), noise(3, 10)[:, ::2]):
        assert agree(program(x), blind(x))
    seeing = Net(lambda m, x: x * 2 if x.is_contiguous() else x * 3)
    program = capture(seeing, example)
    for x in (noise(3, 5), noise(5, 3).t()):
        if x.is_contiguous() is not turned:
            assert agree(program(x), seeing(x))
        else:
            with pytest.raises(GuardError, match="looks at how tensors lie in memory"):
                program(x)


def test_a_guard_that_failed_once_fails_again_and_one_that_held_is_remembered() -> None:
    guards = capture(Net(BRANCHES["range"][0]), noise(2, 7)).guards
    for _ in range(2):
        guards.check([noise(2, 6)])
        with pytest.raises(GuardError):
            guards.check([noise(2, 5)])
    # Guards with more relations must not trust what passed before.
    stricter = guards.with_relations(["t[0].shape[0] == 3"])
    assert stricter.relations[-1] == "x.size(0) == 3"
    with pytest.raises(GuardError, match=r"assumes x\.size\(0\) == 3"):
        stricter.check([noise(2, 6)])
    guards.check([noise(2, 6)])


def test_equalities_are_written_one_way_and_other_conditions_are_left_alone() -> None:
    leaf = "L['leaves'][0].size()"
    conditions = [f"{leaf}[1] == {leaf}[0]", f"{leaf}[0] == {leaf}[1]", f"{leaf}[0] <= 3 or 2 == 3"]
    fake = capture(Net(lambda m, x: x), noise(2, 3)).graph
    placeholders = [n for n in fake.nodes if n.op == "placeholder"]
    guards = Guards.build(placeholders, ["x"], {}, conditions)
    assert guards.relations == ("x.size(0) == x.size(1)", "x.size(0) <= 3 or 2 == 3")


def test_a_model_that_draws_random_numbers_agrees_seed_by_seed() -> None:
    model = Net(lambda m, x: F.dropout(x, 0.5, training=True) + torch.randn_like(x))
    program = capture(model, noise(2, 7))
    for seed in range(3):
        torch.manual_seed(seed)
        want = model(noise(3, 4))
        torch.manual_seed(seed)
        assert agree(program(noise(3, 4)), want)


def test_what_python_makes_of_a_size_ties_the_size_down() -> None:
    model = Net(lambda m, x: (x, f"{x.shape[1]} positions"))
    program = capture(model, noise(2, 7))
    assert program(noise(2, 7))[1] == "7 positions"
    with pytest.raises(GuardError):
        program(noise(2, 8))
