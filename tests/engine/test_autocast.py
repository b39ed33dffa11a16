"""Autocast in a model becomes casts in the graph: same numbers, same gradients, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensfx.capture import capture as plain_capture
from lensfx.capture.autocast import flat_regions
from lensfx.errors import CaptureError
from lensfx.graph import dtype_of, is_op, module_path, source_line
from lensfx.graph.program import Program
from lensfx.graph.text import graph_text

aten = torch.ops.aten
torch.set_num_threads(1)
bf16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
fp16 = functools.partial(torch.autocast, "cpu", dtype=torch.float16)
off = functools.partial(torch.autocast, "cpu", enabled=False)
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers of width 6, and a body that uses them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.up, self.down, self.own = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 6)
        self.norm, self.groups = nn.LayerNorm(6), nn.GroupNorm(2, 6)
        self.conv, self.back = nn.Conv1d(6, 8, 3, padding=1), nn.ConvTranspose1d(8, 6, 1)
        self.gru, self.lstm = (kind(6, 6, batch_first=True) for kind in (nn.GRU, nn.LSTM))
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.table = nn.Embedding(9, 6)
        self.table.weight = self.own.weight if body is tied else self.table.weight
        self.wide = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(6, 6), requires_grad=False)
        self.register_buffer("basis", torch.zeros(6, 6))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def inside(body: Body) -> Body:
    """The body in a region; its result is used outside it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        with bf16():
            y = body(m, x)
        return y * 1.25

    return forward


def attention(m: Net, x: Tensor) -> Tensor:
    q, k = m.own(x), x
    return F.scaled_dot_product_attention(q, k, x, attn_mask=q @ k.mT)


def nested(m: Net, x: Tensor) -> Tensor:
    with bf16():
        y = m.own(x)
        with off():
            y = m.own(y.float())
            with bf16():
                y = m.own(y) + y
        with fp16():
            z = m.up(y)
        y = m.down(F.pad(y, (2, 2)))
    return m.own(y.float()) + z.sum()


def two_regions(m: Net, x: Tensor) -> Tensor:
    with bf16():
        y = m.own(m.own(x))
    y = m.own(y.float())
    with bf16():
        return m.own(m.own(y))


def gradless(m: Net, x: Tensor) -> Tensor:
    with bf16():
        with torch.no_grad():
            gate = m.own(x).sigmoid()
        y = m.own(x) * gate
    with torch.no_grad(), bf16():
        z = m.down(m.up(x))
    return y + z


def tied(m: Net, x: Tensor) -> Tensor:
    with bf16():
        return m.own(F.linear(x, m.table.weight)) + F.embedding(x.argmax(-1), m.table.weight)


@bf16()
def decorated(m: Net, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(m.norm(x))))


def loss(m: Net, x: Tensor) -> Any:
    with bf16():
        y = m.own(x)
        ids = x.argmax(-1)
        losses = [F.mse_loss(y, x), F.smooth_l1_loss(y, x), F.cross_entropy(y.mT, ids)]
        losses += [
            F.binary_cross_entropy_with_logits(y, x.sigmoid()),
            F.kl_div(y, x.softmax(-1), reduction="sum"),
        ]
    return y, losses


def identity_casts(m: Net, x: Tensor) -> Tensor:
    with bf16():
        island = x.float() * 2
        y = m.own(island).bfloat16()
        return x + y.float() + x.to(torch.float32).pow(2)


BODIES: dict[str, Body] = {
    "mlp": inside(lambda m, x: m.down(F.silu(m.up(m.norm(x)))) + x),
    "attention": inside(attention),
    "multi-head": inside(lambda m, x: m.mha(x, x, x)[0]),
    "norms": inside(lambda m, x: m.groups(m.norm(m.own(x)).mT).mT),
    "rms norm": inside(lambda m, x: F.rms_norm(m.own(x), (6,), m.norm.weight)),
    "softmax": inside(lambda m, x: m.own(x).softmax(-1) + m.own(x).log_softmax(-1)),
    "softmax to a dtype": inside(lambda m, x: m.own(x).softmax(-1, dtype=torch.float32)),
    "convolution": inside(lambda m, x: m.back(m.conv(x.mT)).mT),
    "gru": inside(lambda m, x: m.gru(m.own(x))[0]),
    "lstm": inside(lambda m, x: m.lstm(m.own(x))[0]),
    "einsum": inside(lambda m, x: torch.einsum("btd,ed,fe->btf", x, m.basis, m.own.weight)),
    "promotion": inside(lambda m, x: torch.cat([m.own(x), x], 1)),
    "promotion to float64": inside(lambda m, x: torch.stack([x @ m.basis, x.double()]).sum(0)),
    "float64 is left": inside(lambda m, x: x.double() @ m.wide + m.own(x)),
    "frozen weights": inside(lambda m, x: x @ m.frozen + x @ m.frozen.mT),
    "cast by view": inside(lambda m, x: x @ m.own.weight.t() + F.linear(x, m.own.weight)),
    "products": inside(lambda m, x: x.prod(-1, keepdim=True) * m.own(x).cumsum(1) + x.norm()),
    "distances": inside(lambda m, x: torch.cdist(m.own(x), x) @ x),
    "interpolation": inside(lambda m, x: F.interpolate(m.own(x).mT, scale_factor=2).mT),
    "addmm": inside(lambda m, x: torch.baddbmm(x, x @ x.mT, m.own(x))),
    "in place": inside(lambda m, x: m.own(x).add_(x).mul_(2)),
    "tensordot": inside(lambda m, x: torch.tensordot(m.own(x), m.own(m.basis), dims=([2], [0]))),
    "norm of weights": inside(lambda m, x: F.linear(x, F.normalize(m.own.weight, dim=1))),
    "checks": inside(lambda m, x: F.pad(m.own(x), (1, 1)).unfold(1, 1, 1).squeeze(-1)[..., 1:-1]),
    "nested": nested,
    "two regions": two_regions,
    "gradless": gradless,
    "tied": tied,
    "decorated": decorated,
    "losses": loss,
    "identity casts": identity_casts,
}


def capture(model: nn.Module, *args: Any) -> Program:
    with flat_regions():
        return plain_capture(model, *args)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(value: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(value))


def run(function: Callable[..., Any], weights: list[Tensor], x: Tensor) -> list[Any]:
    """Results of a call, then its gradients in the input and the weights."""
    x = x.clone().requires_grad_()
    out = flat(function(x))
    total = sum((o.double() * noise(*o.shape, seed=1)).sum() for o in out)
    return [*out, *torch.autograd.grad(total, [x, *weights], allow_unused=True)]


def same(model: nn.Module, program: Program, *shapes: tuple[int, ...]) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    for seed, shape in enumerate(shapes):
        x = noise(*shape, seed=seed)
        want, got = run(model, weights, x), run(program, weights, x)
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_region_is_the_model_to_the_bit(body: Body) -> None:
    model = Net(body).eval()
    program = capture(model, noise(2, 7, 6))
    assert "autocast" not in graph_text(program.graph)
    lengths = {a.symbol for a in program.guards.dynamic}
    shapes = (
        [(2, 7, 6), (3, 5, 6), (1, 1, 6)] if len(lengths) > 1 else [(2, 7, 6), (3, 7, 6), (1, 7, 6)]
    )
    same(model, program, *shapes)


def test_every_value_has_the_dtype_that_running_the_graph_gives_it() -> None:
    for body in BODIES.values():
        program = capture(Net(body).eval(), noise(2, 7, 6))

        class Watch(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                if isinstance(value, Tensor):
                    assert value.dtype == dtype_of(n), n
                return value

        Watch(program.flat).run(noise(2, 7, 6))


def test_a_weight_is_cast_once_in_a_region_whoever_reads_it() -> None:
    program = capture(Net(two_regions).eval(), noise(2, 7, 6))
    reads = {n.target: n for n in program.graph.nodes if n.op == "get_attr"}
    casts = [u for u in reads["own.weight"].users if is_op(u, aten.to.dtype)]
    assert [len(c.users) for c in casts] == [2, 2]


def test_a_cast_names_the_line_and_the_module_that_needed_it() -> None:
    program = capture(Net(decorated).eval(), noise(2, 7, 6))
    casts = [n for n in program.graph.nodes if is_op(n, aten.to.dtype)]
    assert {module_path(n) for n in casts} == {"up", "down"}
    assert all(source_line(n).startswith("test_autocast.py") for n in casts)


class Ambient(nn.Module):
    """A model whose whole forward runs under autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Any:
        with bf16():
            return self.inner(x)


@pytest.mark.parametrize("name", ["mlp", "nested", "multi-head", "losses"])
def test_ambient_autocast_around_a_model(name: str) -> None:
    body = {
        "mlp": lambda m, x: m.down(F.silu(m.up(m.norm(x)))) + x,
        "multi-head": lambda m, x: m.mha(x, x, x)[0],
    }.get(name, BODIES[name])
    model = Net(body).eval()
    program = capture(Ambient(model), noise(2, 7, 6))
    weights = [p for p in model.parameters() if p.requires_grad]
    x = noise(2, 7, 6, seed=3)
    want = run(bf16()(model), weights, x)
    for a, b in zip(want, run(program, weights, x), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_what_cannot_be_written_as_casts_is_refused_by_line() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Any:
            with bf16():
                return mixed(x, self.own.weight)

    with pytest.raises(CaptureError) as raised:
        capture(Mixed(nested).eval(), noise(2, 7, 6))
    assert raised.value.headline == (
        "what autocast does inside mixed cannot be written as casts of its inputs"
    )
    assert "return mixed(x, self.own.weight)" in raised.value.at[0]


LIBRARY = torch.library.Library("lensfx_autocast_test", "DEF")
LIBRARY.define("mixed(Tensor x, Tensor w) -> Tensor")


def _mixed(x: Tensor, w: Tensor) -> Tensor:
    """Reads its input as it is and, in a product, as autocast makes it."""
    return x @ w + x.exp() * w.sum()


LIBRARY.impl("mixed", _mixed, "CompositeImplicitAutograd")
mixed = torch.ops.lensfx_autocast_test.mixed
