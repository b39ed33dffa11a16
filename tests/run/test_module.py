"""The recompiled module is an ordinary GraphModule that is called as the model was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lensfx
from lensfx.graph import hook_point, is_hook

# torch's own TreeSpec cannot be copied without this warning.
copies = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

NAMES = ["hf_gpt2", "nanogpt_targets", "keyword", "llamalike"]


@cache
def lens_of(name: str) -> tuple[nn.Module, lensfx.Lens]:
    args, kwargs = CASES[name].inputs(2, 7, 0)
    model = CASES[name].build()
    return model, lensfx.wrap(model, *args, passes=None, verify=False, **kwargs)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def same_bits(got: Any, want: Any) -> bool:
    left, right = pytree.tree_flatten(got), pytree.tree_flatten(want)
    pairs = zip(left[0], right[0], strict=True)
    return left[1] == right[1] and all(
        torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in pairs
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_in_the_models_own_bits(name: str) -> None:
    model, lens = lens_of(name)
    for size in [(2, 7), (3, 11), (1, 5), (2, 1), (1, 1)]:
        args, kwargs = CASES[name].inputs(*size, 0)
        got, want = lens.module(*args, **kwargs), model(*args, **kwargs)
        assert type(got) is type(want)
        assert same_bits(got, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiler_takes_it_whole(name: str, backend: str) -> None:
    model, lens = lens_of(name)
    compiled = torch.compile(lens.module, fullgraph=True, backend=backend)
    args, kwargs = CASES[name].inputs(2, 7, 3)
    with torch.no_grad():
        got, want = compiled(*args, **kwargs), model(*args, **kwargs)
    assert type(got) is type(want)
    assert same_bits(got, want)


def test_one_compilation_serves_every_size() -> None:
    model, lens = lens_of("nanogpt_targets")
    graphs: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lens.module, fullgraph=True, dynamic=True, backend=count)
    for size in [(2, 7), (3, 11), (5, 4), (4, 32)]:
        args, _ = CASES["nanogpt_targets"].inputs(*size, 1)
        with torch.no_grad():
            assert same_bits(compiled(*args), model(*args))
    assert len(graphs) == 1


def test_gradients_come_through_the_compiler() -> None:
    model, lens = lens_of("nanogpt_targets")
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 3)
    weights = list(model.parameters())
    want = torch.autograd.grad(model(*args)[1], weights)
    compiled = torch.compile(lens.module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*args)[1], weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_keywords_go_in_any_order_and_keep_their_names() -> None:
    model, lens = lens_of("keyword")
    _, kwargs = CASES["keyword"].inputs(2, 7, 3)
    swapped = dict(reversed(kwargs.items()))
    assert list(swapped) != list(kwargs)
    assert same_bits(lens.module(**swapped), model(**kwargs))


def test_it_shares_the_models_parameters() -> None:
    model, lens = lens_of("nanogpt_targets")
    assert {id(q) for q in lens.module.parameters()} == {id(q) for q in model.parameters()}
    assert lens.module is lens.module
    assert set(lens.module.state_dict()) <= set(model.state_dict())


def test_a_folded_one_has_its_own_weights_and_the_same_answer() -> None:
    case = CASES["nanogpt_targets"]
    model, args = case.build(), case.inputs(2, 7, 0)[0]
    lens = lensfx.wrap(model, *args, verify=False)
    assert same_bits(lens.module(*args), lens(*args))
    compiled = torch.compile(lens.module, fullgraph=True, backend="eager")
    assert same_bits(compiled(*args), lens(*args))
    assert set(lens.module.state_dict()) == set(lens.state_dict())


@copies
def test_a_copy_answers_alike_and_is_apart() -> None:
    model, lens = lens_of("nanogpt_targets")
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 3)
    twin = copy.deepcopy(lens.module)
    assert same_bits(twin(*args), model(*args))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(*args)[0].any()
    assert same_bits(lens.module(*args), model(*args))


@copies
def test_hook_points_are_identities_in_it() -> None:
    model, lens = lens_of("nanogpt_targets")
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 3)
    module = copy.copy(lens.module)
    points = [n for n in module.graph.nodes if is_hook(n)]
    parts = ("scale", "normalized", "_input", "attn_in", "scores", "pattern", "result")
    names = [n for n in lens.hook_names if "hook_" in n and not n.endswith(parts)]
    assert sorted(str(n.args[1]) for n in points) == sorted(names)
    assert all(n.target is hook_point for n in points)
    bare = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in [n for n in bare.graph.nodes if is_hook(n)]:
        node.replace_all_uses_with(node.args[0])
        bare.graph.erase_node(node)
    bare.graph.lint()
    bare.recompile()
    assert same_bits(bare(*args), model(*args))


class Options(nn.Module):
    """Tensors among values that are baked in, first, last and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, flip: bool, mul: Tensor, x: Tensor, *, scale: float = 1.0, y: Tensor) -> Any:
        z = self.linear(x) * scale + mul - 2 * y
        return {"z": -z if flip else z, "flip": flip}


class Nested(nn.Module):
    """Takes containers, and arguments without names."""

    def forward(self, pair: Any, *rest: Tensor, table: dict[str, Tensor]) -> Any:
        return pair[0] - pair[1], [r * table["a"] for r in rest], table["b"]


def test_baked_values_keep_their_places_in_the_call() -> None:
    model, (a, b, c) = Options(), torch.randn(3, 2, 4)
    lens = lensfx.wrap(model, True, a, b, passes=None, verify=False, scale=3.0, y=c)
    want = model(True, a, b, scale=3.0, y=c)
    assert same_bits(lens(True, a, b, scale=3.0, y=c), want)
    assert same_bits(lens.module(True, a, b, scale=3.0, y=c), want)
    assert same_bits(lens.module(True, a, b, y=c, scale=3.0), want)
    compiled = torch.compile(lens.module, fullgraph=True, backend="eager")
    assert same_bits(compiled(True, a, b, scale=3.0, y=c), want)


def test_containers_and_unnamed_arguments_are_taken_apart() -> None:
    model, (a, b, c, d) = Nested(), torch.randn(4, 2, 4)
    args: Any = ((a, b), c, d)
    table = {"a": d, "b": c}
    lens = lensfx.wrap(model, *args, passes=None, verify=False, table=table)
    assert same_bits(lens(*args, table=table), model(*args, table=table))
    assert same_bits(lens.module(*args, table=table), model(*args, table=table))


def test_export_takes_it() -> None:
    model, lens = lens_of("nanogpt_targets")
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 3)
    exported = torch.export.export(lens.module, args)
    assert same_bits(exported.module()(*args), model(*args))
