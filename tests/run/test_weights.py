"""Weights by role: another library's, what the graph computes with them, gradients, refusals."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures.models import BUILDERS, IDS
from safetensors.torch import load_file
from torch import Tensor, nn

import lensfx
from lensfx import LensError
from lensfx.analysis.structure import structure
from lensfx.run.factored import FactoredMatrix
from lensfx.run.weights import Weights

FOLDER = Path(__file__).resolve().parents[1] / "fixtures"


def weights_of(model: nn.Module, *args: Any, **kwargs: Any) -> Weights:
    program = lensfx.capture(model, *args, **kwargs)
    return Weights(program, structure(program))


@cache
def of(name: str, attention: str = "sdpa") -> Weights:
    return weights_of(BUILDERS[name](attention), input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", BUILDERS)
def test_another_librarys_weights_bit_for_bit(name: str, attention: str) -> None:
    found = of(name, attention)
    held = load_file(FOLDER / f"analyses_{name}.safetensors")
    keys = [k.removeprefix("weight/") for k in held if k.startswith("weight/")]
    assert len(keys) >= 15
    for key in keys:
        ours, theirs = getattr(found, key).detach(), held[f"weight/{key}"]
        assert torch.equal(ours, theirs), key


class Attention(nn.Module):
    """One way to write q, k, v and the output projection; the numbers are the same in all."""

    def __init__(self, way: str, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.way, self.heads, self.size = way, heads, width // heads
        seed = torch.Generator().manual_seed(1)
        parts = torch.randn(4, heads, width, self.size, generator=seed) / 3
        biases = torch.randn(4, width, generator=seed) / 3
        self.parts, self.biases = nn.Parameter(parts), nn.Parameter(biases)
        fused = parts[:3].permute(0, 1, 3, 2)  # [3, head, size, width]
        rows = fused.transpose(0, 1) if way == "interleaved" else fused
        inside = biases[:3].view(3, heads, self.size)
        inside = inside.transpose(0, 1) if way == "interleaved" else inside
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        with torch.no_grad():
            self.qkv.weight.copy_(rows.reshape(3 * width, width))
            self.qkv.bias.copy_(inside.reshape(-1))
            self.out.weight.copy_(parts[3].transpose(1, 2).reshape(width, width).T)
            self.out.bias.copy_(biases[3])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = getattr(self, self.way)(x)
        scores = q @ k.transpose(-1, -2) / self.size**0.5
        mask = torch.full_like(scores, float("-inf")).triu(1)
        z = (scores + mask).softmax(-1) @ v  # [batch, head, pos, size]
        if self.way == "summed":
            spread = torch.einsum("bhpk,hkd->bphd", z, self.parts[3].transpose(1, 2).contiguous())
            return spread.sum(2) + self.biases[3]
        return self.out(z.transpose(1, 2).flatten(2)) * 1.0

    def chunked(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv(x).chunk(3, -1)
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts]

    def sliced(self, x: Tensor) -> list[Tensor]:
        y, w = self.qkv(x), self.heads * self.size
        parts = (y[..., :w], y[..., w : 2 * w], y[..., 2 * w :])
        return [t.view(*t.shape[:2], self.heads, self.size).permute(0, 2, 1, 3) for t in parts]

    def selected(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        return y[0], y[1], y[2]

    def interleaved(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.qkv(x).view(*x.shape[:2], self.heads, 3 * self.size).transpose(1, 2)
        return y.split(self.size, -1)

    def transposed(self, x: Tensor) -> list[Tensor]:
        weight = self.qkv.weight.T
        y = torch.addmm(self.qkv.bias, x.reshape(-1, x.shape[-1]), weight)
        parts = y.view(*x.shape[:2], -1).split(self.heads * self.size, 2)
        return [t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in parts]

    def multiplied(self, x: Tensor) -> list[Tensor]:
        y = x @ self.qkv.weight.T + self.qkv.bias
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in y.chunk(3, -1)]

    def summed(self, x: Tensor) -> list[Tensor]:
        inside = self.biases[:3].view(3, self.heads, 1, self.size)
        return [torch.einsum("bpd,hdk->bhpk", x, self.parts[i]) + inside[i] for i in range(3)]


WAYS = ("chunked", "sliced", "selected", "interleaved", "transposed", "multiplied", "summed")


class Model(nn.Module):
    """Two blocks around some attention, with a head; `scale` multiplies what is written."""

    def __init__(self, way: str, scale: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(5))
        self.attns = nn.ModuleList(Attention(way) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.head = nn.Linear(12, 19, bias=False)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(2):
            x = x + self.attns[i](self.norms[2 * i](x)) * self.scale
            x = x + self.downs[i](F.gelu(self.ups[i](self.norms[2 * i + 1](x)))) * self.scale
        return self.head(self.norms[4](x))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_attention_gives_the_same_weights(way: str) -> None:
    torch.manual_seed(0)
    model = Model(way)
    found = weights_of(model, IDS % 19)
    parts, biases = model.attns[1].parts, model.attns[1].biases
    for i, key in enumerate(("W_Q", "W_K", "W_V")):
        torch.testing.assert_close(getattr(found, key)[1], parts[i], rtol=0, atol=0)
    torch.testing.assert_close(found.W_O[1], parts[3].transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(found.b_O[1], biases[3], rtol=0, atol=0)
    if way != "summed":
        # There the value per head stands before its bias.
        torch.testing.assert_close(found.b_V[1], biases[2].view(3, 4), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_multiplier_is_part_of_what_is_written(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model("chunked", scale=0.5).to(kind)
    found = weights_of(model, IDS[:1] % 19)
    assert torch.equal(found.W_out[0], model.downs[0].weight.T * 0.5)
    assert torch.equal(found.b_out[1], model.downs[1].bias * 0.5)
    assert found.W_in.dtype == kind


def test_gradients_reach_the_parameters_and_values_follow_them() -> None:
    torch.manual_seed(0)
    model = Model("interleaved")
    found = weights_of(model, IDS % 19)
    found.OV.AB.square().sum().backward()
    fused = model.attns[0].qkv.weight.grad
    assert fused is not None
    heads = fused.view(3, 3, 4, 12)
    assert heads[:, 2].abs().min() > 0
    assert not heads[:, :2].any()
    before = found.W_Q.clone()
    with torch.no_grad():
        model.attns[1].qkv.weight.mul_(2)
    assert torch.equal(found.W_Q[1], 2 * before[1])
    assert torch.equal(found.W_Q[0], before[0])


def test_layers_that_differ_are_a_tuple() -> None:
    torch.manual_seed(0)
    model = Model("chunked")
    model.ups[1], model.downs[1] = nn.Linear(12, 24), nn.Linear(24, 12)
    found = weights_of(model, IDS % 19)
    assert [tuple(w.shape) for w in found.W_in] == [(12, 20), (12, 24)]
    with pytest.raises(LensError, match="no layer has a W_gate"):
        _ = found.W_gate


def test_what_is_no_matrix_names_the_node_in_the_way() -> None:
    class Gated(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.chunked(x)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            z = z * x.mean(-1).sigmoid()[:, None, :, None]
            return self.out(z.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Model("chunked")
    model.attns = nn.ModuleList(Gated("chunked") for _ in range(2))
    found = weights_of(model, IDS % 19)
    with pytest.raises(LensError, match=r"W_O of block 0: .*%unsqueeze") as caught:
        _ = found.W_O
    assert "test_weights.py" in str(caught.value)


@pytest.mark.parametrize("shape", [(5, 3, 6), (4, 3, 4), (2, 6, 3)])
def test_a_factored_matrix_is_its_product(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    left, middle, right = shape
    a, b = torch.randn(2, left, middle).double(), torch.randn(2, middle, right).double()
    found, whole = FactoredMatrix(a, b), a @ b
    close = torch.testing.assert_close
    close(found.AB, whole)
    close(found.T.AB, whole.mT)
    u, s, v = found.svd()
    close(u * s[..., None, :] @ v.mT, whole)
    close(s[..., : min(shape)], torch.linalg.svdvals(whole)[..., : min(shape)])
    close(found.norm(), torch.linalg.matrix_norm(whole))
    close(found.make_even().AB, whole)
    close((found @ torch.eye(right).double()).AB, whole)
    close(torch.ones(left).double() @ found, whole.sum(-2))
    close((found @ found.T).AB, whole @ whole.mT)
    close(found[1, :2, 1].AB, whole[1, :2, 1:2])
    close(found[..., -1:].AB, whole[..., -1:])
    close((2 * found).AB, 2 * whole)
    if left == right:
        ours = found.eigenvalues.abs().sort().values
        close(ours, torch.linalg.eigvals(whole).abs().sort().values[..., -middle:])
    with pytest.raises(ValueError, match="do not fit"):
        FactoredMatrix(a, a)
