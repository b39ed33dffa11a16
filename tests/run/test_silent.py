"""Models on which an answer could be wrong without a word: each is right, or refused by name."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import lensfx
from lensfx import CaptureError, GuardError

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.l, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = (body,)

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.body[0](self, x, *more)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wrapped(model: nn.Module, *args: Any, **options: Any) -> lensfx.Lens:
    return lensfx.wrap(model, *args, passes=None, **options)


def test_a_branch_on_a_random_number_takes_the_models_path() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return x if m.training and torch.rand([]) < 0.5 else m.l(x)

    model = Net(body)
    lens = wrapped(model, noise(2, 4)).train()
    model.train()
    for seed in range(6):
        torch.manual_seed(seed)
        want = model(noise(2, 4))
        torch.manual_seed(seed)
        assert torch.equal(lens(noise(2, 4)), want)
    assert len(lens.programs) == 3


def test_pythons_random_numbers_are_refused_or_stay_in_their_module() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.l(x) * random.random()

    with pytest.raises(CaptureError, match="Python's or numpy's random numbers"):
        lensfx.capture(Net(body), noise(2, 4))
    inner = Net(lambda m, x: m.l(x) * float(np.random.rand()))
    model = nn.Sequential(nn.Linear(4, 4), inner).eval()
    lens = wrapped(model, noise(2, 4))
    np.random.seed(3)
    want = model(noise(2, 4))
    np.random.seed(3)
    assert torch.equal(lens(noise(2, 4)), want)
    assert list(lens.program.source.opaque) == ["1"]


def test_fused_kernels_without_gradients_are_said() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    lens = wrapped(encoder, noise(2, 5, 8), src_key_padding_mask=mask)
    assert any("with gradients off" in note for note in lens.program.source.notes)


def test_the_text_of_a_whole_number_is_guarded() -> None:
    heads = nn.ModuleDict({str(k): nn.Linear(4, 4) for k in range(3)})
    model = Net(lambda m, x, t: m.heads[f"{t.item()}"](x), heads=heads)
    lens = wrapped(model, noise(2, 4), torch.tensor(0))
    for k in range(3):
        assert torch.equal(lens(noise(2, 4), torch.tensor(k)), model(noise(2, 4), torch.tensor(k)))


def test_ids_of_another_width_are_another_call() -> None:
    def body(m: Net, ids: Tensor) -> Tensor:
        return (ids + 1) % 3 if ids.dtype != torch.long else ids

    model, lens = Net(body), wrapped(Net(body), torch.arange(4))
    narrow = torch.arange(4, dtype=torch.int32)
    assert torch.equal(lens(narrow), model(narrow))
    assert lens(narrow).dtype == torch.int32


def test_inputs_that_share_memory_and_are_written_to() -> None:
    def body(m: Net, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1.0)
        return m.l(x * y)

    lens = wrapped(Net(body), noise(2, 4), noise(2, 4, seed=1))
    both = noise(4, 4)
    with pytest.raises(GuardError, match="share memory") as caught:
        lens(both[:2], both[1:3])
    assert "clone()" in str(caught.value)


class Settings:
    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_an_argument_that_is_changed_is_another_argument() -> None:
    model = Net(lambda m, x, s: m.l(x) * s.scale)
    settings = Settings(2.0)
    lens = wrapped(model, noise(2, 4), settings)
    for scale in (5.0, 2.0, float("nan")):
        settings.scale = scale
        want, got = model(noise(2, 4), settings), lens(noise(2, 4), settings)
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert len(lens.programs) == 3
    lens(noise(2, 4), Settings(2.0))
    assert len(lens.programs) == 3


def test_state_in_python_is_refused_where_it_matters() -> None:
    def counted(m: Net, x: Tensor) -> Tensor:
        m.n += 1
        return m.l(x) / m.n

    def logged(m: Net, x: Tensor) -> Tensor:
        m.n += 1
        return m.l(x)

    with pytest.raises(CaptureError, match="keeps n from one call for the next"):
        lensfx.capture(Net(counted, n=0), noise(2, 4))
    program = lensfx.capture(model := Net(logged, n=0), noise(2, 4))
    assert any("forward sets n" in note for note in program.source.notes)
    assert model.n == 0


def test_gradients_that_code_changes() -> None:
    def hooked(m: Net, x: Tensor) -> Tensor:
        h = m.l(x)
        h.register_hook(lambda grad: grad * 0.1)
        return m.k(h)

    with pytest.raises(CaptureError, match="register_hook changes a gradient"):
        lensfx.capture(Net(hooked), noise(2, 4))
    model = nn.Sequential(nn.Linear(4, 4), Net(hooked)).eval()
    lens = wrapped(model, noise(2, 4))
    weights = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(model(noise(2, 4)).square().sum(), weights, allow_unused=True),
        torch.autograd.grad(lens(noise(2, 4)).square().sum(), weights, allow_unused=True),
        strict=True,
    ):
        assert torch.equal(a, b)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.7 * grad


def test_a_backward_of_its_own_is_kept() -> None:
    inner = Net(lambda m, x: Reversed.apply(m.l(x)))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4)).eval()
    lens = wrapped(model, noise(2, 4))
    x = noise(2, 4).requires_grad_()
    found = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (model, lens)]
    assert torch.equal(*found)
    with pytest.raises(CaptureError, match="Reversed has a backward of its own"):
        lensfx.capture(inner, noise(2, 4))


def test_numbers_are_computed_as_python_does() -> None:
    def body(m: Net, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum().item()
        if x.sum() > 1e9:
            x = x * 2
        return m.l(x) * ((count / 3) * 7.7)

    model = Net(body)
    lens = wrapped(model, noise(2, 4), torch.ones(3), verify=False)
    for n in range(1, 12):
        mask = torch.ones(n)
        assert torch.equal(lens(noise(2, 4), mask), model(noise(2, 4), mask))


class Frozen(nn.Module):
    """Batch norm that its owner never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.l(x))


def test_a_train_method_of_the_models_own_decides() -> None:
    model = Frozen().eval()
    before = model.bn.running_mean.clone()
    lens = wrapped(model, noise(5, 4)).train()
    assert torch.equal(lens(noise(5, 4)), copy.deepcopy(model).train()(noise(5, 4)))
    assert torch.equal(model.bn.running_mean, before)


class Kept(nn.Module):
    """A table that stays in float32 wherever the rest goes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", noise(4))

    def _apply(self, fn: Any, recurse: bool = True) -> Kept:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.table).to(x.dtype)


def test_a_move_is_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Kept()).eval()
    lens = wrapped(model, noise(2, 4)).to(torch.bfloat16)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    x = noise(2, 4).bfloat16()
    assert torch.equal(lens(x), moved(x))
    assert lens.program.tensors["1.table"].dtype == torch.float32


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 5
        return self.l(x) * 2


def test_a_native_name_of_another_operator_is_refused() -> None:
    lens = wrapped(Forked(), -noise(2, 4).abs())
    hook = [("mul", lambda value, hook: value * 0)]
    assert not lens.run_with_hooks(-noise(2, 4).abs(), fwd_hooks=hook).any()
    with pytest.raises(lensfx.UnknownNameError, match="another value on the path of this call"):
        lens.run_with_hooks(noise(2, 4).abs(), fwd_hooks=hook)


_MASKS: dict[str, Tensor] = {}
_LAST: Tensor | None = None


class Caching(nn.Module):
    store: dict[str, Tensor] = {}  # noqa: RUF012

    def __init__(self, where: str) -> None:
        super().__init__()
        self.l, self.where = nn.Linear(4, 4), where

    def forward(self, x: Tensor) -> Tensor:
        global _LAST
        length = x.shape[1]
        kept = {"global": _MASKS, "class": self.store}.get(self.where)
        if kept is None:
            if _LAST is None or _LAST.shape[0] < length:
                _LAST = torch.ones(length, length).tril()
            return _LAST[:length, :length] @ self.l(x)
        if "m" not in kept or kept["m"].shape[0] < length:
            kept["m"] = torch.ones(length, length).tril()
        return kept["m"][:length, :length] @ self.l(x)


@pytest.mark.parametrize("where", ["global", "class", "name"])
def test_caches_outside_the_model_hold_no_traced_tensors(where: str) -> None:
    model = Caching(where).eval()
    lens = wrapped(model, noise(1, 1, 4))
    assert not any(isinstance(t, FakeTensor) for t in (*_MASKS.values(), *Caching.store.values()))
    assert not isinstance(_LAST, FakeTensor)
    for length in (1, 3, 6):
        assert torch.equal(lens(noise(1, length, 4)), model(noise(1, length, 4)))


def test_a_buffer_written_with_gradients_on_keeps_no_history() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        m.cache[: x.shape[0]] = m.l(x)
        return m.cache[: x.shape[0]] * 2

    model = Net(body)
    model.register_buffer("cache", torch.zeros(6, 4))
    wrapped(model, noise(2, 4))
    assert not model.cache.requires_grad
    copy.deepcopy(model)


def test_data_is_read_and_never_assigned() -> None:
    read = Net(lambda m, x: nn.functional.linear(x, m.l.weight.data))
    assert torch.equal(wrapped(read, noise(2, 4))(noise(2, 4)), read(noise(2, 4)))

    def assigned(m: Net, x: Tensor) -> Tensor:
        h = m.l(x)
        h.data = h.data * 2
        return h

    with pytest.raises(CaptureError, match=r"assignment to \.data") as caught:
        lensfx.capture(Net(assigned), noise(2, 4))
    assert "h.data = h.data * 2" in str(caught.value)


def test_a_size_as_a_key_ties_the_size_down() -> None:
    scales = {3: 2.0, 5: 7.0}
    model = Net(lambda m, x: m.l(x) * scales[x.shape[0]])
    lens = wrapped(model, noise(3, 4))
    for rows in (3, 5):
        assert torch.equal(lens(noise(rows, 4)), model(noise(rows, 4)))


def test_a_table_that_not_every_path_indexes_limits_only_its_path() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > 8:
            return m.l(x)
        return m.l(x + m.pos(torch.arange(length)))

    model = Net(body, pos=nn.Embedding(8, 4))
    lens = wrapped(model, noise(2, 5, 4))
    for length in (8, 9, 20, 3):
        assert torch.equal(lens(noise(2, length, 4)), model(noise(2, length, 4)))


def test_threads_capture_one_after_the_other() -> None:
    models = [Net(lambda m, x: m.l(x) if x.sum() > 0 else m.k(x)).eval() for _ in range(4)]
    calls = [noise(2, 4, seed=seed) for seed in range(4)]
    # Before: while one thread traces, torch has every module of the process call the tracer.
    wanted = [model(-x) for model, x in zip(models, calls, strict=True)]
    found: list[Any] = [None] * 4

    def run(k: int) -> None:
        try:
            found[k] = wrapped(models[k], calls[k], verify=False)(-calls[k])
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x) if float(np.tanh(x.detach().numpy().mean())) > 0 else self.q(x)


def test_what_an_opaque_module_did_not_take_at_capture_gets_its_gradient() -> None:
    model = nn.Sequential(Routed(), nn.Tanh()).eval()
    lens = wrapped(model, noise(2, 4).abs())
    x = -noise(2, 4).abs()
    want = torch.autograd.grad(model(x).sum(), model[0].q.weight)[0]
    assert torch.equal(torch.autograd.grad(lens(x).sum(), model[0].q.weight)[0], want)


def test_an_opaque_module_is_left_as_it_was_by_the_proof() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(float(np.tanh(x.detach().numpy().mean())))
            return x * 2.5

    model = nn.Sequential(nn.Linear(4, 4), Logging()).eval()
    lens = wrapped(model, noise(2, 4))
    assert model[1].seen == []
    lens(noise(2, 4))
    assert len(model[1].seen) == 1


def test_sizes_of_an_opaque_result_follow_what_several_runs_show() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = ((0, 0), (0, -x.shape[1] % 4), (0, 0))
            return torch.from_numpy(np.pad(x.detach().numpy(), rows))

    model = nn.Sequential(nn.Linear(8, 8), Padded(), nn.Linear(8, 8)).eval()
    lens = wrapped(model, noise(2, 5, 8), verify=False)
    for batch, length in ((2, 5), (1, 3), (3, 9)):
        x = noise(batch, length, 8)
        assert torch.equal(lens(x), model(x))


def test_a_size_rule_that_changes_further_on_is_captured_again() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = np.sort(x.detach().numpy(), axis=1)
            return torch.from_numpy(rows[:, : min(16, x.shape[1])].copy())

    model = nn.Sequential(nn.Linear(8, 8), Sorted(), nn.Linear(8, 8)).eval()
    lens = wrapped(model, noise(2, 5, 8), verify=False)
    for length in (5, 7, 40, 64):
        assert torch.equal(lens(noise(2, length, 8)), model(noise(2, length, 8)))
