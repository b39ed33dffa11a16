"""with_weights: the program of another checkpoint is what capturing the other model gives."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import FoldScale
from lensfx.passes.center_unembed import CenterUnembed
from lensfx.passes.fold_norm import FoldNorm
from models import CASES, randomise
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import lensfx
from lensfx.capture import capture
from lensfx.errors import LensError, RewriteError
from lensfx.graph import Program
from lensfx.graph.program import Change
from lensfx.rewrite import Pipeline
from lensfx.verify import UpToLogitShift, check, prove


class Net(nn.Module):
    """A tied table, a norm, running statistics, and buffers of both kinds."""

    places: Tensor
    scale: Tensor

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.stats = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.register_buffer("places", torch.randn(8), persistent=False)
        self.register_buffer("scale", torch.rand(8))
        self.head.weight = self.table.weight
        randomise(self, seed)
        self.to(dtype).eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.scale + self.places
        x = self.inner(self.norm(x))
        return self.head(self.norm(self.stats(x.mT).mT))


IDS = torch.arange(10).reshape(2, 5)


def net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    """Buffers that no state dict holds are the same in all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Net(seed, dtype)
        torch.manual_seed(seed)
        model.scale.uniform_(0.5, 1.5)
    return model


def rewritten(model: nn.Module, *inputs: Any, **named: Any) -> Program:
    return Pipeline.default().run(capture(model, *(inputs or (IDS,)), **named))


def same(got: Program | None, want: Program | None) -> None:
    assert got is not None
    assert want is not None
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        mine = got.tensors[name]
        assert type(mine) is type(tensor), name
        assert (mine.dtype, mine.requires_grad) == (tensor.dtype, tensor.requires_grad), name
        assert torch.equal(mine, tensor), name
    pairs = [[a is b for a in p.tensors.values() for b in p.tensors.values()] for p in (got, want)]
    assert pairs[0] == pairs[1]


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with one name for each tensor, as checkpoints are saved."""
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k in kept}


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_bert", "llamalike", "nanogpt", "encdec", "einsum"])
def test_it_is_what_capturing_the_other_model_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.build()
    other = randomise(copy.deepcopy(model), 7)
    args, kwargs = case.inputs(2, min(7, case.max_length), 0)
    program, want = (Pipeline.default().run(capture(m, *args, **kwargs)) for m in (model, other))
    held = {k: (t, t.detach().clone()) for k, t in program.tensors.items()}
    file = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in untied(other).items()}, file)
    state = torch.get_rng_state()
    for weights in (other, other.state_dict(), file):
        got = program.with_weights(weights)
        same(got, want)
        if weights is not file:
            same(got.unfolded, want.unfolded)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(program.tensors[k] is t and torch.equal(t, v) for k, (t, v) in held.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_folded_twice_is_folded_twice(dtype: torch.dtype) -> None:
    first, second = Pipeline([FoldNorm()]), Pipeline([CenterUnembed(output=0)])
    model, other = net(0, dtype), net(1, dtype)
    program, want = (second.run(first.run(capture(m, IDS))) for m in (model, other))
    formulas = program.formulas.values()
    both = [f for f in formulas if any(not isinstance(o, Tensor) for o in f.over.values())]
    assert [f.name for f in both] == ["head.weight", "head.bias"]
    got = program.with_weights(other.state_dict())
    same(got, want)
    same(got.unfolded, want.unfolded)
    same(got.with_weights(model), program)


def shards(folder: Path, state: dict[str, Tensor]) -> Path:
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({n: state[n] for n in held}, folder / file)
    index = {"weight_map": {n: file for file, held in files.items() for n in held}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    return path


def sources(change: Change) -> set[str]:
    made = (change.scale, change.shift, change.turn)
    return {s for formula in made if formula is not None for s in formula.sources}


def test_files_shards_an_index_and_an_open_file(tmp_path: Path) -> None:
    other = net(1)
    program, want = rewritten(net(0)), rewritten(other)
    index = shards(tmp_path, untied(other))
    for path in (index, str(index), tmp_path):
        same(program.with_weights(path), want)
    index.unlink()
    got = program.with_weights(tmp_path)
    same(got, want)
    torch.testing.assert_close(got(IDS), want(IDS), rtol=0, atol=0)
    save_file(untied(other), tmp_path / "model.safetensors")
    same(program.with_weights(safe_open(tmp_path / "model.safetensors", "pt")), want)
    again = got.with_weights(net(0).state_dict())
    same(again, rewritten(net(0)))
    assert got.unfolded is not None
    kept = {id(t) for t in got.tensors.values()}
    others = [t for t in got.unfolded.tensors.values() if id(t) not in kept]
    # All but what a value is mapped back with.
    mapped = {s for entry in got.journal for c in entry.changes for s in sources(c)}
    held = {k for k, t in got.unfolded.tensors.items() if id(t) not in kept and not t.is_meta}
    assert any(t.is_meta for t in others)
    assert held <= mapped


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_of_every_name_is_left_out(prefix: str) -> None:
    other = net(1)
    state = {f"{prefix}{k}": v for k, v in other.state_dict().items()}
    names = list(state)
    same(rewritten(net(0)).with_weights(state), rewritten(other))
    assert list(state) == names


def refused(weights: Any, **options: Any) -> str:
    program = rewritten(net(0))
    held = dict(program.tensors)
    with pytest.raises(RewriteError) as raised:
        program.with_weights(weights, **options)
    assert all(program.tensors[k] is t for k, t in held.items())
    return str(raised.value)


def test_all_that_is_wrong_is_said_in_one_error(tmp_path: Path) -> None:
    state = untied(net(1))
    wrong = {k: v for k, v in state.items() if k != "inner.weight"} | {
        "other": torch.ones(1),
        "places": torch.ones(8),
        "scale": torch.ones(9),
        "norm.weight": torch.ones(8).double(),
    }
    save_file(wrong, tmp_path / "model.safetensors")
    for weights in (wrong, tmp_path):
        text = refused(weights)
        assert text.splitlines()[0] == "the weights are not those of Net: 5 do not fit"
        assert "inner.weight is missing in the weights" in text
        assert "other is in the weights and not in the model" in text
        assert "places is in the weights and not in the model" in text
        assert "scale has the shape (9,) in the weights and (8,) in the program" in text
        assert "norm.weight is torch.float64 in the weights and torch.float32" in text
    extra = state | {"other": torch.ones(1), "places": torch.ones(8)}
    same(rewritten(net(0)).with_weights(extra, strict=False), rewritten(net(1)))
    assert "inner.weight is missing" in refused(
        {k: v for k, v in state.items() if k != "inner.weight"}, strict=False
    )


def test_tied_names_with_two_values_are_refused(tmp_path: Path) -> None:
    state = untied(net(1)) | {"head.weight": torch.randn(11, 8)}
    save_file(state, tmp_path / "model.safetensors")
    for weights in (state, tmp_path):
        text = refused(weights)
        assert "one tensor in the model and differ in the weights" in text
        assert "head.weight" in text
        assert "table.weight" in text
    state["head.weight"] = state["table.weight"].clone()
    same(rewritten(net(0)).with_weights(state), rewritten(net(1)))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path, words in {
        tmp_path: "holds no .safetensors file",
        tmp_path / "none.safetensors": "there is no file",
    }.items():
        assert words in refused(path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    assert "cannot be read as safetensors" in refused(broken)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}", encoding="utf-8")
    assert "is no index" in refused(index)
    index.write_text('{"weight_map": {"a": "lost.safetensors"}}', encoding="utf-8")
    assert "lost.safetensors" in refused(index)
    assert "weights are given as int" in refused(3)
    assert "not a tensor" in refused(untied(net(1)) | {"scale": 3})
    with pytest.raises(RewriteError, match="is a copy"):
        copy.deepcopy(rewritten(net(0))).with_weights(net(1))


def test_a_tensor_that_is_frozen_stays_so_and_calls_off_the_path_know_the_weights() -> None:
    model = net(0)
    model.inner.weight.requires_grad_(False)
    program = Pipeline([FoldScale()]).run(capture(model, IDS))
    got = program.with_weights(net(1).state_dict())
    grads = {k: t.requires_grad for k, t in program.tensors.items()}
    assert {k: t.requires_grad for k, t in got.tensors.items()} == grads
    assert got.origin is not None
    torch.testing.assert_close(got.origin.model(IDS), net(1)(IDS), rtol=0, atol=0)


def test_a_lens_takes_another_checkpoint() -> None:
    case = CASES["nanogpt"]
    args, kwargs = case.inputs(2, 7, 0)
    lens = lensfx.wrap(case.build(), *args, **kwargs)
    other = randomise(case.build(), seed=5)
    again = lens.with_weights(other)
    assert check(other, again, up_to=UpToLogitShift()).error <= 1e-12
    assert not check(other, lens, up_to=UpToLogitShift())


def test_what_is_left_without_weights_is_compared_folded_and_not_proved(tmp_path: Path) -> None:
    case = CASES["nanogpt"]
    args, kwargs = case.inputs(2, 7, 0)
    program = Pipeline.default().run(capture(case.build(), *args, **kwargs))
    other = randomise(case.build(), seed=5).double().float()
    path = tmp_path / "model.safetensors"
    save_model(other, str(path))
    again = program.with_weights(path)
    assert check(other, again, up_to=UpToLogitShift()).error <= 1e-4
    with pytest.raises(LensError, match="holds no weights from before they were folded"):
        prove(again)
