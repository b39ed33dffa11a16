"""A captured program is bitwise the model, and the model does not notice having been captured."""

from __future__ import annotations

import functools
import gc
import random
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import CASES, TRAINED, Case
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from lensfx.capture import capture
from lensfx.errors import CaptureError
from lensfx.graph import is_op, native_name, source_line, value_of
from lensfx.graph.ops import writes
from lensfx.graph.program import Program

aten = torch.ops.aten
torch.set_num_threads(1)

Body = Callable[..., Any]
# The three dtypes and the two examples, in three captures and not six: a capture costs a second.
WAYS = [
    pytest.param(torch.float32, (2, 7), id="f32"),
    pytest.param(torch.float64, (1, 1), id="f64-from-one-token"),
    pytest.param(torch.bfloat16, (2, 7), id="bf16"),
]
GONE = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
}


class Net(nn.Module):
    """A body that reads the module as `m`, and things for it to read."""

    def __init__(self, body: Body, **parts: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin = nn.Linear(6, 6)
            self.register_buffer("table", torch.randn(20, 6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(value: Any) -> Any:
    """A value with every tensor replaced by something that compares by type, shape and bits."""

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return type(t), t
        raw = t.detach().contiguous().flatten().view(torch.uint8)
        return type(t), t.dtype, tuple(t.shape), raw.numpy().tobytes()

    leaves, spec = pytree.tree_flatten(value)
    return spec, [leaf(v) for v in leaves]


def snapshot(model: nn.Module) -> Any:
    """What a caller can see of a model, identities included."""
    held = {}
    for path, module in model.named_modules():
        own = vars(module).items()
        held[path] = (module, [(k, dict(v) if isinstance(v, dict) else v) for k, v in own])
    tensors = [*model.parameters(), *model.buffers()]
    return held, [(id(t), t.requires_grad, bits(t)) for t in tensors]


def grown(root: Any) -> Iterator[Any]:
    """Every fake tensor and symbol that hangs on to an object."""
    seen, stack = {id(root)}, [root]
    while stack:
        value = stack.pop()
        if isinstance(value, FakeTensor | torch.SymInt | fx.Proxy):
            yield value
        skip = isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)
        if skip or (isinstance(value, dict) and "__builtins__" in value):
            continue
        for inner in gc.get_referents(value):
            if id(inner) not in seen:
                seen.add(id(inner))
                stack.append(inner)


def gradients(function: Callable[..., Any], call: Any, weights: list[Tensor]) -> list[Any]:
    args, kwargs = call
    outputs = [o for o in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(o, Tensor)]
    roots = [o for o in outputs if o.requires_grad]
    seeds = [noise(*o.shape, seed=1) for o in roots]
    return list(torch.autograd.grad(roots, weights, seeds, allow_unused=True))


def faults(program: Program) -> Iterator[str]:
    """What keeps a program's graph from being in normal form."""
    nodes = list(program.graph.nodes)
    names = [native_name(n) for n in nodes if native_name(n)]
    if len(names) != len(set(names)):
        yield "two values of one name"
    if {str(n.target) for n in nodes if n.op == "get_attr"} != set(program.tensors):
        yield "tensors that nobody reads, or none where one is read"
    for node in nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield f"{node} is a {node.op}"
        if node.op != "call_function":
            continue
        if value_of(node) is None or not native_name(node):
            yield f"{node} has no value or no name"
        if isinstance(value_of(node), Tensor) and not source_line(node):
            yield f"{node} has no source line"
        if node.target in GONE or isinstance(node.target, torch._ops.HigherOrderOperator):
            yield f"{node} is {node.target}"
        if writes(node) and (not is_op(node, aten.copy_.default) or node.users):
            yield f"{node} writes"


# Importing x-transformers makes torch warn.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "example"), WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_program_is_bitwise_the_model(
    case: Case, dtype: torch.dtype, example: tuple[int, int]
) -> None:
    model = case.build().to(dtype)
    before = snapshot(model)
    args, kwargs = case.inputs(*example, 0)
    program = capture(model, *args, **kwargs)
    assert snapshot(model) == before
    assert list(faults(program)) == []
    assert program.guards.specialised == ()
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in program.parameters())
    for size in [(2, 7), (3, 11), (1, 5), (2, 1), (1, 1), (2, case.max_length)]:
        args, kwargs = case.inputs(*size, 1)
        with torch.no_grad():
            want, got = model(*args, **kwargs), program(*args, **kwargs)
        assert type(got) is type(want)
        assert bits(got) == bits(want), size
    # A model that changes what autograd has saved has no gradients to compare with.
    if dtype is torch.float32 and case.name != "in_place":
        call, weights = case.inputs(3, 11, 2), list(model.parameters())
        for a, b in zip(*(gradients(f, call, weights) for f in (model, program)), strict=True):
            assert (a is None) == (b is None)
            assert a is None or bool(((a - b).abs() <= 1e-8 * (1 + a.abs())).all())


def test_a_trained_model_is_captured_bitwise() -> None:
    case = TRAINED["minilm"]
    model = case.build()
    args, kwargs = case.inputs(2, 7, 0)
    program = capture(model, *args, **kwargs)
    assert list(faults(program)) == []
    with torch.no_grad():
        for size in [(2, 7), (3, 12), (1, 5)]:
            args, kwargs = case.inputs(*size, 1)
            assert bits(program(*args, **kwargs)) == bits(model(*args, **kwargs))


class Keeper(nn.Module):
    """Keeps what it computes, wherever the test says."""

    def __init__(self, keep: Body) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.cache: Any = None
        self.history: list[Any] = []
        self.by_name: dict[str, Any] = {}
        self.helper = types.SimpleNamespace(seen=[], last=None)
        self.calls = 0
        self.keep = (keep,)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.keep[0](self, x * 2)
        return self.lin(x)


KEEPS: dict[str, Body] = {
    "attribute": lambda m, v: setattr(m, "cache", v),
    "list": lambda m, v: m.history.append(v),
    "dict": lambda m, v: m.by_name.update(v=v),
    "object": lambda m, v: setattr(m.helper, "last", v),
    "list of an object": lambda m, v: m.helper.seen.append(v),
    "new attribute": lambda m, v: setattr(m, "fresh", v),
    "new buffer": lambda m, v: m.register_buffer("fresh", v),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_what_a_forward_keeps_is_put_back(keep: Body, fails: bool) -> None:
    model = Keeper(keep)
    if fails:
        model.lin.register_forward_hook(lambda m, a, out: out if out.sum() > 1e9 else out + 1)
    before, x = snapshot(model), noise(2, 6)
    try:
        capture(model, x)
    except CaptureError:
        assert fails
    assert snapshot(model) == before
    assert model.history == model.helper.seen == []
    assert model.by_name == {}
    assert model.calls == 0
    assert list(grown(model)) == []


def test_what_a_forward_keeps_is_noted() -> None:
    notes = capture(Keeper(KEEPS["attribute"]).eval(), noise(2, 6)).source.notes
    assert notes == ("forward sets cache, calls; a call of the program does not",)


def test_hooks_are_traced_in_and_their_closures_put_back() -> None:
    model, seen, last = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), [], None

    def remember(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        nonlocal last
        seen.append(out)
        last = out
        return out * 3

    model[0].register_forward_hook(remember)
    model[0].register_forward_pre_hook(lambda m, a, k: ((a[0] - 1,), k), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *args: None)
    model.register_forward_hook(lambda module, args, out: {"out": out})
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    program = capture(model, noise(2, 6))
    assert seen == []
    assert last is None
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert bits(program(noise(3, 6, seed=1))) == bits(model(noise(3, 6, seed=1)))


@functools.cache
def ramp(size: int) -> Tensor:
    return torch.arange(float(size))


def test_a_cache_outside_the_model_holds_real_tensors_afterwards() -> None:
    ramp.cache_clear()
    model = Net(lambda m, x: x + ramp(50)[: x.shape[1]])
    program = capture(model, noise(2, 6))
    assert type(ramp(50)) is Tensor
    assert bits(program(noise(3, 9))) == bits(model(noise(3, 9)))


def test_random_states_and_training_flags_are_kept() -> None:
    numpy = pytest.importorskip("numpy")

    def draw(m: Net, x: Tensor) -> Tensor:
        return x + torch.rand(()) + random.random() * 0 + numpy.random.rand() * 0

    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError("capture calls train()")

    model = nn.Sequential(Stubborn(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), Net(draw))
    model[2].eval()
    flags = [m.training for m in model.modules()]
    # Earlier captures may have left the very state that this one would.
    random.seed(11)
    numpy.random.seed(11)
    states = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
    program = capture(model, noise(2, 6))
    after = torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())
    assert after == states
    assert [m.training for m in model.modules()] == flags
    assert "eval mode" in program.source.notes[0]
    for m in model.modules():
        m.training = False
    results = []
    for function in (model, program):
        torch.manual_seed(3)
        results.append(bits(function(noise(3, 6))))
    assert results[0] == results[1]


def _scale_weight(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.lin.weight.mul_(0.5)
    return m.lin(x)


def _scale_data(m: Net, x: Tensor) -> Tensor:
    m.lin.weight.data.mul_(0.5)
    return m.lin(x)


def _renormalise(m: Net, x: Tensor) -> Tensor:
    return torch.nn.functional.embedding(x.long(), m.lin.weight, max_norm=0.1)


@pytest.mark.parametrize("body", [_scale_weight, _scale_data, _renormalise])
def test_a_write_into_a_parameter_is_refused_before_it_happens(body: Body) -> None:
    model = Net(body)
    before, x = snapshot(model), torch.ones(2, 6)
    with pytest.raises(CaptureError, match=r"changes the parameter lin\.weight") as caught:
        capture(model, x)
    assert re.search(r"at test_capture\.py:\d+  .*weight", str(caught.value))
    assert snapshot(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_of_the_call_are_not_written_to(fails: bool) -> None:
    def write(m: Net, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2 if fails and x.sum() > 0 else x

    x = noise(2, 6)
    try:
        capture(Net(write), x)
    except CaptureError:
        assert fails
    assert torch.equal(x, noise(2, 6))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    with mode():
        x = noise(2, 5, 6)
        program = capture(model, x)
    assert program.example[0].is_inference() is False
    call, weights = ((noise(3, 4, 6),), {}), list(model.parameters())
    assert bits(program(*call[0])) == bits(model(*call[0]))
    pairs = zip(*(gradients(f, call, weights) for f in (model, program)), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-8) for a, b in pairs)


def test_gradients_reach_inputs_and_not_frozen_parameters() -> None:
    model = Net(lambda m, x: m.lin(x).tanh())
    model.lin.bias.requires_grad_(False)
    program = capture(model, noise(2, 6).requires_grad_())
    x = noise(3, 6).requires_grad_()
    for a, b in zip(*(gradients(f, ((x,), {}), [x]) for f in (model, program)), strict=True):
        assert torch.equal(a, b)
    assert [p.requires_grad for p in program.parameters()] == [True, False]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_captured_as_what_was_compiled(in_place: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
        compiled = model
    program = capture(compiled, noise(2, 6))
    assert list(program.tensors) == ["0.weight", "0.bias"]
    assert bits(program(input=noise(3, 6))) == bits(model.forward(noise(3, 6)))
    assert (model._compiled_call_impl is not None) is in_place
