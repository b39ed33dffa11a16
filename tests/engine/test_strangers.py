"""Models that strangers wrote: each is captured bitwise, opaque in the right place, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import STRANGERS, Stranger
from models.compare import bits, gradients, ran
from models.stranger import ANY
from torch import nn

from lensfx.capture import capture
from lensfx.errors import CaptureError, GuardError
from lensfx.graph.program import Program

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def rows(*kinds: str) -> list[Any]:
    found = [(name, s) for name, s in STRANGERS.items() if s.expect in kinds]
    return [pytest.param(stranger, id=name) for name, stranger in found]


def captured(
    stranger: Stranger, size: tuple[int, int], seed: int = 0
) -> tuple[Program, list[nn.Parameter]]:
    """A capture of a fresh model, which must come out of it as it was, and its parameters."""
    model = stranger.build()
    before = list(model.state_dict(keep_vars=True).items())
    values = [bits(t) for _, t in before]
    args, kwargs = stranger.inputs(*size, seed)
    program = capture(model, *args, **kwargs)
    after = list(model.state_dict(keep_vars=True).items())
    assert [(n, id(t)) for n, t in after] == [(n, id(t)) for n, t in before]
    assert [bits(t) for _, t in after] == values
    return program, trained(model)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_same_gradients(
    stranger: Stranger, program: Program, weights: list[nn.Parameter]
) -> None:
    model, call = stranger.build(), stranger.inputs(*stranger.shapes[0], 0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    want, got = gradients(model, call, trained(model)), gradients(program, call, weights)
    assert [n for n, a, b in zip(names, want, got, strict=True) if a != b] == []


@pytest.mark.parametrize("stranger", rows("captured"))
def test_a_strangers_model_is_captured(stranger: Stranger) -> None:
    program, weights = captured(stranger, stranger.shapes[0])
    for size in dict.fromkeys((*stranger.shapes, *ANY)):
        # A new model each time: some keep what they have computed.
        call = stranger.inputs(*size, 1)
        try:
            got = ran(program, call)
        except GuardError:
            assert size not in stranger.shapes, f"refuses {size}"
            continue
        assert got == ran(stranger.build(), call), size
    assert_same_gradients(stranger, program, weights)


@pytest.mark.parametrize("stranger", rows("branch"))
def test_a_branching_model_is_captured_path_by_path(stranger: Stranger) -> None:
    first, *others = stranger.shapes
    program, weights = captured(stranger, first)
    programs = [program]
    calls = [(first, 0), (first, 1), *((size, seed) for seed, size in enumerate(others, 2))]
    for size, seed in calls:
        call = stranger.inputs(*size, seed)
        want = ran(stranger.build(), call)
        for program in programs:
            try:
                got = ran(program, call)
            except GuardError:
                continue
            assert got == want, (size, seed)
            break
        else:
            programs.append(captured(stranger, size, seed)[0])
            assert ran(programs[-1], call) == want, (size, seed)
    assert_same_gradients(stranger, programs[0], weights)


def test_paths_differ() -> None:
    """The calls above would prove little if all of them took one path."""
    straight = []
    for name in ("branch_sign", "branch_not", "branch_early_exit", "branch_converging"):
        stranger = STRANGERS[name]
        (program, _), refused = captured(stranger, (2, 7)), 0
        for seed in range(12):
            args, kwargs = stranger.inputs(2, 7, seed)
            try:
                program(*args, **kwargs)
            except GuardError:
                refused += 1
        straight += [name] if not 0 < refused < 12 else []
    assert not straight


@pytest.mark.parametrize("stranger", rows("opaque"))
def test_what_cannot_be_traced_is_opaque(stranger: Stranger) -> None:
    program, weights = captured(stranger, stranger.shapes[0])
    targets = [str(n.target) for n in program.graph.nodes]
    assert any("opaque" in t for t in targets)
    assert any("linear" in t for t in targets)
    for size in stranger.shapes:
        call = stranger.inputs(*size, 1)
        assert ran(program, call) == ran(stranger.build(), call), size
    assert_same_gradients(stranger, program, weights)


@pytest.mark.parametrize("stranger", rows("refused"))
def test_what_cannot_be_captured_is_refused_in_one_message(stranger: Stranger) -> None:
    model = stranger.build()
    before = bits(model.state_dict())
    args, kwargs = stranger.inputs(*stranger.shapes[0], 0)
    with pytest.raises(CaptureError, match=stranger.refused_by) as caught:
        capture(model, *args, **kwargs)
    text = str(caught.value)
    assert re.search(r"\n  try: \w", text)
    assert len(text) < 1000
    assert bits(model.state_dict()) == before


class Aliased(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + 1 if a is b else a * 2


def test_one_tensor_given_twice_is_one_tensor() -> None:
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    together = capture(Aliased(), x, x)
    assert torch.equal(together(x, x), x + 1)
    with pytest.raises(GuardError):
        together(x, y)
    apart = capture(Aliased(), x, y)
    assert torch.equal(apart(x, y), x * 2)
    with pytest.raises(GuardError):
        apart(x, x)


def test_kernels_that_run_without_gradients_only_are_said() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    args, kwargs = STRANGERS["encoder_padding"].inputs(2, 7, 0)
    program = capture(model, *args, **kwargs)
    assert bits(program(*args, **kwargs)) == bits(model(*args, **kwargs))
    assert any("with gradients off" in note for note in program.source.notes)
