"""The one form in which a captured graph is written, and what is refused for having none."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from torch import Tensor, fx, nn

from lensfx.capture import capture
from lensfx.errors import CaptureError
from lensfx.graph import dtype_of, graph_text, is_op, module_path, native_name, source_line
from lensfx.graph.program import Program

aten = torch.ops.aten
torch.set_num_threads(1)
Body = Callable[..., Any]


class Net(nn.Module):
    """A body that reads the module as `m`, and things for it to read."""

    steps: Tensor
    table: Tensor

    def __init__(self, body: Body, **parts: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin = nn.Linear(6, 6)
            self.embed = nn.Embedding(9, 6)
            self.register_buffer("table", torch.randn(20, 6))
        self.register_buffer("steps", torch.zeros(()))
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(body: Body, *shape: int, **parts: Any) -> tuple[Net, Program]:
    model = Net(body, **parts).eval()
    return model, capture(model, noise(*shape) if shape else noise(2, 7, 6))


@functools.cache
def named(name: str) -> tuple[nn.Module, Program]:
    model = CASES[name].build()
    args, kwargs = CASES[name].inputs(2, 7, 0)
    return model, capture(model, *args, **kwargs)


def calls(program: Program, *targets: Any) -> list[fx.Node]:
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    return [n for n in nodes if is_op(n, *targets)] if targets else nodes


def operators(program: Program) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in calls(program)]


def gradient(function: Callable[..., Any], x: Tensor, weight: Tensor) -> Tensor | None:
    out = function(x)
    return torch.autograd.grad(out, weight, noise(*out.shape, seed=1), allow_unused=True)[0]


WHOLE: dict[str, tuple[Body, Any]] = {
    "linear": (lambda m, x: m.lin(x), aten.linear.default),
    "embedding": (lambda m, x: m.embed(x.argmax(-1)), aten.embedding.default),
    "layer norm": (lambda m, x: F.layer_norm(x, (6,)), aten.layer_norm.default),
    "rms norm": (lambda m, x: F.rms_norm(x, (6,)), aten.rms_norm.default),
    "softmax": (lambda m, x: x.softmax(-1), aten.softmax.int),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        aten.scaled_dot_product_attention.default,
    ),
    "group norm": (lambda m, x: F.group_norm(x.mT, 2), aten.group_norm.default),
}


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_composites_are_kept_whole(case: tuple[Body, Any]) -> None:
    _, program = of(case[0])
    assert len(calls(program, case[1])) == 1


NOTHING: dict[str, Body] = {
    "dropout": lambda m, x: F.dropout(x, 0.5, training=m.training),
    "cast to its own dtype": lambda m, x: x.float().to(torch.float32).type_as(x),
    "contiguous view": lambda m, x: x.view(x.shape).reshape(x.shape).view_as(x),
    "whole slice": lambda m, x: x[:][:, :][..., :],
    "whole slice by its length": lambda m, x: x[:, : x.shape[1]],
    "expand to its own size": lambda m, x: x.expand(-1, -1, 6),
    "clone inside": lambda m, x: x.clone(),
    "asserts": lambda m, x: (torch._assert(x.shape[1] < 99, "long"), x)[1],
    "identity": lambda m, x: nn.Identity()(x),
}


@pytest.mark.parametrize("body", NOTHING.values(), ids=NOTHING)
def test_what_computes_nothing_is_gone(body: Body) -> None:
    model, program = of(lambda m, x: body(m, x + 1) * 2)
    assert operators(program) == ["add.Tensor", "mul.Tensor"]
    assert torch.equal(program(noise(3, 4, 6)), model(noise(3, 4, 6)))


def test_dead_code_is_gone_and_parameters_that_nobody_reads_are_named() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        F.scaled_dot_product_attention(x, x, F.dropout(m.lin(x), 0.5, training=False))
        return x * 2

    _, program = of(body)
    assert operators(program) == ["mul.Tensor"]
    assert dict(program.tensors) == {}
    assert set(program.source.unread) == {"lin.weight", "lin.bias", "embed.weight"}


@pytest.mark.parametrize("name", ["llamalike", "llamalike_to", "llamalike_offset", "hf_llama"])
def test_the_stream_does_not_run_through_the_cast_of_a_norm(name: str) -> None:
    """In float32 a cast to float32 is the same object, and tracing sends all readers through it."""
    _, program = named(name)
    embedding = calls(program, aten.embedding.default)[0]
    stream, adds = embedding, 0
    while True:
        add = [n for n in stream.users if is_op(n, aten.add.Tensor) and n.args[0] is stream]
        if not add:
            break
        assert len(add) == 1
        stream, adds = add[0], adds + 1
    assert adds == 4
    for cast in calls(program, aten.to.dtype, aten._to_copy.default):
        assert dtype_of(cast) != dtype_of(cast.args[0])


def test_casts_stay_apart_from_the_dtype_they_were_captured_in() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return x + (x.float() * 2).type_as(x)

    x = noise(2, 3).bfloat16()
    assert operators(capture(Net(body), x)) == ["to.dtype", "mul.Tensor", "to.dtype", "add.Tensor"]
    assert operators(capture(Net(body), x.float())) == ["mul.Tensor", "add.Tensor"]


@pytest.mark.parametrize("on_input", [False, True])
def test_a_write_into_what_an_identity_cast_returned_is_a_write_into_its_source(
    on_input: bool,
) -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        kept = x if on_input else m.lin(x)
        cast = kept.float()
        cast += 1
        return kept * 3 - cast

    model, program = of(body)
    x, y = noise(3, 4, 6), noise(3, 4, 6)
    assert torch.equal(program(x), model(y))
    assert torch.equal(x, y)


def test_each_use_of_a_tied_table_has_the_alias_of_its_module() -> None:
    first, last = "transformer.wte.weight", "lm_head.weight"
    for name in ("hf_gpt2", "nanogpt"):
        model, program = named(name)
        embed = calls(program, aten.embedding.default)[0]
        head = calls(program, aten.linear.default)[-1]
        assert [str(embed.args[0].target), str(head.args[1].target)] == [first, last]
        assert program.tensors[first] is program.tensors[last] is model.lm_head.weight
        assert program.source.aliases == {last: first}
        assert sum(p is model.lm_head.weight for p in program.parameters()) == 1


def test_a_module_under_two_names_has_both() -> None:
    shared = nn.Linear(6, 6)
    model, program = of(lambda m, x: m.a(m.b(x).relu()), a=shared, b=shared)
    assert [module_path(n) for n in calls(program, aten.linear.default)] == ["b", "a"]
    assert set(program.tensors) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert len(program.parameters()) == 2
    assert torch.equal(program(noise(3, 4, 6)), model(noise(3, 4, 6)))


def test_a_module_called_three_times_has_one_path_and_three_names() -> None:
    _, program = named("nanogpt_shared_block")
    norms = [n for n in calls(program) if module_path(n) == "transformer.h.0.ln_1"]
    wanted = "transformer.h.0.ln_1.layer_norm"
    assert [native_name(n) for n in norms] == [wanted, f"{wanted}_1", f"{wanted}_2"]
    assert len({n.args[2] for n in norms}) == 1


def test_names_are_unique_where_suffixes_meet() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2) * 3

    _, program = of(lambda m, x: (m.mul(x) * 4) * m.mul_1(x), mul=Inner(), mul_1=Inner())
    names = [native_name(n) for n in calls(program)]
    assert len(set(names)) == 6
    assert {"mul.mul", "mul.mul_1", "mul_1.mul", "mul_1.mul_1"} < set(names)


def test_values_know_their_module_and_line() -> None:
    _, program = named("norm_pow")
    norm = next(n for n in calls(program) if module_path(n) == "blocks.0.norm1")
    assert re.fullmatch(
        r"oddities\.py:\d+  mu = x\.mean\(dim=-1, keepdim=True\)", source_line(norm)
    )
    assert native_name(norm) == "blocks.0.norm1.mean"


def test_constants_are_tensors_of_the_program() -> None:
    class Table:
        def __init__(self) -> None:
            self.values = noise(50, 6, seed=2)

    invented = nn.Buffer(torch.full((6,), 5.0))
    model, program = of(
        lambda m, x: x * m.lifted_tensor_0 + m.table_of.values[: x.shape[1]] + torch.tensor([1.5]),
        lifted_tensor_0=invented,
        table_of=Table(),
    )
    assert program.tensors["lifted_tensor_0"] is invented
    assert any(t is model.table_of.values for t in program.tensors.values())
    assert torch.equal(program(noise(3, 4, 6)), model(noise(3, 4, 6)))
    assert all(n.meta["weight"] for n in program.graph.nodes if n.op == "get_attr")


def test_complex_and_broken_buffers() -> None:
    turns = nn.Buffer(torch.polar(torch.ones(3), torch.arange(3.0)))
    gaps = nn.Buffer(torch.tensor([1.0, math.nan]))
    spread = nn.Buffer(torch.ones(1).expand(6))
    model, program = of(
        lambda m, x: (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * m.turns)
            * m.spread[:2]
            + m.gaps
        ),
        turns=turns,
        gaps=gaps,
        spread=spread,
    )
    versions = [b._version for b in model.buffers()]
    want, got = model(noise(3, 4, 6)), program(noise(3, 4, 6))
    assert torch.equal(want.nan_to_num(9), got.nan_to_num(9))
    assert [b._version for b in model.buffers()] == versions


NO_GRAD: dict[str, Body] = {
    "a part": lambda m, x: m.lin(_without(m.lin, x)),
    "all": lambda m, x: _without(m.lin, x),
    "gradients again inside": lambda m, x: _without(lambda y: _with(m.lin, y), x),
    "a value from outside": lambda m, x: (h := m.lin(x)) + _without(lambda: h * 2),
    "a parameter": lambda m, x: (
        x @ _without(lambda: m.lin.weight) + _without(lambda: m.lin.bias * 2)
    ),
    "a write into its own": lambda m, x: m.lin(x) + _without(lambda: m.lin(x).mul_(2)),
    "detach": lambda m, x: m.lin(x).detach() * m.lin(x),
}


def _without(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def _with(function: Callable[..., Any], *args: Any) -> Any:
    with torch.enable_grad():
        return function(*args)


@pytest.mark.parametrize("body", NO_GRAD.values(), ids=NO_GRAD)
def test_regions_without_gradients_are_inlined_and_stay_without(body: Body) -> None:
    model, program = of(body)
    x = noise(3, 4, 6)
    want, got = model(x), program(x)
    assert torch.equal(want, got)
    assert want.requires_grad == got.requires_grad
    if want.requires_grad:
        a, b = (gradient(f, x, model.lin.weight) for f in (model, program))
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_region_without_autocast_is_inlined() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return m.lin(x)

    _, program = of(body)
    assert operators(program) == ["linear.default"]
    assert module_path(calls(program)[0]) == "lin"


def _assigned(m: Net, x: Tensor) -> Tensor:
    m.steps = m.steps + 1
    m.table = m.table.roll(1, 0)
    return x * m.steps + m.table[0]


def _kept_old(m: Net, x: Tensor) -> Any:
    old = m.table.clone()
    m.table.add_(1)
    m.table[0] = 7
    return old.t(), m.table[:2], x + m.table[1]


def _written_input(m: Net, x: Tensor) -> Any:
    old = x.clone()
    x.mul_(2)
    x[:, 0] = 3
    return old, x, x.sum(1)


@pytest.mark.parametrize("body", [_assigned, _kept_old, _written_input])
def test_what_a_forward_writes_is_written_and_nothing_else(body: Body) -> None:
    model, program = of(body)
    twin = Net(body).eval()
    for step in range(3):
        x, y = noise(3, 4, 6, seed=step), noise(3, 4, 6, seed=step)
        want, got = twin(x), program(y)
        pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (want, got)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(x, y)
        assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    writers = [n for n in calls(program) if n.target._schema.is_mutable]
    assert [n.target for n in writers] == [aten.copy_.default] * len(writers)
    assert list(program.graph.nodes)[-1 - len(writers) : -1] == writers


def test_batch_statistics_are_not_updated_in_eval_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).train()
    before = [b.clone() for b in model.buffers()]
    program = capture(model, noise(4, 6))
    program(noise(5, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert torch.equal(program(noise(5, 6)), model.eval()(noise(5, 6)))


def _hidden_write(m: Net, x: Tensor) -> Tensor:
    h = m.lin(x)
    with torch.no_grad():
        h[:, 0].mul_(2)
    return h


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no module": (lambda x: x, "takes a torch.nn.Module, not function", ""),
    "a lazy module": (nn.Sequential(nn.LazyLinear(3)), "no size for 0.weight yet", ""),
    "a call it rejects": (Net(lambda m, x: m.lin(x[..., :5])), "Net itself fails on", "x[..., :5]"),
    "a list": (Net(lambda m, x: x.numpy().sum()), "Net cannot be traced", "x.numpy()"),
    "a hidden write": (Net(_hidden_write), "mul_ under no_grad changes a value that", "self.body"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_where_and_what_to_try(
    case: tuple[Any, str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    model, says, code = case
    with pytest.raises(CaptureError) as caught:
        capture(model, noise(2, 7, 6))
    text = str(caught.value)
    assert says in text.splitlines()[0]
    assert text.count("try:") == 1
    assert len(text.splitlines()) <= 3
    assert all(len(line) < 400 for line in text.splitlines())
    if code:
        where = text.splitlines()[1]
        assert where.split("test_normal_form.py:")[1].split()[0].isdigit()
        assert code in where
    assert capfd.readouterr() == ("", "")


def test_torch_does_not_talk_of_attempts_that_fail(capfd: pytest.CaptureFixture[str]) -> None:
    model = Net(lambda m, x: m.lin(x if x.shape[0] == 1 else x[..., 1:]))
    assert [a.size for a in capture(model, noise(1, 7, 6)).guards.specialised] == [1, 6]
    assert capfd.readouterr() == ("", "")


def test_the_text_of_a_graph_is_the_same_for_two_captures() -> None:
    texts = {graph_text(of(lambda m, x: m.lin(x)[:, -1])[1].graph) for _ in range(2)}
    assert len(texts) == 1
