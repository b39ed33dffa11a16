"""The float64 oracle: right on every kind of program, and nothing outside it changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lensfx.errors import LensError
from lensfx.verify.oracle import Float64

TINY = 1e-15
EPS = torch.finfo(torch.float32).eps


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value


def in_oracle(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Float64() as oracle:
        return oracle.read(function(*args, **kwargs))


def with_random_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.options = options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(-2, -3) for t in (self.q(x), self.k(x), x))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.arange(1, 9) / 7 + torch.tensor(0.1) + torch.full((), 0.3)
        x = torch.tensordot(x * scale, self.w, dims=([-1], [0]))
        return torch.where(x > 0, x, 0.1) @ torch.linalg.inv(self.w.T).type_as(x)


def modules() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    x, bias, keep = torch.randn(2, 5, 8), torch.randn(5, 5), torch.ones(5, 5).tril() > 0
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    heads = nn.MultiheadAttention(8, 2, batch_first=True)
    weight_norm = nn.utils.parametrizations.weight_norm
    return {
        "mlp": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (x,), {}),
        "norms": (nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8, 1e-5)), (x,), {}),
        "convolution": (nn.Sequential(nn.Conv1d(5, 4, 3), nn.GroupNorm(2, 4)), (x,), {}),
        "lstm": (nn.LSTM(8, 4, 2, bidirectional=True), (x,), {}),
        "gru": (nn.GRU(8, 4), (x,), {}),
        "encoder": (encoder, (x,), {}),
        "heads with a float mask": (heads, (x, x, x), {"attn_mask": bias}),
        "heads with padding": (heads, (x, x, x), {"key_padding_mask": x[..., 0] > 1}),
        "attention": (Attention(is_causal=True, scale=0.3), (x,), {}),
        "attention with a float mask": (Attention(), (x, bias), {}),
        "attention with a boolean mask": (Attention(), (x, keep), {}),
        "bag": (nn.EmbeddingBag(5, 3, max_norm=1.0), (torch.tensor([[1, 2]]),), {}),
        "bilinear": (nn.Bilinear(8, 8, 3), (x, x), {}),
        "parametrized": (weight_norm(nn.Linear(8, 3)), (x,), {}),
        "constants": (Inverse(), (x,), {}),
    }


@pytest.mark.parametrize("name", modules())
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_module_is_its_double(name: str, mode: Callable[[], Any]) -> None:
    module, args, kwargs = modules()[name]
    module = with_random_weights(module)
    double = copy.deepcopy(module).double()
    # With gradients on, torch takes no fused path, which is wrong for a float mask.
    torch.set_default_dtype(torch.float64)
    try:
        expected = first(double(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()}))
    finally:
        torch.set_default_dtype(torch.float32)
    before = copy.deepcopy(module.state_dict())
    with mode():
        found = first(in_oracle(module, *args, **kwargs))
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        plain = first(module(*args, **kwargs)).double()
    assert found.dtype is torch.float64
    assert error(found, expected) <= TINY
    assert error(plain, expected) > 1e-9


def test_a_float64_model_is_itself() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 4)).double()
    x = 1e-4 * torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(in_oracle(module, x), module(x))


def hf(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    wider = {"intermediate_size": 24, **size, **special}
    config, model = {
        "gpt2": (
            lambda: transformers.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=50, **special
            ),
            transformers.GPT2LMHeadModel,
        ),
        "llama": (
            lambda: transformers.LlamaConfig(num_key_value_heads=1, **wider),
            transformers.LlamaForCausalLM,
        ),
        "bert": (lambda: transformers.BertConfig(**wider), transformers.BertForMaskedLM),
    }[name]
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    module = with_random_weights(model(config()))
    return module, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_transformer_is_its_double(name: str) -> None:
    module, call = hf(name)
    found = in_oracle(module, **call).logits
    with torch.no_grad():
        assert error(module(**call).logits.double(), found) > 1e-8
        assert error(found, copy.deepcopy(module).double()(**call).logits) <= TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_islands_are_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module, call = hf("llama")
    module = module.to(dtype)
    found = in_oracle(module, **call).logits
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        cast = error(double(**call).logits, found)
        monkeypatch.setattr(Tensor, "float", lambda t: t.double())
        monkeypatch.setattr(torch, "float32", torch.float64)
        frequencies = double.model.rotary_emb.inv_freq
        frequencies.copy_(module.model.rotary_emb.inv_freq)
        assert error(found, double(**call).logits) <= TINY
    assert cast > 1e-9


class Island(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(1 + 0.3 * torch.randn(8))
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + 1e-5)
        h = (self.g * h.to(x.dtype)).half().bfloat16()
        return F.softmax(F.linear(h, self.w), -1, torch.float32).type(torch.bfloat16)


def test_a_float32_norm_in_a_bfloat16_model_is_the_norm() -> None:
    module, x = Island().bfloat16(), torch.randn(3, 8).bfloat16()
    g, w, y = module.g.detach().double(), module.w.detach().double(), x.double()
    n = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = F.softmax((n * g) @ w.t(), -1)
    assert error(in_oracle(module, x), expected) < 1e-15
    assert error(module(x).detach().double(), expected) > 1e-4


def rotary(x: Tensor) -> Tensor:
    inverse = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    angles = torch.outer(torch.arange(x.shape[-2]), inverse).float()
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def mixed(x: Tensor) -> Tensor:
    spectrum = torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).conj()
    return (spectrum.real * 2 + spectrum.imag).to(x.dtype)


@pytest.mark.parametrize("function", [rotary, mixed])
def test_complex_numbers(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 8)
    if function is rotary:
        steps = torch.arange(5).double()[:, None] / 10000 ** (torch.arange(4).double() / 4)
        y, (c, s) = x.double(), (steps.cos(), steps.sin())
        pairs = y[:, ::2] * c - y[:, 1::2] * s, y[:, ::2] * s + y[:, 1::2] * c
        expected = torch.stack(pairs, -1).flatten(-2)
    else:
        expected = mixed(x.double())
    assert error(in_oracle(function, x), expected) < 1e-15
    assert error(in_oracle(function, x.bfloat16().float()), expected) > 1e-4


SMALL = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_every_way_to_name_a_smaller_float_names_float64(
    mode: Callable[[], Any], dtype: torch.dtype
) -> None:
    x = torch.randn(3, dtype=dtype)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    with mode(), Float64() as oracle:
        made = [
            third.to(dtype),
            third.to("cpu", dtype),
            third.to(x),
            third.type(dtype),
            third.type_as(x),
            third.float().half().bfloat16(),
            torch.ops.aten._to_copy.default(third, dtype=dtype),
            torch.tensor(1 / 3, dtype=dtype),
            torch.as_tensor(1 / 3, dtype=dtype),
            torch.asarray(1 / 3, dtype=dtype),
            torch.full((), 1 / 3, dtype=dtype),
            torch.ones((), dtype=dtype) / 3,
            torch.arange(1, 2, dtype=dtype)[0] / 3,
            torch.linspace(0, 1, 4, dtype=dtype)[1],
            x.new_tensor(1 / 3),
            x.new_full((), 1 / 3),
            torch.zeros_like(x)[0] + 1 / 3,
            torch.tensor(1) / 3,
            torch.tensor(1 / 3),
            nn.Parameter(third.to(dtype)),
        ]
        assert all(torch.equal(t, third) and t.dtype is torch.float64 for t in made)
        assert x.dtype is oracle.read(x).dtype is torch.float64
        assert torch.full((), 1j, dtype=torch.complex64).dtype is torch.complex128
        assert (third * 10).to(torch.int32) == 3
    assert x.dtype is dtype


def test_settings_are_as_before_also_after_an_error() -> None:
    x = torch.randn(3)
    for failure in (None, ValueError):
        try:
            with Float64():
                assert torch.get_default_dtype() is torch.float64
                if failure is not None:
                    raise failure
        except ValueError:
            pass
        assert torch.get_default_dtype() is torch.float32
        assert torch.is_grad_enabled()
        assert (x + torch.ones(3)).dtype is x.dtype is torch.float32


def test_autocast_is_off_and_leaves_nothing_behind() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(2, 8)
    expected = x.double() @ linear.weight.detach().double()

    def outer(x: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu") or not oracle
        return torch.cat([torch.mm(x, linear.weight), F.layer_norm(x, (8,))], -1)[..., :8]

    def inner(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.cat([torch.mm(x, linear.weight), F.layer_norm(x, (8,))], -1)[..., :8]

    oracle = None
    assert error(in_oracle(inner, x), expected) <= TINY
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Float64() as oracle:
            assert error(outer(x), expected) <= TINY
            assert error(inner(x), expected) <= TINY
        oracle = None
        plain = outer(x)
        assert error(in_oracle(inner, x), expected) <= TINY
        assert torch.equal(outer(x), plain)
        assert error(plain.double(), expected) > 1e-5


@pytest.mark.parametrize("call", [F.rms_norm, torch.rms_norm, torch.ops.aten.rms_norm.default])
@pytest.mark.parametrize("dtype", [torch.float64, *SMALL])
def test_an_eps_that_is_not_given_is_that_of_the_dtype(
    call: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x = (1e-4 * torch.randn(3, 8)).to(dtype)
    eps = torch.finfo(dtype).eps if dtype is torch.float64 else EPS
    expected = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    assert error(in_oracle(call, x, [8]), expected) <= TINY
    assert error(in_oracle(call, x, [8], None, 1e-3), expected) > 0.1
    with Float64(dtype=torch.float32):
        spelled = call(x.double(), [8])
        assert error(spelled, call(x.double(), [8], eps=EPS)) == 0.0


Q = torch.zeros(1, 1, 128, 16)
X, Y, EMPTY = torch.randn(4, 4), torch.randn(4, 4), torch.empty(0)
BITS = X.view(torch.int32)
MIXTURES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": torch.add,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "addmm": lambda a, b: torch.addmm(a, b, a),
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "tensordot": torch.tensordot,
    "inner": torch.inner,
    "vecdot": torch.linalg.vecdot,
    "multi_dot": lambda a, b: torch.linalg.multi_dot([a, b, a]),
    "cat": lambda a, b: torch.cat([a, b]),
    "meshgrid": lambda a, b: torch.meshgrid(a[0], b[0], indexing="ij")[1],
    "cartesian_prod": lambda a, b: torch.cartesian_prod(a[0], b[0]),
    "index_put": lambda a, b: a.clone().index_put((torch.tensor([1]),), b[0]),
    "scatter": lambda a, b: a.clone().scatter(0, torch.zeros(1, 4, dtype=torch.int64), b),
    "sdpa": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], a[None], b),
    "quantile": lambda a, b: (a + b[0, 0]).quantile(0.3, -1),
    "layer_norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]),
    "rms_norm": lambda a, b: F.rms_norm(a, (4,), b[0], 1e-5),
    "cross_entropy": lambda a, b: F.cross_entropy(a, b.softmax(-1)),
    "cosine": F.cosine_similarity,
    "cdist": torch.cdist,
    "vmap": torch.vmap(torch.dot),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_outside_tensor_meets_an_inside_one(name: str) -> None:
    call = MIXTURES[name]
    expected = call(X.double(), Y.double())
    with Float64() as oracle:
        for a, b in ((X, Y), (X * 1, Y), (X, Y * 1)):
            assert error(oracle.read(call(a, b)), expected) <= TINY


def writes(x: Tensor, ids: Tensor, buffer: Tensor, wide: Tensor, z: Tensor) -> list[Tensor]:
    assert x.add_(1 / 3) is x
    turned = x.t()
    turned[0] *= 2
    x.view(-1)[5:7].fill_(0.1)
    x.detach().sub_(1)
    x[0] = 0.1
    x[x > 3] = 0.7
    ids.add_(5)
    ids[0] = 9
    buffer.copy_(x.reshape(-1)[:6])
    wide.neg_()
    wide[1:].mul_(x[0, :2])
    torch.add(x[0, :3], 1, out=buffer[:3])
    torch.inner(x[0], x[1], out=buffer[5])
    wide.copy_(torch.sub(wide, 1, out=wide))
    torch._foreach_add_([x, buffer], 1.0)
    torch.view_as_real(z)[..., 0].mul_(0.3)
    z.imag.add_(0.1)
    z.conj().mul_(1j)
    fresh = torch.tensor([1.0, 2.0])
    fresh += x[0, :2]
    return [turned, x[1], z.conj(), fresh, torch.tensor(x.tolist())]


def arguments() -> list[Tensor]:
    torch.manual_seed(1)
    z = torch.randn(2, 3, dtype=torch.complex64)
    numbers = torch.randn(3, 4), torch.arange(5), torch.zeros(6), torch.randn(3).double(), z
    return list(numbers)


def test_writes_go_to_a_stand_in() -> None:
    args, same = arguments(), arguments()
    with Float64() as oracle:
        out = oracle.read(writes(*args))
    wider = [t.to(torch.complex128) if t.is_complex() else wide(t) for t in arguments()]
    torch.set_default_dtype(torch.float64)
    try:
        expected = writes(*wider)
    finally:
        torch.set_default_dtype(torch.float32)
    for found, right in zip([*out, *oracle.read(args)], [*expected, *wider], strict=True):
        assert torch.equal(found, right)
    assert all(torch.equal(a, b) for a, b in zip(args, same, strict=True))
    with oracle:
        assert torch.equal(oracle.read(args[0]), same[0].double())


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_tensors_made_inside_are_written_to_themselves(mode: Callable[[], Any]) -> None:
    with mode():
        outside, ones = torch.zeros(3, dtype=torch.float64), torch.ones(3)
    with mode(), Float64() as oracle:
        made = [outside * 1, torch.zeros(3), torch.tensor([0.0] * 3), outside.new_tensor([0.0] * 3)]
        for t in made:
            t[1:].add_(1)
        assert torch.add(ones, 0, out=outside) is outside
        assert torch.ops.aten.add_.Tensor(outside, made[0]) is outside
        found = oracle.read([outside, ones])
    assert [t.dtype for t in found] == [torch.float64] * 2
    assert [t.tolist() for t in found] == [[1, 2, 2], [1, 1, 1]]
    assert [t.tolist() for t in made] == [[0, 1, 1]] * 4
    assert outside.tolist() == [0, 0, 0]


def test_empty_tensors_share_nothing() -> None:
    a, b = torch.empty(0), torch.empty(0, 2, dtype=torch.bool)
    with Float64() as oracle:
        a.add_(1)
        b.logical_not_()
        assert oracle.read(b.any() | a.isnan().any()).tolist() is False


def test_an_outside_tensor_keeps_its_shape() -> None:
    x = torch.randn(3, 4)
    with Float64() as oracle:
        assert oracle.read(x.unsqueeze_(1).transpose_(0, 2)).shape == (4, 1, 3)
    assert (x.shape, x.stride()) == ((3, 4), (4, 1))


@pytest.mark.parametrize(
    ("norm", "size"),
    [
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (2, 4, 5)),
    ],
)
def test_running_statistics_run_inside_only(norm: nn.Module, size: tuple[int, ...]) -> None:
    double, before = copy.deepcopy(norm).double(), copy.deepcopy(norm.state_dict())
    x = torch.randn(size)
    with Float64() as oracle:
        found = oracle.read([norm(x), norm(2 * x), norm.eval()(x), dict(norm.named_buffers())])
    expected = [double(x.double()), double(2 * x.double()), double.eval()(x.double())]
    assert max(error(a, b) for a, b in zip(found, expected, strict=False)) <= TINY
    assert all(torch.equal(found[3][k], b) for k, b in double.named_buffers())
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    norm.train()


@pytest.mark.filterwarnings("ignore:flex_attention")
@pytest.mark.parametrize(
    ("program", "words"),
    [
        (lambda x: x.view(torch.int32), "bits of torch.float32 read as torch.int32"),
        (lambda x: setattr(x, "data", torch.ones(4)), "gives other data or another size"),
        (lambda x: x.set_(X), "gives other data or another size"),
        (lambda x: torch.cat([x, x], out=EMPTY), "gives other data or another size"),
        (lambda x: Float64().__enter__(), "they do not nest"),
        (lambda x: (X.add_(1), BITS + 1), "bits of torch.float32 read as torch.int32"),
        (lambda x: flex_attention(Q, Q, Q), "flex_attention runs a program"),
    ],
)
def test_what_cannot_be_done_is_refused(program: Callable[[Tensor], Any], words: str) -> None:
    x = torch.ones(4)
    with pytest.raises(LensError, match=words), Float64():
        program(x)
    assert torch.equal(x, torch.ones(4))
    assert torch.get_default_dtype() is torch.float32


def test_only_what_is_written_to_is_held() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    oracle = Float64()
    with oracle:
        module(torch.arange(7))
        assert oracle._memory.stand_ins == {}
        module[1].bias.mul_(2)
        assert len(oracle._memory.stand_ins) == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.h.weight = self.e.weight
        self.w = nn.Parameter(torch.randn(4, 12))
        self.register_buffer("part", torch.randn(3, 4)[1:])

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.w.split(4, 1)
        x = self.e(ids)
        return self.h((x @ q @ k.t() @ v + self.part[0]) @ self.w[:, :4].t().contiguous())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_overrides_are_read_by_every_alias() -> None:
    module, ids = Tied(), torch.arange(5)
    outside = [*module.parameters(), module.part]
    values = {t: torch.randn(t.shape, dtype=torch.float64) for t in outside}
    values[module.part] = torch.randn(2, 4)
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        for t, mine in zip(outside, [*double.parameters(), double.part], strict=True):
            mine.copy_(values[t])
        expected = double(ids)
    before = copy.deepcopy(module.state_dict())
    graph = torch.export.export(module, (ids,)).run_decompositions({}).module()
    state = dict(module.named_parameters())
    with Float64(values) as oracle:
        found = [module(ids), graph(ids), torch.func.functional_call(module, state, (ids,))]
        detached = oracle.read([module.w.data, module.w.detach()[:, 1], module.w.tolist()])
        module.w.mul_(2.0)
        assert torch.equal(oracle.read(module.w), 2 * values[module.w])
    assert [error(f, expected) for f in found] == [0.0] * 3
    assert torch.equal(detached[0], values[module.w])
    assert torch.equal(detached[1], values[module.w][:, 1])
    assert detached[2] == values[module.w].tolist()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert error(in_oracle(module, ids), expected) > 0.1


def test_overrides_of_views_of_one_storage() -> None:
    flat = torch.randn(20)
    a, b = flat[:8].view(2, 4), flat[8:].view(4, 3)
    values = {a: torch.randn(2, 4).double(), b: torch.randn(4, 3)}
    with Float64(values) as oracle:
        assert torch.equal(a @ b, values[a] @ values[b].double())
        whole = torch.cat([values[a].flatten(), values[b].double().flatten()])
        assert torch.equal(oracle.read(flat), whole)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (lambda t: {t: torch.zeros(3)}, r"of \(3,\) on cpu cannot be read in place of"),
        (lambda t: {t: torch.zeros(4, dtype=torch.int64)}, "a torch.int64 tensor of"),
        (lambda t: {t: torch.zeros(4), t[1:]: torch.ones(3)}, "share a storage and differ"),
    ],
)
def test_overrides_that_make_no_sense(overrides: Callable[..., Any], words: str) -> None:
    t = torch.zeros(4)
    with pytest.raises(LensError, match=words), Float64(overrides(t)):
        pass
    assert torch.get_default_dtype() is torch.float32


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.n = nn.Linear(8, 8), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            c = torch.cos(x.float() * 0.5).to(x.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.l(x)
        with torch.autocast("cpu", enabled=False):
            y = self.n(y.float() * torch.arange(8) / 2)
        y[:, 0] += c[:, 0]
        return torch.softmax(y, -1, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("decompose", [False, True])
def test_a_graph_is_the_model_it_was_captured_from(decompose: bool) -> None:
    module, x = Regions(), torch.randn(5, 8)
    program = torch.export.export(module, (x,), strict=False)
    graph = (program.run_decompositions({}) if decompose else program).module()
    assert decompose or any("wrap_with" in str(n.target) for n in graph.graph.nodes)
    assert error(in_oracle(graph, x), in_oracle(module, x)) <= TINY
    assert error(module(x).detach().double(), in_oracle(module, x)) > 1e-5


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        branches = (lambda x: F.rms_norm(x * 1, (4,))), torch.sin
        return torch.cond(x.sum() > 0, *branches, (x,))


def test_a_branch_is_run_in_float64() -> None:
    x = 1e-3 * torch.ones(3, 4)
    graph = torch.export.export(Branches(), (x,)).module()
    expected = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    for program in (graph, Branches()):
        assert error(in_oracle(program, x), expected) <= TINY
        assert error(in_oracle(program, -x), (-x).double().sin()) <= TINY


def test_a_script_is_run_in_float64() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        script = torch.jit.script(scripted)
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(in_oracle(script, a, b), a.double() * b.double() + math.pi)


def scripted(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() * b).to(torch.bfloat16) + math.pi
