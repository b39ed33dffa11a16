"""Comparison and contracts: what a right rewrite measures, what a wrong one does, and words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lensfx.errors import PipelineError
from lensfx.verify.compare import drift, rows
from lensfx.verify.contract import Contract, Exact, Observes, UpToLogitShift
from lensfx.verify.oracle import Float64

D = 24
SEEDS = st.integers(0, 2**16)
BOUND = Exact.bound


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Weights = dict[str, Tensor]


def draw(seed: int) -> Weights:
    return {
        "g": (1 + 0.3 * randn(seed, D)).float(),
        "s": (0.1 * randn(seed + 1, D)).float(),
        "W": (randn(seed + 2, 3, D, D) / D**0.5).float(),
        "b": (0.1 * randn(seed + 3, 3, D)).float(),
    }


def inputs(seed: int) -> Tensor:
    x = randn(seed, 2, 5, D).float()
    x[0, 0] = 0.7
    return x


def outlier(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 3] = 500.0
    return x


REGIMES: dict[str, Callable[[Tensor, Weights], tuple[Tensor, Weights]]] = {
    "random": lambda x, w: (x, w),
    "large": lambda x, w: (100 * x, w),
    "tiny": lambda x, w: (1e-3 * x, w),
    "outlier": lambda x, w: (outlier(x), w),
    "large weights": lambda x, w: (x, {**w, "W": 4 * w["W"]}),
    "one row": lambda x, w: (x[1:, :1], w),
}


def original(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,), w["g"], w["s"])
    return [F.linear(n, W, b) for W, b in zip(w["W"], w["b"], strict=True)]


def right(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,))
    return [F.linear(n, W * w["g"], b + W @ w["s"]) for W, b in zip(w["W"], w["b"], strict=True)]


def shift_dropped(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,))
    return [F.linear(n, W * w["g"], b) for W, b in zip(w["W"], w["b"], strict=True)]


def one_reader_forgotten(x: Tensor, w: Weights) -> list[Tensor]:
    return [*right(x, w)[:2], F.linear(F.layer_norm(x, (D,)), w["W"][2], w["b"][2])]


def other_eps(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,), eps=1e-6)
    return [F.linear(n, W * w["g"], b + W @ w["s"]) for W, b in zip(w["W"], w["b"], strict=True)]


def one_plus_gain(x: Tensor, w: Weights) -> list[Tensor]:
    return right(x, {**w, "g": 1 + w["g"]})


def one_column_unscaled(x: Tensor, w: Weights) -> list[Tensor]:
    g = w["g"].clone()
    g[7] = 1.0
    k = F.linear(F.layer_norm(x, (D,)), w["W"][1] * g, w["b"][1] + w["W"][1] @ w["s"])
    return [right(x, w)[0], k, right(x, w)[2]]


def folded_twice(x: Tensor, w: Weights) -> list[Tensor]:
    return right(x, {**w, "g": w["g"] * w["g"]})


def shift_through_scaled(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,))
    pairs = [(W * w["g"], b) for W, b in zip(w["W"], w["b"], strict=True)]
    return [F.linear(n, W, b + W @ w["s"]) for W, b in pairs]


def wrong_axis(x: Tensor, w: Weights) -> list[Tensor]:
    n = F.layer_norm(x, (D,))
    return [
        F.linear(n, W * w["g"][:, None], b + W @ w["s"])
        for W, b in zip(w["W"], w["b"], strict=True)
    ]


FAULTS = (
    shift_dropped,
    one_reader_forgotten,
    other_eps,
    one_plus_gain,
    one_column_unscaled,
    folded_twice,
    shift_through_scaled,
    wrong_axis,
)


def worst(candidate: Callable[[Tensor, Weights], list[Tensor]], x: Tensor, w: Weights) -> float:
    with Float64():
        pairs = zip(original(x, w), candidate(x, w), strict=True)
        return max(Exact().compare(a, b).error for a, b in pairs)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_separates(regime: str, seed: int) -> None:
    x, w = REGIMES[regime](inputs(seed), draw(seed))
    assert worst(right, x, w) < BOUND / 10
    for fault in FAULTS:
        assert worst(fault, x, w) > 100 * BOUND, fault.__name__


def test_a_fresh_norm_hides_faults() -> None:
    w = {**draw(0), "g": torch.ones(D), "s": torch.zeros(D)}
    hidden = (shift_dropped, one_reader_forgotten, one_column_unscaled, folded_twice, wrong_axis)
    assert [worst(fault, inputs(0), w) for fault in hidden] == [0.0] * 5


def test_the_first_element_that_differs_is_named() -> None:
    x, w = inputs(0), draw(0)
    with Float64():
        a, b = original(x, w)[1], one_column_unscaled(x, w)[1]
    found = Exact().compare(a, b)
    assert (found.reference, found.candidate) == (float(a[found.index]), float(b[found.index]))
    shape = ", ".join(map(str, found.index))
    assert found.text("k").startswith(f"k[{shape}]   before {found.reference:.6g}   after ")


def naive(a: Tensor, b: Tensor) -> float:
    norms = [sum(float(v) ** 2 for v in row) ** 0.5 for row in a.reshape(-1, a.shape[-1])]
    present = sorted(n for n in norms if n)
    floor = 1e-3 * present[(len(present) - 1) // 2] if present else 0.0
    errors = [
        sum((float(v) - float(u)) ** 2 for v, u in zip(r, q, strict=True)) ** 0.5
        for r, q in zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), strict=True)
    ]
    return max(e / max(n, floor) if e else 0.0 for e, n in zip(errors, norms, strict=True))


@given(SEEDS, st.integers(1, 6), st.integers(1, 7), st.integers(-6, 1))
def test_rows_is_its_formula(seed: int, n: int, d: int, power: int) -> None:
    a = randn(seed, n, d) * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) ** 9
    b = a + 10.0**power * randn(seed + 1, n, d)
    assert rows(a, b).error == pytest.approx(naive(a, b), rel=1e-9)


@given(SEEDS, st.sampled_from([-900, -40, -1, 1, 40, 900]))
def test_rows_has_no_unit(seed: int, power: int) -> None:
    a, b = randn(seed, 3, 4), randn(seed + 1, 3, 4)
    scale = 2.0**power
    assert rows(a * scale, b * scale).error == rows(a, b).error


@given(SEEDS, st.permutations(range(4)))
def test_rows_does_not_see_their_order(seed: int, order: list[int]) -> None:
    a, b = randn(seed, 4, 5), randn(seed + 1, 4, 5)
    assert rows(a[order], b[order]).error == rows(a, b).error


@given(SEEDS, st.sampled_from([inf, -inf, nan]), st.integers(0, 11))
def test_rows_leaves_out_what_is_not_finite_in_both(seed: int, special: float, k: int) -> None:
    a, b = randn(seed, 3, 4), randn(seed + 1, 3, 4)
    zeroed_a, zeroed_b = a.clone(), b.clone()
    zeroed_a.view(-1)[k] = zeroed_b.view(-1)[k] = 0.0
    a.view(-1)[k] = b.view(-1)[k] = special
    assert rows(a, b).error == rows(zeroed_a, zeroed_b).error
    assert rows(a, a.clone()).error == 0.0


@given(
    SEEDS,
    st.sampled_from([(inf, -inf), (inf, 1.0), (nan, inf), (nan, 0.0), (2.0, -inf)]),
    st.booleans(),
    st.integers(0, 11),
)
def test_rows_sees_where_one_is_not_finite(
    seed: int, pair: tuple[float, float], swap: bool, k: int
) -> None:
    a = randn(seed, 3, 4)
    b = a.clone()
    a.view(-1)[k], b.view(-1)[k] = pair[::-1] if swap else pair
    found = rows(a, b)
    assert (found.error, found.index) == (inf, (k // 4, k % 4))
    assert "infinities or NaNs differ" in found.text()


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), inf, "shape [2, 3] became [3, 2]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), inf, "float32 became torch.int64"),
        (torch.zeros(2) > 0, torch.zeros(2, dtype=torch.int64), inf, "bool became torch.int64"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), inf, "became torch.complex64"),
        (torch.arange(3), torch.tensor([0, 1, 3]), inf, "[2]   before 2   after 3   (these must"),
        (torch.tensor([True]), torch.tensor([False]), inf, "(these must be equal)"),
        (torch.arange(3), torch.arange(3).int(), 0.0, "no difference"),
        (torch.empty(0, 4), torch.empty(0, 4), 0.0, "no difference"),
        (torch.empty(4, 0), torch.empty(4, 0), 0.0, "no difference"),
        (torch.tensor(2.0), torch.tensor(2.5), 0.25, "2.5e-01 relative"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, "no difference"),
        (torch.zeros(2, 3), torch.tensor([[0.0] * 3, [0, 1e-9, 0]]), inf, "[1, 1]   before 0"),
        (torch.tensor([[1.0], [0]]), torch.tensor([[1.0], [1e-6]]), 1e-3, "[1, 0]   before 0"),
        (1e308 * torch.ones(1).double(), -1e308 * torch.ones(1).double(), inf, "after -1e+308"),
        (
            torch.tensor([3 + 4j, 0]),
            torch.tensor([3 + 4j, 0.5j]),
            0.1,
            "[1]   before 0   after 0.5",
        ),
        (torch.tensor([2.0]), torch.tensor([2.5]).bfloat16(), 0.25, "[0]   before 2   after 2.5"),
    ],
)
def test_rows_on_what_is_not_ordinary(a: Tensor, b: Tensor, error: float, words: str) -> None:
    found = rows(a, b)
    assert found.error == pytest.approx(error)
    assert words in found.text()


def test_a_small_row_is_not_hidden_by_a_large_one() -> None:
    a = torch.tensor([[1e6, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b = a.clone()
    b[1, 1] = 1.01
    assert rows(a, b).index == (1, 1)
    assert rows(a, b).error == pytest.approx(0.01 / 2**0.5)


def test_drift_is_a_multiple_of_the_noise_of_the_reference() -> None:
    oracle = randn(0, 5, 7)
    noise = 1e-7 * randn(1, 5, 7)
    assert drift(oracle + noise, oracle - 3 * noise, oracle) == pytest.approx(3.0)
    assert drift(oracle + noise, oracle, oracle) == 0.0
    assert drift(oracle, oracle, oracle) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drift_from_an_exact_reference_is_in_units_of_the_last_place(dtype: torch.dtype) -> None:
    oracle = 1024 * torch.ones(4, dtype=torch.float64)
    candidate = (oracle * (1 + 2 * torch.finfo(dtype).eps)).to(dtype)
    assert drift(oracle.to(dtype), candidate, oracle) == pytest.approx(2.0)


def test_drift_where_numbers_end() -> None:
    oracle = torch.tensor([1.0, -inf, 1e39], dtype=torch.float64)
    model = oracle.float()
    assert model.isinf().tolist() == [False, True, True]
    assert drift(model, model, oracle) == 1.0
    assert drift(oracle, model, oracle) == inf
    assert drift(model, torch.tensor([1.0, 0.0, inf]), oracle) == inf
    assert drift(model, torch.zeros(2), oracle) == inf
    assert drift(torch.zeros(2), torch.ones(2), torch.zeros(2).double()) == inf
    assert drift(torch.empty(0), torch.empty(0), torch.empty(0).double()) == 1.0
    assert drift(torch.arange(3), torch.arange(3), torch.arange(3)) == 1.0


@given(SEEDS, st.sampled_from([0.0, 1.0, 100.0]), st.integers(0, 2))
def test_a_shift_along_the_axis_is_allowed(seed: int, size: float, axis: int) -> None:
    logits = randn(seed, 6, 7, 8)
    by = size * randn(seed + 1, *(1 if k == axis else n for k, n in enumerate(logits.shape)))
    found = UpToLogitShift(axis=axis).compare(logits, logits + by)
    assert found.error < BOUND
    torch.testing.assert_close(found.shift, by.squeeze(axis))
    if size > 0.0:
        assert Exact().compare(logits, logits + by).error > 1e-3


@given(SEEDS, st.integers(0, 2))
def test_a_shift_leaves_the_index_where_it_was(seed: int, axis: int) -> None:
    logits, place = randn(seed, 3, 4, 5), (seed % 3, seed % 4, seed % 5)
    wrong = logits + 7.0
    wrong[place] += 40.0
    found = UpToLogitShift(axis=axis).compare(logits, wrong)
    assert found.error > 1.0
    assert found.index == place
    assert (found.reference, found.candidate) == (float(logits[place]), float(wrong[place]))


def centred(z: Tensor) -> Tensor:
    return z - z.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "fault",
    [
        lambda z: z - z.mean(-2, keepdim=True),  # the wrong axis, of the same length
        lambda z: centred(z) * (1 + 1e-9),
        lambda z: 30 * torch.tanh(centred(z) / 30),
        lambda z: torch.cat([centred(z)[..., :-1], z[..., -1:]], -1),
        lambda z: centred(z).flip(-1),
    ],
    ids=["axis", "scale", "softcap", "one entry", "order"],
)
def test_what_is_not_constant_along_the_axis_is_not_allowed(fault: Callable[..., Tensor]) -> None:
    logits = 5 + randn(0, 2, 6, 6)
    assert UpToLogitShift().compare(logits, centred(logits)).error < BOUND / 10
    assert UpToLogitShift().compare(logits, fault(logits)).error > 100 * BOUND


def test_masked_logits_agree_and_do_not_count() -> None:
    logits = randn(0, 3, 6)
    logits[0, 1] = logits[1, :] = -inf
    shifted = logits + torch.tensor([[2.0], [3.0], [-1.0]])
    found = UpToLogitShift().compare(logits, shifted)
    assert found.error < BOUND
    torch.testing.assert_close(found.shift, torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64))
    shifted[0, 1] = -1e9
    assert UpToLogitShift().compare(logits, shifted).index == (0, 1)
    assert UpToLogitShift().compare(logits, shifted).error == inf


def test_what_has_nothing_to_shift_is_exact() -> None:
    rule = UpToLogitShift(axis=1)
    assert rule.compare(torch.tensor(1.0), torch.tensor(2.0)).error == 1.0
    assert rule.compare(torch.arange(4), torch.arange(4) + 1).error == inf
    assert rule.compare(torch.ones(4), torch.ones(4) + 1).error == 1.0
    assert "shape" in rule.compare(torch.ones(2, 4), torch.ones(4, 2)).note


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.tensor([1.0, nan]), torch.tensor([1.0, nan]), 0.0),
        (torch.tensor([1.0, inf]), torch.tensor([1.0, inf]), 0.0),
        (torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]), inf),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), inf),
        (torch.tensor([1.0]), torch.nextafter(torch.tensor([1.0]), torch.tensor(2.0)), 2.0**-23),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0),
        (torch.tensor([True]), torch.tensor([False]), inf),
        (torch.tensor([True]), torch.tensor([True]), 0.0),
        (torch.empty(0), torch.empty(0), 0.0),
        (torch.tensor([1.0]).bfloat16(), torch.tensor([1.0]).bfloat16(), 0.0),
        (torch.tensor([1 + 0j]), torch.tensor([complex(1, -0.0)]), inf),
        (torch.tensor([1j]), torch.tensor([1j]), 0.0),
    ],
)
def test_observes_is_bitwise(a: Tensor, b: Tensor, error: float) -> None:
    found = Observes().compare(a, b)
    assert found.error == error
    assert (found.error <= Observes.bound) is (error == 0.0)


def test_every_contract_has_a_name_and_a_bound() -> None:
    assert [(c.name, c.bound) for c in (Observes(), Exact(), UpToLogitShift())] == [
        ("observes", 0.0),
        ("exact", 1e-12),
        ("up-to-logit-shift", 1e-12),
    ]
    with pytest.raises(FrozenInstanceError):
        UpToLogitShift().axis = 0  # type: ignore[misc]


ANY, FIRST, LAST = UpToLogitShift(), UpToLogitShift("first"), UpToLogitShift(1)


@pytest.mark.parametrize(
    ("a", "b", "joined"),
    [
        (Observes(), Observes(), Observes()),
        (Observes(), Exact(), Exact()),
        (Exact(), FIRST, FIRST),
        (Observes(), ANY, ANY),
        (FIRST, FIRST, FIRST),
        (FIRST, ANY, ANY),
        (FIRST, LAST, UpToLogitShift((1, "first"))),
    ],
)
def test_a_sequence_keeps_the_weaker_contract(a: Contract, b: Contract, joined: Contract) -> None:
    assert a.join(b) == joined
    assert a.join(joined) == joined.join(a) == joined
    assert {b.join(a).at(o) for o in ("first", 1)} == {joined.at(o) for o in ("first", 1)}


def test_shifts_along_different_axes_have_no_join() -> None:
    with pytest.raises(PipelineError, match="different axes, -1 and 0"):
        ANY.join(UpToLogitShift(axis=0))


def test_other_outputs_stay_exact() -> None:
    assert FIRST.at("first") == FIRST
    assert FIRST.at("loss") == Exact()
    assert ANY.at("loss") == ANY
    assert Exact().at(0) == Exact()
