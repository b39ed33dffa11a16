"""A lens answers as the model does on every call: other sizes, paths, modes, dtypes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lensfx
from lensfx.graph.choice import choices
from lensfx.run import variants

torch.set_num_threads(1)


class Net(nn.Module):
    """A norm, two linears, dropout, and a body."""

    def __init__(self, body: Callable[..., Any], width: int = 6) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.pos = nn.Embedding(8, width)
        self.bn = nn.BatchNorm1d(width)
        self.body = (body,)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        return self.body[0](self, x, *more, **named)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def wrapped(body: Callable[..., Any], *args: Any, **options: Any) -> tuple[Net, lensfx.Lens]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(body).eval()
    return model, lensfx.wrap(model, *args, **options)


def _by_size(m: Net, x: Tensor) -> Tensor:
    return m.a(x) + 1 if x.shape[0] == 3 else m.b(x)


def _by_value(m: Net, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.a(h) if h.sum() > 0 else m.b(h)


def test_a_size_that_the_code_ties_down_is_captured_again() -> None:
    model, lens = wrapped(_by_size, noise(3, 6), passes=None)
    for batch in (3, 2, 5, 3, 1):
        assert same(lens(noise(batch, 6, seed=batch)), model(noise(batch, 6, seed=batch)))
    assert len(lens.programs) <= 3
    assert "x.size(0) = 3" in str(lens.report)


def test_every_path_is_captured_once_and_kept() -> None:
    model, lens = wrapped(_by_value, noise(3, 6), passes=None)
    for seed in range(30):
        assert same(lens(noise(3, 6, seed=seed)), model(noise(3, 6, seed=seed)))
    assert len(lens.programs) == 2


def test_all_paths_read_the_same_folded_weights() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.a(m.norm(x))
        return y if x.sum() > 0 else m.b(y)

    model, lens = wrapped(body, noise(3, 6))
    for seed in range(8):
        call = noise(3, 6, seed=seed)
        assert torch.allclose(lens(call), model(call), atol=1e-6)
    one, two = lens.programs
    assert one.formulas
    assert one.formulas.keys() == two.formulas.keys()
    assert all(one.tensors[n] is two.tensors[n] for n in one.formulas)
    with torch.no_grad():
        one.tensors["a.weight"].zero_()
    moved = [lens(noise(3, 6, seed=s)) for s in range(8)]
    assert all(torch.equal(o[0], o[1]) for o in moved)


def test_the_report_of_the_proof_covers_other_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    proved = []
    plain = variants.prove
    monkeypatch.setattr(variants, "prove", lambda p, **k: proved.append(p) or plain(p, **k))
    _, lens = wrapped(_by_value, noise(3, 6))
    assert len(proved) == 1
    for seed in range(8):
        lens(noise(3, 6, seed=seed))
    assert len(proved) == 2
    _, lens = wrapped(_by_value, noise(3, 6), verify=False)
    for seed in range(8):
        lens(noise(3, 6, seed=seed))
    assert len(proved) == 2


def test_an_input_longer_than_the_table_is_refused_before_it_fails_inside() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.a(x + m.pos(torch.arange(x.shape[1])))

    _, lens = wrapped(body, noise(2, 5, 6), passes=None)
    assert lens(noise(2, 8, 6)).shape == (2, 8, 6)
    with pytest.raises(lensfx.GuardError) as caught:
        lens(noise(2, 9, 6))
    assert str(caught.value).splitlines()[0] == ("x.size(1) is 9, and pos.weight has 8 rows")
    assert "at most 8" in str(caught.value)
    assert "test_variants.py" in str(caught.value)
    assert len(lens.programs) == 1
    assert "1..8" in str(lens.report)


@pytest.mark.parametrize("offset", [0, 2])
def test_the_limit_counts_offsets(offset: int) -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        positions = torch.arange(offset, x.shape[1] + offset).unsqueeze(0).expand(x.shape[0], -1)
        return m.a(x + m.pos(positions))

    _, lens = wrapped(body, noise(2, 5, 6), passes=None)
    assert lens(noise(2, 8 - offset, 6)).shape == (2, 8 - offset, 6)
    with pytest.raises(lensfx.GuardError, match=r"pos\.weight has 8 rows"):
        lens(noise(2, 9 - offset, 6))


def test_other_arguments_are_captured_too() -> None:
    def body(m: Net, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Any:
        y = m.a(x if mask is None else x * mask)
        return {"y": y * scale, "extra": None if mask is None else mask.sum()}

    model, lens = wrapped(body, noise(3, 6), passes=None)
    mask = noise(3, 6, seed=1)
    for args, kwargs in (
        ((noise(3, 6),), {"mask": mask}),
        ((noise(3, 6), mask), {"scale": 0.5}),
        ((noise(3, 6).double().float(),), {}),
    ):
        assert same(lens(*args, **kwargs), model(*args, **kwargs))
    assert len(lens.programs) == 3


def test_what_the_model_rejects_is_said_in_its_words() -> None:
    _, lens = wrapped(_by_size, noise(3, 6), passes=None)
    with pytest.raises(lensfx.GuardError, match="itself fails on this example") as caught:
        lens(noise(3, 5))
    assert "test_variants.py" in str(caught.value)
    assert len(lens.programs) == 1


def test_a_path_of_its_own_on_every_call_ends_in_an_opaque_module() -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(int(x.abs().sum() * 1000) % 97):
                x = x * 0.99
            return x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.fickle = nn.Linear(6, 6), Fickle()

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(self.fickle(x))

    model = Outer().eval()
    lens = lensfx.wrap(model, noise(3, 6), passes=None, verify=False)
    for seed in range(variants.PATHS + 6):
        assert same(lens(noise(3, 6, seed=seed)), model(noise(3, 6, seed=seed)))
    assert len(lens.programs) <= variants.PATHS + 1
    assert any(p.source.opaque for p in lens.programs)


def test_a_fickle_root_is_refused_with_its_line() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.a(x) * int(x.abs().sum() * 1000)

    _, lens = wrapped(body, noise(3, 6), passes=None, verify=False)
    for seed in range(variants.PATHS - 1):
        lens(noise(3, 6, seed=seed + 1))
    with pytest.raises(lensfx.GuardError, match="a path of its own") as caught:
        lens(noise(3, 6, seed=99))
    assert "return m.a(x) * int(" in str(caught.value)


def test_few_programs_are_kept_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(m: Net, x: Tensor, kind: int = 0) -> Tensor:
        return m.a(x) * kind

    monkeypatch.setattr(variants, "KEPT", 3)
    model, lens = wrapped(body, noise(3, 6), passes=None, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (1, 2):
            assert same(lens(noise(3, 6), kind), model(noise(3, 6), kind))
    with pytest.warns(UserWarning, match="more than 3 kinds of calls"):
        lens(noise(3, 6), 7)
    for kind in (0, 1, 2, 3):
        assert same(lens(noise(3, 6), kind), model(noise(3, 6), kind))
    assert len(lens.programs) == 3


def test_hooks_work_on_every_path_and_may_not_change_it() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) if y.sum() > 0 else m.b(y) * 2

    model, lens = wrapped(body, noise(3, 6), passes=None)
    out = next(n for n in lens.hook_names if n.startswith("a."))
    seen = []
    for seed in range(6):
        call = noise(3, 6, seed=seed)
        got = lens.run_with_hooks(call, fwd_hooks=[(out, lambda v, hook: seen.append(v))])
        assert same(got, model(call))
        assert len(seen) == seed + 1
        _, cache = lens.run_with_cache(call, names_filter=out)
        assert same(cache[out], model.a(call))
    assert len(lens.programs) == 2
    flips = [(out, lambda v, hook: -v)]
    with pytest.raises(lensfx.GuardError, match="a hook changes the path"):
        lens.run_with_hooks(noise(3, 6), fwd_hooks=flips)


def test_finding_the_path_draws_and_writes_nothing() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.drop(m.bn(x))
        return m.a(y) if y.sum() > 0 else m.b(y)

    model, lens = wrapped(body, noise(5, 6), passes=None)
    model.train()
    twin = copy.deepcopy(model)
    lens.train()
    for seed in range(6):
        torch.manual_seed(seed)
        want = twin(noise(5, 6, seed=seed))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert same(lens(noise(5, 6, seed=seed)), want)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(model.bn.running_mean, twin.bn.running_mean)
        assert torch.equal(model.bn.num_batches_tracked, twin.bn.num_batches_tracked)


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_bert", "nanogpt", "llamalike", "encdec"])
def test_training_mode_is_the_models_under_the_same_seed(name: str) -> None:
    case = CASES[name]
    model = case.build()
    args, kwargs = case.inputs(2, 7, 0)
    lens = lensfx.wrap(model, *args, passes=None, verify=False, **kwargs)
    model.train()
    assert lens.train() is lens
    assert lens.training
    for size in ((2, 7), (3, 5)):
        args, kwargs = case.inputs(*size, 1)
        torch.manual_seed(3)
        want = model(*args, **kwargs)
        torch.manual_seed(3)
        assert same(lens(*args, **kwargs), want)
    assert lens.eval() is lens
    assert same(lens(*args, **kwargs), model.eval()(*args, **kwargs))
    assert len(lens.programs) == 2


def test_what_stays_frozen_while_the_model_trains_stays_so_in_the_lens() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.drop(m.bn(x))

    model, lens = wrapped(body, noise(5, 6), passes=None)
    model.train()
    model.drop.eval()
    lens.train()
    assert same(lens(noise(5, 6)), copy.deepcopy(model)(noise(5, 6)))


def test_a_step_of_training_moves_both_modes() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.drop(m.a(m.norm(x)))

    _, lens = wrapped(body, noise(5, 6))
    before = lens(noise(5, 6)).detach()
    lens.train()
    lens(noise(5, 6)).square().sum().backward()
    assert all(p.grad is not None for p in lens.parameters())
    torch.optim.SGD(lens.parameters(), lr=0.1).step()
    after = lens.eval()(noise(5, 6)).detach()
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama", "nanogpt", "llamalike", "norm_pow"])
def test_a_moved_lens_is_the_moved_model(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = case.build()
    args, kwargs = case.inputs(2, 7, 0)
    lens = lensfx.wrap(model, *args, passes=None, verify=False, **kwargs)
    before = [(id(p), p.dtype) for p in model.parameters()]
    assert lens.to(dtype) is lens
    twin = copy.deepcopy(model).to(dtype)
    args, kwargs = case.inputs(3, 5, 1)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
    )
    assert same(lens(*args, **kwargs), twin(*args, **kwargs))
    assert [(id(p), p.dtype) for p in model.parameters()] == before
    assert {p.dtype for p in lens.parameters()} == {dtype}


def test_a_move_carries_what_was_written_into_folded_weights() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return m.a(m.norm(x))

    _, lens = wrapped(body, noise(5, 6))
    with torch.no_grad():
        lens.program.tensors["a.weight"].fill_(0.5)
    lens.to(torch.float64)
    assert float(lens.program.tensors["a.weight"].detach().min()) == 0.5
    assert lens.program.tensors["a.weight"].dtype == torch.float64


def test_hooks_stay_on_a_moved_lens() -> None:
    model, lens = wrapped(lambda m, x: m.b(m.a(x)), noise(5, 6), passes=None)
    name = next(n for n in lens.hook_names if n.startswith("a."))
    lens.add_hook(name, lambda v, hook: v * 0)
    lens.to(torch.float64)
    assert torch.equal(lens(noise(5, 6).double()), model.b.bias.double().expand(5, 6))


def test_a_move_to_integers_is_refused() -> None:
    _, lens = wrapped(lambda m, x: m.a(x), noise(5, 6))
    with pytest.raises(lensfx.LensError, match=r"cannot be moved to torch.int64"):
        lens.to(torch.int64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_acts_as_on_the_model(dtype: torch.dtype) -> None:
    def body(m: Net, x: Tensor) -> Any:
        h = m.a(m.norm(x))
        with torch.autocast("cpu", enabled=False):
            island = m.b(h.float())
        return h, island, (h @ m.b.weight).softmax(-1)

    model, lens = wrapped(body, noise(5, 6), passes=None)
    plain = lens(noise(5, 6))
    with torch.autocast("cpu", dtype=dtype):
        got, want = lens(noise(5, 6)), model(noise(5, 6))
    assert [t.dtype for t in tensors(got)] == [t.dtype for t in tensors(want)]
    assert same(got, want)
    assert same(lens(noise(5, 6)), plain)
    with torch.autocast("cpu", dtype=dtype), pytest.raises(lensfx.GuardError, match="autocast"):
        lens.program(noise(5, 6))


def test_a_lens_without_a_model_says_what_it_cannot_do() -> None:
    _, lens = wrapped(_by_size, noise(3, 6), passes=None)
    from dataclasses import replace

    bare = lensfx.Lens(replace(lens.program, origin=None))
    with pytest.raises(lensfx.GuardError, match="ties it to 3"):
        bare(noise(2, 6))
    with pytest.raises(lensfx.GuardError, match="capture the model again"):
        bare.train()(noise(3, 6))
    with pytest.raises(lensfx.CaptureError, match="does not know the model"):
        bare.to(torch.float64)


def test_the_guards_of_a_path_are_where_a_bare_program_refuses() -> None:
    _, lens = wrapped(_by_value, noise(3, 6), passes=None)
    assert len(choices(lens.program.graph)) == 1


def test_a_copy_of_a_lens_has_parameters_of_its_own() -> None:
    _, lens = wrapped(lambda m, x: m.a(m.norm(x)), noise(5, 6))
    before = lens(noise(5, 6))
    twin = copy.deepcopy(lens)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(lens(noise(5, 6)), before)
    assert not twin(noise(5, 6)).any()
