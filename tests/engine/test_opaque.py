"""What cannot be traced runs as one operator: bitwise the model's values, gradients and effects."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lensfx.capture.opaque import OpaqueModules, chosen, failing_module, reason
from lensfx.errors import CaptureError, LensError
from lensfx.graph.opaque import is_opaque, opaque_of

torch.set_num_threads(1)
SHAPES = [(2, 5), (3, 7), (1, 4), (4, 1)]
_ABS = ctypes.CDLL(None).abs


class Detour(nn.Module):
    """Two ways: by numpy, which carries no gradient, and by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.from_numpy(np.quantile(x.detach().numpy(), 0.3, axis=-1, keepdims=True))
        return self.lin(x) - low.to(x)


class Loop(nn.Module):
    """Looks at its values one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        signs = [1.0 if v > 0 else -0.5 for v in x.detach().sum(-1).flatten().tolist()]
        y = x * torch.tensor(signs, dtype=x.dtype).view(*x.shape[:-1], 1) * self.gain
        return -y if flip else y


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2) * grad


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x * self.scale)


class Foreign(nn.Module):
    """Calls into a C library with what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w * _ABS(int(x.detach().sum() * 10))


class Counting(nn.Module):
    """Updates a buffer in place and another by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.numpy().reshape(-1, 6).mean(0).sum())
        self.steps = self.steps + 1
        return self.lin(x) * self.mean


class Noisy(nn.Module):
    """Draws from torch and from numpy, only while training."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.lin(x)) * float(x.detach().abs().max().item() > 0)
        return y * torch.from_numpy(np.random.rand(6)).to(y) if self.training else y


@dataclass(frozen=True)
class Pair:
    left: Tensor
    rest: Any


class Many(nn.Module):
    """Returns a dictionary with a dataclass, nothing, a name, a size and an integer tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor, n: int, mode: str = "plain") -> dict[str, Any]:
        top = torch.from_numpy(x.detach().numpy().argmax(-1))
        y = self.lin(x).reshape(n * x.shape[0], 6)
        return {"pair": Pair(y.t(), (top, None)), "mode": mode, "n": n}


class Net(nn.Module):
    """Traceable code around a part, which is called as `body` says."""

    def __init__(self, body: Callable[..., Any], part: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.part = part
        self.last = nn.Linear(6, 6)
        for name, module in more.items():
            setattr(self, name, module)
        self.body = (body,)

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, torch.tanh(self.first(x)))


def plain(m: Any, h: Tensor) -> Any:
    return m.last(m.part(h) + h)


def twice(m: Any, h: Tensor) -> Any:
    return m.last(m.part(m.part(h), flip=True) + h)


def many(m: Any, h: Tensor) -> Any:
    out = m.part(h, h.shape[1])
    pair = out["pair"]
    return m.last(pair.left.t().view(*h.shape)) * out["n"], pair.rest[0], out["mode"]


PARTS: list[Any] = [
    pytest.param(plain, Detour, id="numpy"),
    pytest.param(twice, Loop, id="loop-called-twice"),
    pytest.param(plain, ByHand, id="autograd-function"),
    pytest.param(plain, Foreign, id="c-library"),
    pytest.param(many, Many, id="many-results"),
]


def net(body: Callable[..., Any], part: nn.Module, **more: nn.Module) -> Net:
    torch.manual_seed(0)
    model = Net(body, part, **more).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    return model


def given(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, 6, generator=generator).to(dtype)


class Flat(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        out = self.model(x)
        return [v for v in (out if isinstance(out, tuple) else (out,)) if isinstance(v, Tensor)]


def observed(model: nn.Module, why: dict[str, str], shapes: Sequence[Any] = SHAPES[:2]) -> Any:
    parts = OpaqueModules(model, why)
    with restored(model), parts.observing():
        for shape in shapes:
            model(given(shape))
    return parts


def exported(model: nn.Module, parts: OpaqueModules, shape: Sequence[int] = (2, 5)) -> Any:
    """The exported graph as a module, with what keeps its operators alive."""
    dims = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with parts.tracing(), torch.enable_grad():
        program = torch.export.export(
            Flat(model), (given(shape),), dynamic_shapes=dims, strict=False
        )
    module = program.module(check_guards=False)
    for node in module.graph.nodes:
        if is_opaque(node):
            node.meta["opaque"] = opaque_of(node.args[0])
    return module


def run(module: Any, x: Tensor, owner: nn.Module, seed: int = 3) -> list[Any]:
    """Results, the gradients of input and parameters, buffers and the next random numbers."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    owner.zero_grad()
    x = x.clone().requires_grad_()
    out = [t for t in module(x) if isinstance(t, Tensor)]
    following = [torch.rand(2), torch.from_numpy(np.random.rand(2))]
    sum((t * t).sum() for t in out if t.requires_grad).backward()
    grads = [p.grad for p in owner.parameters()]
    return [*out, x.grad, *grads, *(b.clone() for b in owner.buffers()), *following]


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Buffers are the objects that they were, with the values that they had."""
    held = [(m._buffers, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items()]
    yield
    for buffers, name, buffer, value in held:
        buffers[name] = buffer.copy_(value)


def same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def check(model: nn.Module, module: Any, shapes: Sequence[Any] = SHAPES) -> None:
    for shape in shapes:
        with restored(model):
            want = run(Flat(model), given(shape), model)
        with restored(model):
            same(run(module, given(shape), model), want)


@pytest.mark.parametrize(("body", "kind"), PARTS)
def test_values_and_gradients_are_the_models(body: Any, kind: Any) -> None:
    model = net(body, kind())
    module = exported(model, observed(model, {"part": "test"}))
    assert sum(map(is_opaque, module.graph.nodes)) == (2 if body is twice else 1)
    check(model, module)
    with torch.no_grad():
        x = given((3, 2))
        same(module(x), Flat(model)(x))


@pytest.mark.parametrize(("body", "kind"), [*PARTS, pytest.param(plain, Counting, id="buffers")])
def test_compiled_whole_it_is_the_same(body: Any, kind: Any) -> None:
    model = net(body, kind())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:3])


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_inductor_takes_it() -> None:
    model = net(plain, Detour())
    module = exported(model, observed(model, {"part": "test"}))
    x = given((2, 5)).requires_grad_()
    got = torch.compile(module, fullgraph=True)(x)[0]
    torch.testing.assert_close(got, model(x))
    got.sum().backward()


def test_buffers_are_updated_as_the_model_does() -> None:
    model = net(plain, Counting())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, module)
    module(given((2, 5)))
    assert int(model.part.steps) == 1
    assert bool((model.part.mean != 0).all())


def test_a_training_run_is_recomputed_with_the_same_draws() -> None:
    model = net(plain, Noisy())
    model.train()
    module = exported(model, observed(model, {"part": "test"}))
    model.part.eval()
    before = [m.training for m in model.modules()]
    x = given((2, 5))
    got = run(module, x, model)
    assert [m.training for m in model.modules()] == before
    model.part.train()
    same(got, run(Flat(model), x, model))
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:1])


class Kept(nn.Module):
    """How many values pass depends on the data; calls a part that draws from its own source."""

    def __init__(self) -> None:
        super().__init__()
        self.source = np.random.default_rng(1)
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        picked = [i for i, v in enumerate(flat[:, 0].tolist()) if v > 0]
        return self.lin(flat[picked])


def test_a_size_may_depend_on_the_data() -> None:
    model = net(lambda m, h: m.last(m.part(h)).sum(0), Kept())
    shapes = [(2, 5), (3, 7), (4, 11), (5, 2)]
    module = exported(model, observed(model, {"part": "test"}, shapes))
    node = next(n for n in module.graph.nodes if is_opaque(n))
    assert node.meta["opaque"].outputs[0].sizes[0] is None
    check(model, module)
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:2])


def test_autocast_acts_inside_and_in_the_second_run() -> None:
    model = net(plain, Loop())
    module = exported(model, observed(model, {"part": "test"}))

    def under(f: Any) -> list[Any]:
        model.zero_grad()
        x = given((2, 5)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = f(x)[0]
        out.float().square().sum().backward()
        return [out, x.grad, *(p.grad for p in model.parameters())]

    same(under(module), under(Flat(model)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Detour()

    def forward(self, x: Tensor, *, k: int = 1) -> Tensor:
        return self.inner(x) * k if x.sum().item() > -1e9 else x


def test_the_outermost_wins_and_a_shared_part_is_taken_wherever_it_is_called() -> None:
    outer = Outer()
    model = net(lambda m, h: m.last(m.part(x=h, k=2)) + m.alias(h), outer, alias=outer.inner)
    parts = observed(model, {"part": "a", "alias": "b"})
    module = exported(model, parts)
    assert [(c.path, c.why) for c in parts.calls] == [("part", "a"), ("alias", "b")]
    for shape in SHAPES:
        same(module(given(shape)), Flat(model)(given(shape)))


class Writes(nn.Module):
    """Doubles rows of its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        for i, v in enumerate(x.detach()[:, 0, 0].tolist()):
            if v > 0:
                x[i] *= 2.0
        return x.mean(-1, keepdim=True)


def test_an_input_changed_in_place_is_changed_for_its_other_readers() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        a = h * 1.5
        return m.last(a + m.part(a) + a)

    model = net(body, Writes())
    module = exported(model, observed(model, {"part": "test"}))
    check(model, module)
    check(model, torch.compile(module, fullgraph=True, backend="aot_eager"), SHAPES[:1])


def test_lost_gradients_would_be_seen() -> None:
    model = net(plain, Detour())
    parts = observed(model, {"part": "test"})
    module = exported(model, parts)
    object.__setattr__(parts.calls[0], "reached", (True, False, False))
    with pytest.raises(AssertionError):
        check(model, module, SHAPES[:1])


def traced_error(model: nn.Module) -> Exception:
    dims = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        torch.export.export(Flat(model), (given((2, 5)),), dynamic_shapes=dims, strict=False)
    return caught.value


def test_the_smallest_failing_module_is_found() -> None:
    model = net(lambda m, h: m.last(m.part(h)), Outer())
    error = traced_error(model)
    assert failing_module(model, error, []) == "part"
    assert failing_module(model, error, ["part"]) is None
    assert "test_opaque.py" in reason(error)
    assert "x.sum().item() > -1e9" in reason(error)
    plainer = net(plain, nn.Sequential(nn.Linear(6, 6), Loop()))
    error = traced_error(plainer)
    assert failing_module(plainer, error, []) == "part.1"
    assert failing_module(plainer, error, ["part.1"]) == "part"
    branch = net(lambda m, h: m.last(h) if h.sum() > 0 else h, Loop())
    assert failing_module(branch, traced_error(branch), []) is None


def decorated(forward: Any) -> Any:
    def outside(*args: Any) -> Any:
        return forward(*args) if args[1].sum() > 0 else args[1]

    return outside


class Decorated(nn.Linear):
    forward = decorated(nn.Linear.forward)


def test_a_wrapped_forward_and_a_chained_error_are_found() -> None:
    model = net(plain, Decorated(6, 6))
    error = traced_error(model)
    assert failing_module(model, error, []) == "part"
    outer = RuntimeError("tracing failed")
    outer.__cause__ = error
    assert failing_module(model, outer, []) == "part"
    assert "args[1].sum() > 0" in reason(outer)


def test_parts_are_chosen_by_path_type_and_object() -> None:
    model = net(plain, nn.Sequential(Loop(), Detour()))
    assert list(chosen(model, ["part.0"])) == ["part.0"]
    assert list(chosen(model, [Loop, nn.Linear])) == ["part.0", "first", "part.1.lin", "last"]
    assert list(chosen(model, [model.part])) == ["part"]
    with pytest.raises(CaptureError, match=r"by part\.2\n  try: the closest name is part\.[01]"):
        chosen(model, ["part.2"])
    with pytest.raises(CaptureError, match="by Looped\n  try: the closest name is Loop"):
        chosen(model, [type("Looped", (nn.Module,), {})])
    for whole in ("", Net, model):
        with pytest.raises(CaptureError, match="is the whole model"):
            chosen(model, [whole])


class Odd(nn.Module):
    """Returns what it is told to return."""

    def __init__(self, rest: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rest = (rest,)

    def forward(self, x: Tensor) -> Any:
        return self.rest[0](x)


class Hidden:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def first(m: Any, h: Tensor) -> Any:
    return m.last(m.part(h)[0])


def test_what_cannot_be_declared_is_refused() -> None:
    model = net(first, Odd(lambda x: (x, float(x.detach().sum()))))
    parts = observed(model, {"part": "test"})
    with pytest.raises(CaptureError, match=r"module part returns -?\d+\.\d+ and "):
        exported(model, parts)
    assert "forward" not in model.part.__dict__
    assert "forward" not in model.__dict__
    with pytest.raises(CaptureError, match="returns an object of type Hidden"):
        observed(net(first, Odd(lambda x: (x, Hidden(x)))), {"part": "test"})
    with pytest.raises(CaptureError, match="called otherwise when traced than when run"):
        exported(model, OpaqueModules(model, {"part": "test"}))


def test_a_run_that_contradicts_what_was_declared_says_so() -> None:
    model = net(first, Odd(lambda x: (torch.cat([x, x[:, 4:]], 1), "a" if len(x) < 4 else "b")))
    module = exported(model, observed(model, {"part": "test"}, [(2, 2), (3, 3)]), (2, 3))
    with pytest.raises(LensError, match=r"module part returned a tensor of sizes \(2, 6, 6\)"):
        module(given((2, 5)))
    with pytest.raises(LensError, match="returned 'b' for result 1, which was 'a'"):
        module(given((4, 3)))
    for node in module.graph.nodes:
        node.meta.clear()
    gc.collect()
    with pytest.raises(LensError, match="nothing is known of the opaque module part"):
        module(given((2, 3)))
