"""Models without weights: built without memory, captured on fakes, given weights by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.utils import _pytree as pytree

from lensfx.capture import capture
from lensfx.capture.empty import empty_weights, has_no_weights, materialless, on_shapes
from lensfx.capture.modes import CallLog, tracing
from lensfx.capture.normal_form import normal_form
from lensfx.errors import RewriteError
from lensfx.graph import Program, Source, graph_text
from lensfx.graph.bind import bind
from lensfx.graph.guards import Guards
from lensfx.graph.signature import Leaf, Signature
from lensfx.rewrite import Pipeline

torch.set_num_threads(1)


class Block(nn.Module):
    """A norm, an attention with a mask kept as a buffer, and a matrix of its own."""

    mask: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Parameter(torch.randn(width, width) / width)
        self.register_buffer("mask", torch.ones(16, 16).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mask = self.mask[: x.shape[1], : x.shape[1]]
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask) @ self.mix


class Tiny(nn.Module):
    """A small language model: tied tables, computed frequencies, running statistics."""

    frequencies: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.register_buffer("frequencies", 1 / 10 ** torch.arange(width), persistent=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.stats = nn.BatchNorm1d(width)
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.table(ids) + torch.sin(places[:, None] * self.frequencies)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(self.stats(x.mT).mT))


def real() -> Tiny:
    """A model with weights and statistics that are no trivial ones."""
    model = Tiny().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), model.stats.running_mean, model.stats.running_var]:
            assert tensor is not None
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def empty() -> Tiny:
    with empty_weights():
        return Tiny().eval()


class Flat(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, leaves: list[Tensor]) -> list[Tensor]:
        return [self.model(*leaves)]


def traced(model: nn.Module, *example: Tensor) -> Program:
    """A program of a model of tensors to one tensor, with nothing run beside it."""
    forward = inspect.signature(model.forward)
    names = tuple(forward.parameters)
    leaves = tuple(Leaf(n, True) for n in names)
    with materialless(model, example) as given, tracing(True, False):
        shapes = ([dict.fromkeys(range(t.ndim), Dim.AUTO) for t in given],)
        exported = torch.export.export(
            Flat(model), (list(given),), dynamic_shapes=shapes, strict=False
        )
    graph, tensors, unread, aliases = normal_form(exported, model, leaves, [None])
    in_spec, out_spec = pytree.tree_flatten((given, {}))[1], pytree.tree_flatten(0)[1]
    signature = Signature(forward, names, (), in_spec, leaves, out_spec, ("output",))
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    guards = Guards.build(holders, names, {}, exported._guards_code)
    source = Source(type(model).__name__, (), unread, aliases)
    return Program(graph, tensors, signature, guards, given, source)


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def same(program: Program, model: nn.Module) -> None:
    for shape in [(2, 7), (1, 5), (3, 1)]:
        assert torch.equal(program(ids(*shape)), model(ids(*shape)))


def test_parameters_have_no_memory_and_buffers_are_computed() -> None:
    model, filled = empty(), Tiny()
    assert all(p.is_meta and isinstance(p, nn.Parameter) for p in model.parameters())
    for name, buffer in filled.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert model.head.weight is model.table.weight
    shapes = [(n, p.shape, p.dtype, p.requires_grad) for n, p in filled.named_parameters()]
    assert shapes == [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    assert has_no_weights(model)
    assert not has_no_weights(filled)


def test_copies_and_frozen_parameters_stay_what_they_are() -> None:
    with empty_weights():
        layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        half = nn.Linear(2, 2, dtype=torch.float16)
        computed = nn.Parameter(nn.Parameter(torch.ones(2, 3)).t() * 2)
    assert all(p.is_meta for p in layer.parameters())
    assert not frozen.requires_grad
    assert half.weight.dtype == torch.float16
    assert computed.is_meta
    assert computed.is_leaf


def test_torch_is_as_it_was_afterwards() -> None:
    before = nn.Parameter.__dict__["__new__"]
    with empty_weights():
        with empty_weights():
            assert nn.Parameter(torch.ones(2)).is_meta
        assert nn.Parameter(torch.ones(2)).is_meta
    assert nn.Parameter.__dict__["__new__"] is before
    with pytest.raises(ZeroDivisionError), empty_weights():
        raise ZeroDivisionError
    assert nn.Parameter.__dict__["__new__"] is before
    assert torch.equal(nn.Parameter(torch.ones(2)).detach(), torch.ones(2))


def test_a_program_holds_the_models_own_tensors_and_no_trace_of_the_fakes() -> None:
    model = empty()
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    program = traced(model, ids(2, 7))
    assert all(program.tensors[n] is own[n] for n in program.tensors)
    again = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert all(again[n] is own[n] for n in own)
    assert "meta" not in graph_text(program.graph)
    assert graph_text(program.graph) == graph_text(traced(real(), ids(2, 7)).graph)


def wholly_meta() -> nn.Module:
    with torch.device("meta"):
        return Tiny().eval()


def fake() -> nn.Module:
    with FakeTensorMode():
        return Tiny().eval()


@pytest.mark.parametrize("build", [empty, wholly_meta, fake])
@pytest.mark.parametrize("rewritten", [False, True])
def test_bound_to_a_module_it_is_that_model(build: Any, rewritten: bool) -> None:
    model = real()
    program = traced(build(), ids(2, 7))
    if rewritten:
        default = Pipeline.default()
        want = default.run(capture(model, ids(2, 7)))
        program = bind(default.run(program), model)
        assert want.tensors.keys() == program.tensors.keys()
        for name, tensor in want.tensors.items():
            assert torch.equal(program.tensors[name], tensor)
            assert type(program.tensors[name]) is type(tensor)
            assert program.tensors[name].requires_grad == tensor.requires_grad
        assert set(program.formulas) == set(want.formulas) != set()
    else:
        program = bind(program, model)
        same(program, model)
        assert {id(p) for p in program.parameters()} <= {id(p) for p in model.parameters()}


class Lazy(Mapping[str, Tensor]):
    """A checkpoint that notes which tensors are read, and when."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = dict(tensors), list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_state_dict_a_file_and_a_lazily_read_mapping() -> None:
    model = real()
    program = traced(empty(), ids(2, 7))
    state = model.state_dict()
    same(bind(program, state), model)
    without = {k: v for k, v in state.items() if k != "head.weight"} | {"other": torch.ones(1)}
    lazy = Lazy(without)
    bound = bind(program, lazy)
    same(bound, model)
    assert "other" not in lazy.read
    assert len(lazy.read) == len(set(lazy.read))
    assert len({id(p) for p in bound.parameters()}) == len(list(model.parameters()))
    assert all(p.requires_grad and p.is_leaf for p in bound.parameters())

    class File:
        """What safetensors.safe_open gives."""

        def keys(self) -> list[str]:
            return list(without)

        def get_tensor(self, name: str) -> Tensor:
            return without[name]

    same(bind(program, File()), model)  # type: ignore[arg-type]


def test_binding_leaves_the_program_as_it_was_and_can_be_done_again() -> None:
    program = traced(empty(), ids(2, 7))
    before, tensors = graph_text(program.graph), dict(program.tensors)
    one, two = real(), real()
    with torch.no_grad():
        two.blocks[0].mix.add_(1)
    bound = bind(program, one)
    same(bind(bound, two), two)
    same(bound, one)
    assert graph_text(program.graph) == before
    assert all(program.tensors[n] is t for n, t in tensors.items())


def test_a_model_wholly_on_meta_needs_its_buffers() -> None:
    program = traced(wholly_meta(), ids(2, 7))
    with pytest.raises(RewriteError) as raised:
        bind(program, real().state_dict())
    assert "blocks.0.mask, blocks.1.mask" in raised.value.headline
    assert "frequencies" in raised.value.headline
    assert "lensfx.empty_weights()" in raised.value.hint


def test_wrong_weights_are_refused_by_name() -> None:
    program = Pipeline.default().run(traced(empty(), ids(2, 7)))
    state = real().state_dict()
    short = {k: v for k, v in state.items() if not k.startswith("blocks.1")}
    with pytest.raises(RewriteError, match=r"do not hold blocks\.1\.") as raised:
        bind(program, short)
    assert "blocks.1.qkv.weight" in raised.value.headline
    with pytest.raises(RewriteError, match=r"blocks.0.mix has the shape \(4, 8\) .* \(8, 8\)"):
        bind(program, state | {"blocks.0.mix": torch.zeros(4, 8)})
    with pytest.raises(RewriteError, match=r"bfloat16 in the weights and torch.float32") as raised:
        bind(program, {k: v.bfloat16() for k, v in state.items()})
    assert "capture the model in torch.bfloat16" in raised.value.hint
    with pytest.raises(RewriteError, match="holds no values"):
        bind(program, empty())


def test_constants_of_the_graph_go_where_the_weights_go() -> None:
    program = bind(traced(empty(), ids(2, 7)), real(), device="meta")
    assert all(t.is_meta for t in program.tensors.values())
    assert "device=device(type='cpu')" not in graph_text(program.graph)
    assert program.flat(ids(3, 5).to("meta"))[0].device.type == "meta"


def test_gradients_reach_the_given_parameters() -> None:
    model = real()
    program = bind(traced(empty(), ids(2, 7)), model)
    weights = list(model.parameters())
    losses = (f(ids(2, 5)).logsumexp(-1).sum() for f in (model, program))
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("build", [empty, wholly_meta, fake])
def test_on_shapes_alone_a_model_shows_its_path_and_the_line_that_rejects_a_call(
    build: Callable[[], nn.Module],
) -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids) if ids.shape[1] > 1 else self.model(ids).sigmoid()

    model, paths = Short(), []
    for example in (ids(2, 7), ids(3, 5), ids(1, 5), ids(2, 1).to("meta")):
        with on_shapes(model, [example]) as given, CallLog() as log:
            out = model(*given)
        assert (out.shape, out.device.type) == ((*example.shape, 11), "cpu")
        paths.append(log.calls)
    assert paths[0] == paths[1] == paths[2]
    assert paths[0] != paths[3]
    with pytest.raises(RuntimeError), on_shapes(model, [ids(2, 99)]) as given:
        model(*given)
    with pytest.raises(RuntimeError), on_shapes(model, [ids(2, 7).float()]) as given:
        model(*given)
    assert has_no_weights(model)
