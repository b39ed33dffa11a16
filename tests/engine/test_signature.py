"""Calls bind to a program as they bind to the model, and what was baked in is checked."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lensfx.capture import capture
from lensfx.errors import CaptureError, GuardError
from lensfx.graph.program import Program
from lensfx.graph.signature import Signature, bound_arguments

torch.set_num_threads(1)
Pair = collections.namedtuple("Pair", "left right")


class Calls(nn.Module):
    """A module with the signature of the function it is given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = (function,)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.forward = types.MethodType(function, self)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Any, b: Any) -> bool:
    """Whether two results are of one type and structure and bitwise equal."""
    leaves, spec = pytree.tree_flatten(a)
    others, other = pytree.tree_flatten(b)
    if spec != other:
        return False
    for x, y in zip(leaves, others, strict=True):
        if type(x) is not type(y):
            return False
        if not (torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y):
            return False
    return True


A, B, C = (noise(2, 5, seed=i) for i in range(3))
X, Y, Z = (noise(3, 4, seed=i) for i in range(3, 6))


def mixed(self: Any, a: Tensor, b: Tensor, c: Tensor | None = None, *, power: int = 2) -> Any:
    out = self.scale * a - b
    return out**power if c is None else out * c


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((A, B), {}), ((A,), {"b": B}), ((), {"b": B, "a": A}), ((A, B), {"power": 2})],
)
def test_every_spelling_of_the_example_call_binds(args: Any, kwargs: Any) -> None:
    model = Calls(mixed)
    program = capture(model, *args, **kwargs)
    want = model(X, Y)
    assert same(program(X, Y), want)
    assert same(program(X, b=Y), want)
    assert same(program(b=Y, a=X), want)
    assert same(program(X, Y, None), want)
    assert same(program(X, Y, c=None, power=2), want)
    assert not same(program(Y, X), want)


def test_an_optional_argument_may_be_given_in_any_place() -> None:
    model = Calls(mixed)
    program = capture(model, c=C, b=B, a=A, power=3)
    assert same(program(X, Y, Z, power=3), model(X, Y, Z, power=3))
    assert same(program(power=3, c=Z, a=X, b=Y), model(X, Y, Z, power=3))


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((X,), {}, "does not fit the model's signature: missing a required argument: 'b'"),
        ((X, Y), {"z": Z}, "does not fit the model's signature: got an unexpected keyword"),
        ((X, Y, None, 2), {}, "does not fit the model's signature: too many positional"),
        ((X, Y, Z), {}, "argument 'c' was not given at capture"),
        ((X, Y), {"power": 3}, "argument 'power' was not given at capture"),
        ((X, Y), {"power": 2.0}, "argument 'power' was not given at capture"),
        ((X, Y), {"power": torch.tensor(2)}, "argument 'power' was not given at capture"),
        ((X, 3), {}, "b was a tensor at capture and is int here"),
        ((X, [Y]), {}, r"b is \[\*\], and was \* at capture"),
        ((X, None), {}, "b was a tensor at capture and is NoneType here"),
    ],
)
def test_other_calls_are_refused(args: Any, kwargs: Any, says: str) -> None:
    program = capture(Calls(mixed), A, B)
    with pytest.raises(GuardError, match=says):
        program(*args, **kwargs)


@pytest.mark.parametrize("value", [3, 2.0, True, "2", None, torch.tensor(2), (2,)])
def test_a_constant_is_baked_by_type_and_value(value: Any) -> None:
    program = capture(Calls(mixed), A, B, power=2)
    assert same(program(X, Y), program(X, Y, power=2))
    with pytest.raises(
        GuardError, match=r"power (was 2|is \(\*,\), and was \*) at capture|power is"
    ):
        program(X, Y, power=value)


def test_a_given_constant_is_not_the_default() -> None:
    program = capture(Calls(mixed), A, B, power=3)
    with pytest.raises(GuardError, match="power was 3 at capture and is 2 here"):
        program(X, Y)


def test_the_two_zeros_are_two_constants() -> None:
    model = Calls(lambda self, x, zero: x * torch.tensor(1 / (zero or float(f"{zero}1"))))
    program = capture(model, A, 0.0)
    assert same(program(X, 0.0), model(X, 0.0))
    with pytest.raises(GuardError, match=r"zero was 0\.0 at capture and is -0\.0"):
        program(X, -0.0)


def test_variadic_signatures() -> None:
    def body(self: Any, first: Tensor, *rest: Tensor, shift: Tensor, **named: Tensor) -> Tensor:
        total = first - sum(rest) * shift
        return total + sum(i * named[k] for i, k in enumerate(sorted(named), 1))

    model = Calls(body)
    program = capture(model, A, B, C, shift=A, right=B, left=C)
    names = ("first", "*rest[0]", "*rest[1]", "shift", "right", "left")
    assert program.signature.tensor_names == names
    named = {"left": Z, "shift": X, "right": Y}
    assert same(program(X, Y, Z, **named), model(X, Y, Z, **named))
    with pytest.raises(GuardError, match=r"argument '\*rest\[1\]' was given at capture"):
        program(X, Y, shift=X, right=Y, left=Z)
    with pytest.raises(GuardError, match=r"argument '\*rest\[2\]' was not given at capture"):
        program(X, Y, Z, X, shift=X, right=Y, left=Z)
    with pytest.raises(GuardError, match="argument 'more' was not given at capture"):
        program(X, Y, Z, shift=X, right=Y, left=Z, more=X)
    with pytest.raises(GuardError, match="argument 'left' was given at capture and is missing"):
        program(X, Y, Z, shift=X, right=Y)


def test_a_name_given_twice_is_refused() -> None:
    model = Calls(lambda self, x, /, **named: x - named["x"])
    with pytest.raises(CaptureError, match=r"\['x'\] given by position and again by keyword"):
        capture(model, A, x=B)


@pytest.mark.parametrize(
    "name", ["class", "torch", "self_", "device", "1st", "a b", "é", "x_0", ""]
)
def test_any_string_can_name_an_input(name: str) -> None:
    model = Calls(lambda self, x, **named: x[0] - 2 * x[1] + 3 * named[name] + named["x_1"])
    program = capture(model, [A, B], **{name: C, "x_1": A})
    assert same(program([X, Y], **{name: Z, "x_1": X}), model([X, Y], **{name: Z, "x_1": X}))
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    assert len(set(names)) == 4


def test_nested_inputs() -> None:
    def body(self: Any, x: Tensor, more: dict[str, Any]) -> Tensor:
        return x * more["a"] + more["b"][0] * more["b"][1]

    model = Calls(body)
    program = capture(model, A, {"a": B, "b": [C, 5]})
    assert program.signature.tensor_names == ("x", "more['a']", "more['b'][0]")
    assert same(program(X, {"a": Y, "b": [Z, 5]}), model(X, {"a": Y, "b": [Z, 5]}))
    for other, says in [
        ({"a": Y, "b": [Z, 6]}, r"more\['b'\]\[1\] was 5 at capture and is 6 here"),
        ({"a": Y, "b": (Z, 5)}, r"more is {'a': \*, 'b': \(\*, \*\)}, and was {'a': \*, 'b': \["),
        ({"a": Y, "c": [Z, 5]}, r"more is {'a': \*, 'c': "),
        ({"a": Y, "b": [Z, 5], "c": 1}, r"more is {'a': \*, 'b': \[\*, \*\], 'c': \*}"),
        (Y, r"more is \*, and was {"),
    ]:
        with pytest.raises(GuardError, match=says) as caught:
            program(X, other)
        assert len(str(caught.value).splitlines()) == 2


def test_one_tensor_for_two_arguments_is_two_inputs() -> None:
    model = Calls(lambda self, x, y: x * 2 - y)
    program = capture(model, A, A)
    assert same(program(X, Y), model(X, Y))


RESULTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "none": lambda self, x: None,
    "tensor": lambda self, x: x * 2,
    "the input": lambda self, x: x,
    "a parameter": lambda self, x: (x * self.scale, self.scale),
    "twice the same": lambda self, x: (x, x * 2, x),
    "one in a tuple": lambda self, x: (x * 2,),
    "empty": lambda self, x: (x * 2, [], {}, ()),
    "constants": lambda self, x: [x * 2, 3, None, "a", 2.5, True, torch.float64],
    "sizes": lambda self, x: (x * 2, x.shape[0], x.shape[1] * 2 + 1, x.shape[0] / 4),
    "a flag from a size": lambda self, x: (x * 2, x.shape[0] > 5),
    "a shape": lambda self, x: (x * 2, tuple(x.shape)),
    "nested": lambda self, x: {"a": [x, (x * 2, {"b": None})], 3: {}},
    "ordered": lambda self, x: collections.OrderedDict(z=x, a=x * 2),
    "named tuple": lambda self, x: Pair(x, x + 1),
    "integers": lambda self, x: x.argmax(1),
    "complex": lambda self, x: torch.complex(x, x),
    "0-d": lambda self, x: x.sum(),
    "no elements": lambda self, x: x[:0],
    "a constant tensor": lambda self, x: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("body", RESULTS.values(), ids=RESULTS)
def test_results_have_the_models_own_type(body: Callable[..., Any]) -> None:
    model = Calls(body)
    program = capture(model, A)
    for x in (A, X, noise(7, 2), noise(1, 1)):
        want, got = model(x), program(x)
        assert type(got) is type(want)
        assert same(got, want)


def test_model_outputs_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Calls(lambda self, x: outputs.BaseModelOutput(last_hidden_state=x * 2))
    got = capture(model, A)(X)
    assert type(got) is outputs.BaseModelOutput
    assert torch.equal(got.last_hidden_state, X * 2)
    assert got.hidden_states is None


def test_what_is_returned_is_the_models_or_the_callers_to_change() -> None:
    """Only what the model itself returns unchanged may share memory with it or with the call."""

    def body(self: Any, x: Tensor) -> Any:
        return x, x.clone(), self.scale, self.scale.clone(), torch.tensor([1.0, 2.0])

    model = Calls(body)
    program = capture(model, A)
    x = X.clone()
    given, copied, scale, copied_scale, made = program(x)
    assert given is x
    assert scale is model.scale
    with torch.no_grad():
        for tensor in (copied, copied_scale, made):
            tensor.zero_()
    assert same((x, model.scale.item()), (X, 2.0))
    assert same(program(x), model(X))


class Batch:
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


@pytest.mark.parametrize(
    ("body", "given", "says"),
    [
        (lambda self, x: Batch(x * 2), A, "the model returns an object of type Batch"),
        (lambda self, x: (v for v in (x, x)), A, "the model returns an object of type generator"),
        (lambda self, x: x.ids * 2, Batch(A), "x is an object of type Batch"),
        (lambda self, x: x[0].ids * 2, [Batch(A)], r"x\[0\] is an object of type Batch"),
    ],
)
def test_tensors_inside_unknown_objects_are_refused(body: Any, given: Any, says: str) -> None:
    with pytest.raises(CaptureError, match=says) as caught:
        capture(Calls(body), given)
    assert "try:" in str(caught.value)


def test_a_model_without_inputs() -> None:
    model = Calls(lambda self: self.scale * 2)
    assert same(capture(model)(), model())


def test_bind_and_arguments_are_inverse() -> None:
    program: Program = capture(Calls(mixed), A, b=B, power=2)
    signature = program.signature
    args, kwargs = signature.arguments(signature.bind((), {"b": Y, "a": X}))
    assert args[0] is X
    assert kwargs["b"] is Y
    assert kwargs["power"] == 2


def test_split_follows_the_signature_not_the_call() -> None:
    forward = inspect.signature(lambda a, b, c=None: None)
    named, positional, keywords = Signature.split(forward, (1,), {"c": 3, "b": 2})
    assert list(named) == ["a", "b", "c"]
    assert (positional, keywords) == (("a",), ("b", "c"))
    assert bound_arguments(forward, (1, 2), {}) == {"a": 1, "b": 2}


@dataclasses.dataclass
class Request:
    ids: Tensor
    scale: float = 2.0
    extra: Any = None


def test_dataclasses_are_taken_apart_and_put_together_again() -> None:
    model = Calls(lambda self, x: Request(x.ids * x.scale, x.scale, [x.ids, Request(x.ids + 1)]))
    program = capture(model, Request(A))
    got, want = program(Request(X)), model(Request(X))
    assert type(got) is Request
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.extra[1].ids, want.extra[1].ids)
    with pytest.raises(GuardError, match=r"scale was 2\.0 at capture"):
        program(Request(X, 3.0))


def test_a_model_may_ask_whether_two_inputs_are_one() -> None:
    model = Calls(lambda self, x, y: x * 2 if x is y else x * 3 - y)
    one, two = capture(model, A, A), capture(model, A, A.clone())
    assert same(one(X, X), model(X, X))
    assert same(two(X, Y), model(X, Y))
    with pytest.raises(GuardError, match="y was the same tensor as x"):
        one(X, Y)
    with pytest.raises(GuardError, match="y is the same tensor as x"):
        two(X, X)


def test_a_list_of_the_call_that_forward_fills_is_refused() -> None:
    def body(self: Any, x: list[Tensor]) -> Tensor:
        x[0] = x[0] + 1
        return x[0] * 2

    with pytest.raises(CaptureError, match="puts other values into a list") as caught:
        capture(Calls(body), [A])
    assert "return them instead" in str(caught.value)
