"""The functional form of an in-place program is bitwise the program: values, effects, gradients."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from lensfx.capture import inverses
from lensfx.capture.functional import functionalise
from lensfx.errors import CaptureError
from lensfx.graph.ops import writes

aten = torch.ops.aten
Body = Callable[..., Any]
STARTS = ("placeholder", "get_attr")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """Parameters and buffers for a test body, which gets them as `m`."""

    def __init__(self, body: Body, *, training: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lin = nn.Linear(6, 6)
            self.norm = nn.BatchNorm1d(6)
            self.table = nn.Embedding(9, 6, max_norm=1.0)
            self.register_buffer("cache", torch.randn(20, 6))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.body = (body,)
        self.train(training)

    def forward(self, *args: Tensor) -> Any:
        return self.body[0](self, *args)


def flat(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    shapes = tuple({i: Dim.AUTO for i in range(a.ndim)} for a in args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, args, dynamic_shapes=(shapes,), strict=False)
        return exported.module(check_guards=False)


def converted(model: nn.Module, *args: Tensor) -> fx.GraphModule:
    made = flat(model, *args)
    old = set(made.graph.nodes)
    functionalise(made.graph)
    made.recompile()
    nodes = list(made.graph.nodes)
    tail = [n for n in nodes if writes(n)]
    assert nodes[len(nodes) - 1 - len(tail) : -1] == tail
    assert all(n.target is aten.copy_.default and n.args[0].op in STARTS for n in tail)
    for node in nodes:
        if node not in old:
            assert node.meta["val"] is not None
            assert node.meta["stack_trace"]
    return made


def gradients(model: nn.Module, out: list[Tensor]) -> Any:
    """The gradients by name; the error text where a saved value was overwritten in eager."""
    used = {k: p for k, p in model.named_parameters() if p.requires_grad}
    random = torch.Generator().manual_seed(1)
    seeds = [torch.randint(-3, 4, o.shape, generator=random).to(o.dtype) for o in out]
    pairs = [(o, s) for o, s in zip(out, seeds, strict=True) if o.requires_grad]
    if not pairs:
        return {}
    roots, kept = zip(*pairs, strict=True)
    try:
        found = torch.autograd.grad(roots, list(used.values()), kept, allow_unused=True)
    except RuntimeError as error:
        if re.search("modified (by an )?in-?place", str(error)):
            return str(error)
        raise
    return {k: g for k, g in zip(used, found, strict=True) if g is not None and g.any()}


def run(model: nn.Module, *args: Tensor) -> tuple[Any, Any, Any]:
    """Outputs, arguments and buffers after one call, and gradients of the parameters."""
    for buffer in model.buffers():
        buffer.detach_()
    torch.manual_seed(3)
    args = tuple(a.clone() for a in args)
    out = model(*args)
    out = list(out) if isinstance(out, tuple | list) else [out]
    after = {k: b.detach().clone() for k, b in model.named_buffers() if not k.startswith("lift")}
    return [o.detach().clone() for o in out], (args, after), gradients(model, out)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def agrees(body: Body, *calls: tuple[Tensor, ...], training: bool = False) -> set[str]:
    """Compare graph and model over several calls; the parameters whose gradients were compared."""
    model = Net(body, training=training)
    made = converted(copy.deepcopy(model), *calls[0])
    compared: set[str] = set()
    for args in calls:
        want, got = run(model, *args), run(made, *args)
        assert same(want[0], got[0]), "outputs differ"
        assert same(want[1], got[1]), "inputs or buffers differ"
        if isinstance(want[2], dict):
            assert same(want[2], got[2]), "gradients differ"
            compared |= want[2].keys()
    return compared


def relu_after_updates(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    h += x
    h.mul_(2)
    return F.relu(h, inplace=True)


def column_assigned(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y[:, 0] = x[:, 1]
    return y * y


def slice_updated(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y[:, :, 2:5] += 1
    return y


def transpose_and_slice(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y.transpose(0, 1)[1:].mul_(3)
    return y


def three_aliases(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    rows, turned = y.view(-1, 6), y.mT
    rows[1:].add_(1)
    return y, rows, turned


def causal_mask(m: Net, x: Tensor) -> Any:
    scores = m.lin(x) @ x.mT
    n = x.shape[1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill_(future, float("-inf")).softmax(-1)


def indexed_writes(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y[y > 0.5] = 0.25
    y[torch.tensor([0, 2])] = x[:2]
    y.index_put_((torch.tensor([1]),), x[0], accumulate=True)
    return y


def input_changed(m: Net, x: Tensor) -> Any:
    x.mul_(2)
    x[:, 1:].add_(1)
    return m.lin(x)


def counter(m: Net, x: Tensor) -> Any:
    m.steps += 1
    return m.lin(x) * m.steps


def norm_in_training(m: Net, x: Tensor) -> Any:
    return F.relu(m.norm(m.lin(x).transpose(1, 2)), inplace=True)


RECIPE = [
    relu_after_updates,
    column_assigned,
    slice_updated,
    transpose_and_slice,
    three_aliases,
    causal_mask,
    indexed_writes,
    input_changed,
    counter,
]


def chunk_written(m: Net, x: Tensor) -> Any:
    y = x * 2
    first, second = y.chunk(2, 1)
    second.mul_(3)
    y[0] = 7
    return y, first, second


def split_written(m: Net, x: Tensor) -> Any:
    y = x * 2
    left, right = y.split([2, 4], -1)
    right.relu_()
    _, tail = y.tensor_split(2, 0)
    tail.add_(1)
    return y, left, right, tail


def unbind_written(m: Net, x: Tensor) -> Any:
    y = x * 2
    parts = y.unbind(-1)
    parts[2].mul_(3)
    parts[-1].copy_(parts[0])
    return y, *parts


def return_values_chained(m: Net, x: Tensor) -> Any:
    h = m.lin(x).exp()
    return torch.neg_(h).add_(x).mul_(2), h


def view_updated_and_returned(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    y = h.view(-1)
    y += 1
    return y, h


def int_base(m: Net, x: Tensor) -> Any:
    n = torch.zeros(x.shape, dtype=torch.long)
    n.copy_(x * 3)
    n[:, 0] = x[:, 1] * 5
    n.ge_(1)
    flags = x > 0
    flags |= x < -1
    return n, flags, m.lin(x).add_(x.double())


def position_buffer(m: Net, x: Tensor) -> Any:
    m.cache[: x.shape[1]] = x[0]
    m.cache[x.shape[1] :].mul_(0.5)
    return m.lin(m.cache[: x.shape[1]])


def many_views(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y.diagonal(0, 1, 2).add_(1)
    y.unsqueeze(1).squeeze(1).permute(2, 0, 1)[0].sub_(x[:, :, 0])
    y.narrow(-1, -2, 2).mul_(2)
    y.unflatten(-1, (2, 3))[..., 1].add_(4)
    y.expand(y.shape).flatten(1).movedim(0, 1).neg_()
    return y


def out_variants(m: Net, x: Tensor) -> Any:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    torch.mul(x, y, out=y)
    return m.lin(y)


def idle_dropout_is_an_alias(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    d = F.dropout(h, 0.5, m.training)
    d += 1
    return h, d


def random_writes(m: Net, x: Tensor) -> Any:
    noise = torch.empty_like(x).normal_()
    mask = torch.empty_like(x).bernoulli_(0.5)
    x.clone().uniform_()
    return F.dropout(m.lin(x), 0.5, True, inplace=True) * mask + noise


def overwritten(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    h[0].zero_()
    h[1:, 0].fill_(2)
    h[..., 3].copy_(x.sum())
    m.cache.mT.copy_(m.cache[0, 0].clone())
    return h, m.cache.view(-1) * h.sum()


def swapped(m: Net, x: Tensor, y: Tensor) -> Any:
    kept = x.clone()
    x.copy_(y)
    y.copy_(kept)
    y.add_(1)
    return x, m.lin(x), y


def constant_table(m: Net, x: Tensor) -> Any:
    t = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    t[0] = 5
    t.unsqueeze_(0).mul_(2)
    return m.lin(x) * t, t


def cut_in_place(m: Net, x: Tensor) -> Any:
    h = m.lin(x) * 2
    h.detach_().mul_(2)
    return h + m.lin(x)


def deep_chain(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    for _ in range(4):
        h = h.view(x.shape)[:, :]
        h += x
    return h


def same_shaped_list(m: Net, x: Tensor) -> Any:
    y, z = torch.broadcast_tensors(m.lin(x), x[0])
    y += z
    return y * 2


MORE = [
    chunk_written,
    split_written,
    unbind_written,
    return_values_chained,
    view_updated_and_returned,
    int_base,
    position_buffer,
    many_views,
    out_variants,
    idle_dropout_is_an_alias,
    random_writes,
    overwritten,
    constant_table,
    cut_in_place,
    deep_chain,
    same_shaped_list,
]
NO_GRADIENT = {"chunk_written", "split_written", "unbind_written", "return_values_chained"}


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("body", RECIPE + MORE, ids=lambda b: b.__name__)
def test_bitwise_at_two_shapes(body: Body) -> None:
    compared = agrees(body, (inputs(3, 5, 6),), (inputs(4, 7, 6),))
    assert compared >= ({"lin.weight"} if body.__name__ not in NO_GRADIENT else set())


def test_training_norm_keeps_its_statistics() -> None:
    calls = (inputs(3, 5, 6),), (inputs(4, 7, 6),)
    assert "norm.weight" in agrees(norm_in_training, *calls, training=True)


def test_inputs_that_take_each_others_values() -> None:
    first = inputs(3, 5, 6), inputs(3, 5, 6, seed=1)
    second = inputs(2, 4, 6), inputs(2, 4, 6, seed=1)
    assert agrees(swapped, first, second) >= {"lin.weight"}


def unfolded(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    y.unfold(0, 2, 1).add_(1)
    return y


def strided(m: Net, x: Tensor) -> Any:
    y = x.clone()
    y.as_strided((2, 2), (1, 2)).mul_(2)
    return y


def expanded(m: Net, x: Tensor) -> Any:
    y = x[:, :1].clone()
    y.expand(x.shape).relu_()
    return y


def retyped(m: Net, x: Tensor) -> Any:
    y = x.clone()
    y.view(torch.int32).bitwise_and_(3)
    return y


def list_written(m: Net, x: Tensor) -> Any:
    y = x.clone()
    torch._foreach_add_([y], 1.0)
    return y


def parameter_written(m: Net, x: Tensor) -> Any:
    return m.table(x[..., 0].long().clamp(0, 8))


def input_reshaped(m: Net, x: Tensor) -> Any:
    return x.transpose_(0, 1) * 2


def gradient_cut(m: Net, x: Tensor) -> Any:
    h = m.lin(x)
    h.detach().mul_(2)
    return h


def viewed_and_cut(m: Net, x: Tensor) -> Any:
    h = m.lin(x) * 2
    row = h[0]
    h.relu_()
    return h.detach_(), row


def broadcast_written(m: Net, x: Tensor) -> Any:
    row = x[0].clone()
    _, wide = torch.broadcast_tensors(x, row)
    row.add_(1)
    return wide


def halves_read(m: Net, x: Tensor) -> Any:
    y = m.lin(x)
    left, _ = y.hsplit([2])
    y.add_(1)
    return left


def statistics_read(m: Net, x: Tensor) -> Any:
    return m.norm(x.mT), m.norm.running_mean * 2


def overlapping_inputs(m: Net, x: Tensor, y: Tensor) -> Any:
    x.add_(1)
    return x, y


REFUSED = {
    unfolded: ("add_ writes into %unfold", "the view unfold has no inverse here", "add"),
    strided: ("mul_ writes into %as_strided", "the view as_strided has no inverse here", "mul"),
    expanded: (
        "relu_ writes into %expand",
        "expand lets several elements share one place in memory",
        "relu",
    ),
    retyped: (
        "bitwise_and_ writes into %view",
        "view reads the memory as another dtype",
        "bitwise_and",
    ),
    list_written: ("_foreach_add_ writes", "it writes several tensors at once", ""),
    parameter_written: (
        "embedding_renorm_ writes into %detach",
        "table.weight is a parameter",
        "",
    ),
    input_reshaped: (
        "transpose_ writes into %args_0",
        "the caller would see the new shape",
        "transpose",
    ),
    gradient_cut: (
        "mul_ writes into %detach",
        "%linear is read later and would lose its gradient",
        "mul",
    ),
    viewed_and_cut: (
        "detach_ writes into %mul",
        "its views would lose their gradient too",
        "detach",
    ),
    broadcast_written: (
        "add_ writes into %clone",
        "%getitem_1 is a view of it that cannot be replayed",
        "add",
    ),
    halves_read: (
        "add_ writes into %linear",
        "%getitem_1 is a view of it that cannot be replayed",
        "add",
    ),
    statistics_read: (
        "batch_norm writes",
        "it updates running_mean in training, and %norm_running_mean is also used by mul",
        "",
    ),
    overlapping_inputs: (
        "add_ writes into %args_0",
        "%args_0 and %args_1 share memory in the example",
        "add",
    ),
}


@pytest.mark.parametrize("body", REFUSED, ids=lambda b: b.__name__)
def test_refuses(body: Body) -> None:
    x = inputs(3, 5, 6)
    args = (x, x[:2]) if body is overlapping_inputs else (x,)
    model = Net(body, training=body is statistics_read)
    if body is overlapping_inputs:
        made = torch.export.export(model, args, strict=False).module(check_guards=False)
    else:
        made = flat(model, *args)
    with pytest.raises(CaptureError) as caught:
        functionalise(made.graph)
    writing, why, name = REFUSED[body]
    instead = f"x = x.{name}(...)" if name else "x = torch.where(...)"
    assert caught.value.headline == f"{writing} and cannot be made functional: {why}"
    assert caught.value.hint == f"write it out of place: `{instead}`"
    assert caught.value.at[0].startswith(f"%{writing.split()[0]}")
    assert "test_functional.py:" in caught.value.at[0]


def test_an_operator_without_functional_form_is_refused() -> None:
    @torch.library.custom_op("lensfx_test::bump", mutates_args={"x"})
    def bump(x: Tensor) -> None:
        x.add_(1)

    def body(m: Net, x: Tensor) -> Any:
        y = x.clone()
        bump(y)
        return y

    made = flat(Net(body), inputs(3, 5, 6))
    with pytest.raises(CaptureError, match=r"bump writes into %clone .* it has no functional form"):
        functionalise(made.graph)


def test_a_graph_without_writes_is_left_alone() -> None:
    made = flat(Net(lambda m, x: m.lin(x).view(-1)), inputs(3, 5, 6))
    before = str(made.graph)
    functionalise(made.graph)
    assert str(made.graph) == before


def test_converting_again_changes_only_the_last_copies() -> None:
    made = converted(Net(input_changed), inputs(3, 5, 6))
    before = [str(n.target) for n in made.graph.nodes]
    functionalise(made.graph)
    assert [str(n.target) for n in made.graph.nodes] == before


def test_put_back_of_an_updated_slice_is_dropped() -> None:
    made = converted(Net(slice_updated), inputs(3, 5, 6))
    names = [str(n.target) for n in made.graph.nodes if n.op == "call_function"]
    assert names.count("aten.slice_scatter.default") == 1
    assert names.count("aten.slice.Tensor") == 3


def test_new_nodes_know_where_the_write_was() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, 1:] += 1
            return x

    model = nn.Sequential(nn.Linear(6, 6), Inner())
    made = torch.export.export(model, (inputs(3, 6),), strict=False).module(check_guards=False)
    functionalise(made.graph)
    scatter = next(n for n in made.graph.nodes if n.target is aten.slice_scatter.default)
    assert [path for path, _ in scatter.meta["nn_module_stack"].values()][-1] == "1"
    assert "test_functional.py" in scatter.meta["stack_trace"]
    assert scatter.meta["val"].shape == (3, 6)


def test_work_is_linear_in_the_writes() -> None:
    class Stack(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(blocks))

        def forward(self, *args: Tensor) -> Tensor:
            h = args[0] * 2
            for block in self.blocks:
                h = h.view(args[0].shape)
                h += F.relu(block(h), inplace=True)
            return h

    made = {}
    for blocks in (24, 48):
        graph = flat(Stack(blocks), inputs(4, 6)).graph
        started = time.process_time()
        functionalise(graph)
        made[blocks] = len(graph.nodes)
        assert time.process_time() - started < 1.0
    assert made[48] < 2 * made[24]


def faulty(inverse: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    def off(work: Any, place: Any) -> fx.Node:
        node = inverse(work, place)
        node.args = tuple(change(list(node.args)))
        return node

    return off


FAULTS = {
    "slice_one_off": (slice_updated, "slice", lambda a: [*a[:3], a[3] - 1, a[4] - 1, *a[5:]]),
    "select_next": (column_assigned, "select", lambda a: [*a[:3], a[3] + 1]),
    "no_turn_back": (transpose_and_slice, "transpose", lambda a: [a[0], sorted(a[1])]),
    "piece_moved": (chunk_written, "chunk", lambda a: [*a[:3], 0, 3]),
    "other_turn": (many_views, "permute", lambda a: [a[0], [1, 0, 2]]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_inverse_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, name, change = FAULTS[fault]
    agrees(body, (inputs(4, 6, 6),))
    wrong = faulty(inverses.INVERSES[name], change)
    monkeypatch.setitem(inverses.INVERSES, name, wrong)
    with pytest.raises(AssertionError, match="differ"):
        agrees(body, (inputs(4, 6, 6),))


def put(t: Tensor, index: Any, value: Any) -> Tensor:
    t[index] = value
    return t


def halves(t: Tensor, k: int) -> Tensor:
    return t.split([1, t.shape[-1] - 1], -1)[k % 2]


VIEWS: list[Callable[[Tensor, int], Tensor]] = [
    lambda t, k: t[1:],
    lambda t, k: t[:, k % 2 :: 2],
    lambda t, k: t.select(k % t.ndim, 0),
    lambda t, k: t.transpose(0, -1),
    lambda t, k: t.permute(*range(1, t.ndim), 0),
    lambda t, k: t.view(-1),
    lambda t, k: t.reshape(-1, t.shape[-1]),
    lambda t, k: t.unsqueeze(k % 3),
    lambda t, k: t.squeeze(0),
    lambda t, k: t.chunk(2, k % t.ndim)[k % 2],
    lambda t, k: t.unbind(-1)[-1],
    halves,
    lambda t, k: t.diagonal(k % 2 - 1),
    lambda t, k: t.narrow(0, 1, 2),
    lambda t, k: t.unflatten(-1, (2, 3)),
    lambda t, k: t.expand_as(t),
    lambda t, k: t.movedim(0, 1),
    lambda t, k: F.dropout(t, 0.5, False),
    lambda t, k: t.sum(-1, keepdim=True),
    lambda t, k: t.clone(),
]
WRITES: list[Callable[[Tensor, Tensor, int], Tensor]] = [
    lambda t, u, k: t.add_(1),
    lambda t, u, k: t.mul_(u),
    lambda t, u, k: t.sub_(u, alpha=2),
    lambda t, u, k: t.copy_(u),
    lambda t, u, k: t.relu_().add_(u),
    lambda t, u, k: t.zero_(),
    lambda t, u, k: t.fill_(k),
    lambda t, u, k: t.fill_(u.sum()),
    lambda t, u, k: t.masked_fill_(t > u, 2),
    lambda t, u, k: t.lt_(0),
    lambda t, u, k: t.clamp_(min=-1),
    lambda t, u, k: t.copy_(u.double()),
    lambda t, u, k: torch.add(t, u, out=t),
    lambda t, u, k: put(t, t > 0, 4),
    lambda t, u, k: put(t, 0, u),
    lambda t, u, k: put(t, (slice(None), k % 2), 3),
    lambda t, u, k: put(t, slice(1, None), t[1:] + u[:1]),
]
Step = tuple[int, int, int, int]
SHAPES = (4, 5, 6), (6, 3, 6)


def start(m: Net, x: Tensor) -> list[Tensor]:
    return [x * m.lin.weight[0], m.cache, x, m.lin(x).transpose(0, 1)]


def advance(known: list[Tensor], step: Step) -> None:
    """Add a view of a known value, or write into one."""
    op, i, j, k = step
    t, u = known[i % len(known)], known[j % len(known)]
    if op % 2:
        known.append(VIEWS[op // 2 % len(VIEWS)](t, k))
    else:
        shared = u.untyped_storage()._cdata == t.untyped_storage()._cdata
        # Eager does not define what a write makes of its own overlapping argument.
        known.append(WRITES[op // 2 % len(WRITES)](t, u.clone() if shared else u, k))


def play(steps: list[Step], m: Net, x: Tensor) -> list[Tensor]:
    known = start(m, x)
    for step in steps:
        advance(known, step)
    return known


def whole_numbers(body: Body) -> Net:
    """A net in which sums are exact, so that their order does not show in gradients."""
    net = Net(body)
    with torch.no_grad():
        for tensor in (*net.parameters(), net.cache):
            tensor.mul_(4).round_()
    return net


def playable(steps: list[Step]) -> list[Step]:
    """The steps that eager accepts at both shapes."""
    kept = []
    states = [start(Net(play), torch.ones(shape)) for shape in SHAPES]
    for step in steps:
        try:
            for known in states:
                advance(known, step)
                assert known[-1].numel()
        except (RuntimeError, IndexError, AssertionError):
            for known in states:
                del known[4 + len(kept) :]
        else:
            kept.append(step)
    return kept


def test_random_programs_are_bitwise_eager() -> None:
    compared = dict.fromkeys(("values", "second shape", "gradients"), 0)
    number = st.integers(0, 999)

    @settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.tuples(number, number, number, number), min_size=4, max_size=10))
    def check(steps: list[Step]) -> None:
        kept = playable(steps)
        model = whole_numbers(lambda m, x: play(kept, m, x))
        small, large = ((3 * inputs(*shape)).round() for shape in SHAPES)
        made = flat(copy.deepcopy(model), small)
        state = copy.deepcopy(model.state_dict())
        try:
            run(made, large)
            calls = {"values": small, "second shape": large}
        except (RuntimeError, AssertionError, IndexError):
            calls = {"values": small}  # the exported graph itself is for one shape only
        functionalise(made.graph)
        made.recompile()
        for name, x in calls.items():
            for net in (model, made):
                net.load_state_dict(state, strict=False)
            want, got = run(model, x), run(made, x)
            assert same(want[:2], got[:2])
            compared[name] += 1
            if isinstance(want[2], dict):
                assert same(want[2], got[2])
                compared["gradients"] += bool(want[2])

    check()
    assert compared["values"] >= 100
    assert compared["second shape"] >= 75
    assert compared["gradients"] >= 75
