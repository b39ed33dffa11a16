"""assert_equivalent: what it takes, what it lets pass, and what it says where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lensfx
from lensfx.testing import Recipe, assert_equivalent
from lensfx.verify import Observes, UpToLogitShift

RICH = Recipe(attention="matmul", mlp="gelu", norm="layer", head="biased", bias=True, heads=2)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def lines(error: pytest.ExceptionInfo[BaseException]) -> list[str]:
    return str(error.value).splitlines()


def test_models_lenses_programs_and_functions_are_taken() -> None:
    model = RICH.build()
    program, lens = lensfx.capture(model, IDS), lensfx.wrap(model, IDS)
    shift = UpToLogitShift()
    assert assert_equivalent(model, program).error == 0.0
    assert assert_equivalent(program, model, up_to=Observes()).error == 0.0
    assert 0.0 < assert_equivalent(model, lens, up_to=shift).error < 1e-12
    assert_equivalent(lens, lens.program, up_to=shift)
    assert_equivalent(lambda ids: model(ids), model, inputs=[IDS])
    assert_equivalent(model, lambda ids: model(ids), inputs=[(IDS,), {"ids": IDS}])


def test_the_message_says_where_and_by_how_much() -> None:
    model = Recipe(head="untied", vocab=8, output="dict").build()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[6] *= 1.5
    with pytest.raises(AssertionError) as error:
        assert_equivalent(model, other, inputs=[IDS[:1], {"ids": IDS}])
    headline, place, call, count, hint = lines(error)
    assert headline.startswith("not equivalent under exact: output['logits'] differs by ")
    assert headline.endswith(" relative (bound 1e-12)")
    before, after = model(IDS)["logits"].double(), other(IDS)["logits"].double()
    assert place.startswith("  at output['logits'][0, ")
    row = int(place.split("[0, ")[1][0])
    assert f", 6]   before {before[0, row, 6]:.3f}"[:-1] in place
    assert f"after {after[0, row, 6]:.3f}"[:-1] in place
    assert call == "  at call 0 of 2: int64[1, 3]"
    assert count == "  1 of 2 values differ; the first of them is shown"
    assert hint.startswith("  try: ")


def test_what_a_contract_lets_move_is_not_compared() -> None:
    model = Recipe(head="biased", dtype=torch.float64).build()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias += 3.0
    with pytest.raises(AssertionError, match="not equivalent under exact: output"):
        assert_equivalent(model, other, inputs=[IDS])
    assert_equivalent(model, other, inputs=[IDS], up_to=UpToLogitShift(), gradients=True)


class Two(nn.Module):
    def __init__(self, keys: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.keys, self.dtype = keys, dtype

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {k: x.to(self.dtype) * (1 + i) for i, k in enumerate(sorted(self.keys))}


X = torch.tensor([[1.0, 2.0]])


def test_another_structure_is_named() -> None:
    with pytest.raises(AssertionError) as error:
        assert_equivalent(Two(("a", "b", "c")), Two(("a", "d")), inputs=[X])
    assert lines(error) == [
        "not equivalent: the reference returns 3 tensors, the candidate 2",
        "  only the reference returns output['b'], output['c']",
        "  only the candidate returns output['d']",
        "  at call 0 of 1: float32[1, 2]",
    ]


def test_keys_in_another_order_are_the_same_outputs() -> None:
    assert_equivalent(Two(("a", "b")), lambda x: {"b": 2 * x, "a": x}, inputs=[X])


def test_shapes_and_sorts_of_numbers_are_named() -> None:
    with pytest.raises(AssertionError, match=r"shape \[1, 2\] became \[2\]"):
        assert_equivalent(lambda x: x, lambda x: x[0], inputs=[X])
    with pytest.raises(AssertionError, match=r"float64 became torch\.int64"):
        assert_equivalent(lambda x: x, lambda x: x.long(), inputs=[X])
    with pytest.raises(AssertionError, match=r"torch\.float32 became torch\.float64"):
        assert_equivalent(lambda x: x, lambda x: x.double(), inputs=[X], up_to=Observes())


def test_a_nan_is_said_to_be_one() -> None:
    broken = torch.tensor([[1.0, float("nan")]])
    assert_equivalent(lambda x: x, lambda x: x + 0, inputs=[broken])
    with pytest.raises(AssertionError, match=r"\[0, 1\] .*only the candidate is NaN there"):
        assert_equivalent(lambda x: x, lambda x: x / (x - 2) * (x - 2), inputs=[X])
    with pytest.raises(AssertionError, match="only the reference is NaN there"):
        assert_equivalent(lambda x: x / (x - 2) * (x - 2), lambda x: x, inputs=[X])


@pytest.mark.parametrize(
    ("reference", "inputs", "words"),
    [
        (lambda x: x, None, "neither side says how it is called"),
        (lambda x: x, [], "inputs is empty"),
        (lambda x: x, X, "inputs is one tensor, and a list of calls is wanted"),
        (lambda x: None, [X], "neither side returned a tensor on call 0 of 1"),
        (lambda x: x[:0], [X], "the reference has no number to compare"),
        (lambda x: x * torch.nan, [X], "empty, or NaN throughout"),
        (X, [X], "the first argument is Tensor, which cannot be called"),
        (lambda x, y: x, [X], "the reference cannot be run on call 0 of 1: float32"),
    ],
)
def test_nothing_to_compare_is_no_success(reference: Any, inputs: Any, words: str) -> None:
    with pytest.raises(lensfx.LensError) as error:
        assert_equivalent(
            reference, reference if inputs is not None else (lambda x: x), inputs=inputs
        )
    assert words in str(error.value)


class Straight(nn.Module):
    """The same numbers as the identity; no gradient comes through."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.w = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.w
        return y.detach() + 0 * y if self.cut else y


def test_gradients_are_compared_where_asked() -> None:
    whole, cut = Straight(False), Straight(True)
    assert_equivalent(whole, cut, inputs=[X])
    with pytest.raises(AssertionError, match=r"the gradient of input x differs by 1\.0e\+00"):
        assert_equivalent(whole, cut, inputs=[X], gradients=True)
    with pytest.raises(lensfx.LensError, match="gradients of function cannot be taken"):
        assert_equivalent(whole, lambda x: whole(x), inputs=[X], gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_rewritten_model_are_those_of_the_model(dtype: torch.dtype) -> None:
    recipe = Recipe(
        **{"attention": "matmul", "mlp": "experts", "norm": "rms_hand", "head": "tied"},
        **{"bias": True, "heads": 4, "groups": 2, "positions": "rotary", "dtype": dtype},
    )
    model = recipe.build()
    lens = lensfx.wrap(model, *recipe.inputs(2, 5))
    found = assert_equivalent(model, lens, up_to=UpToLogitShift(), gradients=True)
    assert found.error < 1e-10
