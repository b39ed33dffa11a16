"""Branches on values: the path taken is captured, and a call that takes another one says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lensfx import CaptureError, GuardError, capture
from lensfx.capture import export
from lensfx.graph.choice import OtherPathError, choices

torch.set_num_threads(1)


class Net(nn.Module):
    """Two linears, a gate that is a parameter, a flag that is a buffer, and a body."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.gate = nn.Parameter(torch.randn(4))
        self.register_buffer("flag", torch.tensor(True))
        self.body = (body,)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        return self.body[0](self, x, *more, **named)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _early_exit(m: Net, x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.tanh(m.a(x))
        if x.abs().max() < 0.35:
            break
    return m.b(x)


def _until(m: Net, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = 0.5 * m.a(x)
    return x


def _nested(m: Net, x: Tensor) -> Tensor:
    if x[0, 0] > 0:
        return m.a(x) if x.mean() > 0 else m.b(x)
    return m.b(x) * 2 if not x.mean() > 0 else x


def _written_after(m: Net, x: Tensor) -> Tensor:
    y = x.clone()
    y.neg_()
    big = y.sum()
    if big > 0:
        big.zero_()
        return m.a(x) + big
    return m.b(x)


def _by_item(m: Net, x: Tensor) -> Tensor:
    size = x.abs().mean().item()
    y = m.a(x)
    return y * 2 if size > 0.8 else y - 1


def _as_number(m: Net, x: Tensor) -> Tensor:
    return m.a(x)[: int((x[:, 0] > 0).sum()) + 1] if x.sum() > 0 else m.b(x)


def _listed(m: Net, x: Tensor) -> Tensor:
    out = m.a(x)
    for value in (x[0] > 0).tolist():
        out = out + 1 if value else m.b(out)
    return out


def _equal(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if torch.equal(x, x.abs()) else m.b(x)


def _close(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if torch.allclose(x, x.abs()) else m.b(x)


def _contains(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if 0.0 in x.relu() else m.b(x)


def _sized(m: Net, x: Tensor) -> Tensor:
    rows = (x[:, 0] > 0).nonzero().flatten()
    if rows.numel() == 0:
        return m.a(x)
    return m.b(x[rows])


def _said(m: Net, x: Tensor) -> Tensor:
    label = f"mean {x.mean():.3f}"
    return m.a(x) if label else m.b(x)


def _by_weight(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if m.gate.sum() > 0 else m.b(x)


def _by_flag(m: Net, x: Tensor) -> Tensor:
    return m.a(x) if m.flag else m.b(x)


def _plain_number(m: Net, x: Tensor) -> Tensor:
    return m.a(x) * x.abs().max().item()


BODIES = {
    "if": lambda m, x: m.a(x) if x.sum() > 0 else m.b(x),
    "if not": lambda m, x: m.a(x) if not x.sum() > 0 else m.b(x),
    "nested": _nested,
    "early exit": _early_exit,
    "while": _until,
    "written afterwards": _written_after,
    "item": _by_item,
    "int": _as_number,
    "tolist": _listed,
    "equal": _equal,
    "allclose": _close,
    "contains": _contains,
    "sizes": _sized,
    "format": _said,
    "a weight": _by_weight,
    "a buffer": _by_flag,
    "a number": _plain_number,
}


@pytest.mark.parametrize("name", BODIES)
def test_every_answer_is_the_models_or_a_guard_says_no(name: str) -> None:
    model = Net(BODIES[name]).eval()
    x = noise(3, 4)
    program = capture(model, x)
    assert torch.equal(program(x), model(x))
    answered = 0
    for seed in range(40):
        call = noise(3, 4, seed=seed) + 0.3 * (seed % 5 - 2)
        try:
            got = program(call)
        except GuardError:
            continue
        answered += 1
        assert torch.equal(got, model(call)), seed
    assert answered


@pytest.mark.parametrize("name", BODIES)
def test_gradients_along_the_path_are_the_models(name: str) -> None:
    model = Net(BODIES[name]).eval()
    program = capture(model, noise(3, 4))
    found = []
    for run in (model, program):
        x = noise(3, 4).requires_grad_()
        out = run(x)
        weights = [*model.parameters(), x]
        found.append(torch.autograd.grad(out.square().sum(), weights, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_wrong_guess_is_put_right_one_branch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(_early_exit).eval()
    x = 3 * noise(3, 4, seed=1)
    tried = []
    plain = export._Capture._exported

    def counted(self: Any, *args: Any) -> Any:
        tried.append(args)
        return plain(self, *args)

    def no_guess(self: Any, decide: str) -> Any:
        # Something to go on, and all of it wrong.
        return [export.Decision("bool", True)]

    monkeypatch.setattr(export._Capture, "_exported", counted)
    monkeypatch.setattr(export._Capture, "_guess", no_guess)
    program = capture(model, x)
    assert torch.equal(program(x), model(x))
    assert 2 < len(tried) <= 8


def test_an_endless_loop_under_a_wrong_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(m: Net, x: Tensor) -> Tensor:
        while not x.sum() < 10:
            x = x - 1
        return x

    monkeypatch.setattr(export._Capture, "_guess", lambda self, d: [export.Decision("item", 0.0)])
    with pytest.raises(CaptureError, match="cannot be traced"):
        capture(Net(forever).eval(), noise(3, 4))


def test_what_no_input_decides_leaves_no_guard() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        table = torch.tensor([3, 1, 2])
        return m.a(x) if torch.equal(table.sort().values, torch.arange(1, 4)) else m.b(x)

    model = Net(body).eval()
    program = capture(model, noise(3, 4))
    assert not choices(program.graph)
    assert torch.equal(program(noise(5, 4)), model(noise(5, 4)))


def test_a_branch_on_a_count_is_guarded_where_the_count_is_a_size() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.a(x) if torch.arange(x.shape[0]).max() > 2 else m.b(x)

    model = Net(body).eval()
    program = capture(model, noise(5, 4))
    assert torch.equal(program(noise(9, 4)), model(noise(9, 4)))
    with pytest.raises(GuardError):
        program(noise(2, 4))


def test_a_weight_that_moves_is_seen() -> None:
    model = Net(_by_weight).eval()
    program = capture(model, noise(3, 4))
    with torch.no_grad():
        model.gate.neg_()
    with pytest.raises(OtherPathError):
        program(noise(3, 4))


def test_the_message_names_the_line_and_both_values() -> None:
    program = capture(Net(_until).eval(), noise(3, 4))
    with pytest.raises(GuardError) as caught:
        program(100 * noise(3, 4))
    headline, at, hint = str(caught.value).splitlines()
    assert headline == "this call takes another path: what decides it is True, False at capture"
    assert at.strip().startswith("at test_paths.py:")
    assert "while x.norm() > 1:" in at
    assert hint.strip().startswith("try: ")


def _layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def _moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDED = torch.tensor([[False] * 5, [False, False, False, True, True]])
TORCH = {
    "encoder": (lambda: nn.TransformerEncoder(_layer(), 2), (noise(2, 5, 8),), {}),
    "encoder, causal float": (
        lambda: nn.TransformerEncoder(_layer(), 2),
        (noise(2, 5, 8),),
        {"mask": CAUSAL},
    ),
    "encoder, causal bool": (
        lambda: nn.TransformerEncoder(_layer(), 2),
        (noise(2, 5, 8),),
        {"mask": CAUSAL != 0},
    ),
    "encoder, other mask": (
        lambda: nn.TransformerEncoder(_layer(), 2),
        (noise(2, 5, 8),),
        {"mask": torch.eye(5) < 0},
    ),
    "encoder, padding": (
        lambda: nn.TransformerEncoder(_layer(), 2),
        (noise(2, 5, 8),),
        {"src_key_padding_mask": PADDED},
    ),
    "encoder, causal and padding": (
        lambda: nn.TransformerEncoder(_layer(), 2),
        (noise(2, 5, 8),),
        {"mask": CAUSAL != 0, "src_key_padding_mask": PADDED},
    ),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
        (noise(2, 5, 8), noise(2, 3, 8, seed=1)),
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        (noise(2, 5, 8), noise(2, 5, 8, seed=1)),
        {"tgt_mask": CAUSAL, "src_key_padding_mask": PADDED},
    ),
    "attention, weights": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (noise(2, 5, 8),) * 3,
        {"key_padding_mask": PADDED},
    ),
    "attention, no weights": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (noise(2, 5, 8),) * 3,
        {"attn_mask": CAUSAL, "need_weights": False, "is_causal": True},
    ),
    "attention, biases and zeros": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True),
        (noise(5, 2, 8), noise(6, 2, 4, seed=1), noise(6, 2, 4, seed=2)),
        {"average_attn_weights": False},
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torchs_own_transformers_work_as_they_are_written(name: str) -> None:
    build, args, kwargs = TORCH[name]
    model = build()
    if name == "attention, biases and zeros":
        model = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, kdim=4, vdim=4)
    model = _moved(model)
    program = capture(model, *args, **kwargs)
    for shift in (0.0, 0.5):
        moved = {id(a): a + shift for a in args}
        call = tuple(moved[id(a)] for a in args)
        want = pytree.tree_leaves(model(*call, **kwargs))
        got = pytree.tree_leaves(program(*call, **kwargs))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(want, got, strict=True))
