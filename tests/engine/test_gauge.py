"""The gauge query: each transfer function against the operator itself, then whole graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from calls import Draw, drawn, graph_of, op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lensfx.analysis.axes import Carry, Kill, Outcome, Read, See, all_axes, groups
from lensfx.analysis.gauge import Constants, Gauge, Proof, Seen, dead, recheck
from lensfx.analysis.transfer import TABLE, Family, transfer
from lensfx.errors import LensError
from lensfx.graph.node import op_name, schema_names
from lensfx.graph.ops import hook_point

aten = torch.ops.aten
torch.set_num_threads(1)


def op_label(target):
    """A name without an address, so that every worker collects the same tests."""
    return getattr(target, "__name__", str(target))


OPS = pytest.mark.parametrize("target", [*TABLE, aten.tanh.default], ids=op_label)


def shift_of(x: Tensor, axes: set[int], d: Draw) -> Tensor:
    return d.plain(*[1 if a in axes else n for a, n in enumerate(x.shape)]) * 3


def with_ones(x: Tensor, axes: list[int]) -> frozenset[int]:
    return frozenset(axes) | {a for a, n in enumerate(x.shape) if n == 1}


def check(outcome: Outcome, before: Tensor, after: Tensor) -> None:
    """Fail unless a result moved as the outcome says."""
    if isinstance(outcome, See) or not before.numel():
        return
    before, after = before.to(torch.complex128).real, after.to(torch.complex128).real
    stayed = before == after
    free = before.isnan() & after.isnan() | stayed & (before == -torch.inf)
    if isinstance(outcome, Carry) and outcome.soft:
        free |= stayed & (before <= -1e4)
    delta = (after - before).masked_fill(free, torch.nan)
    bound = 1e-12 * max(1.0, before.masked_fill(free, 0.0).abs().max().item())
    if isinstance(outcome, Kill):
        assert delta.nan_to_num(0.0).abs().max() <= bound
        return
    for axis in outcome.axes:
        spread = delta.nan_to_num(-torch.inf).amax(axis) - delta.nan_to_num(torch.inf).amin(axis)
        assert (spread <= 10 * bound).all()


def holds(target: Any, d: Draw) -> list[Outcome]:
    """The outcomes for one argument of a random call, each checked against the operator."""
    args, kwargs = drawn(target, d)
    node, place = graph_of(target, args, kwargs)
    names = schema_names(target) or ("self",)
    slots = [
        (name, i, x)
        for name, given in (*zip(names, args, strict=False), *kwargs.items())
        for i, x in enumerate(given if isinstance(given, list) else [given])
        if isinstance(x, Tensor) and x.dtype == torch.float64
    ]
    name, item, x = d.pick(*slots)
    axes = with_ones(x, d.some(x.ndim))
    moved = x + shift_of(x, axes, d)

    def shifted(slot: str, given: Any) -> Any:
        if isinstance(given, list):
            return [moved if (slot, i) == (name, item) else g for i, g in enumerate(given)]
        return moved if slot == name else given

    after = target(
        *(shifted(n, a) for n, a in zip((*names, "name"), args, strict=False)),
        **{n: shifted(n, a) for n, a in kwargs.items()},
    )
    before, many = node.meta["val"], not isinstance(node.meta["val"], Tensor)
    outcomes = []
    for part, (b, a) in enumerate(zip(before, after, strict=True) if many else [(before, after)]):
        read = Read(node, name, place(x), axes, Constants(), item, part if many else None)
        outcomes.append(transfer(read))
        check(outcomes[-1], b, a)
    return outcomes


def seeded(target: Any, tries: int = 300) -> list[Outcome]:
    return [o for seed in range(tries) for o in holds(target, Draw(random.Random(seed).randint))]


@OPS
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_transfer(target: Any, data: st.DataObject) -> None:
    holds(target, Draw(lambda low, high: data.draw(st.integers(low, high))))


def test_every_operator_of_the_table_is_tried_and_answers() -> None:
    for target, family in TABLE.items():
        found = seeded(target, 150)
        assert family.name == "rms norm" or any(not isinstance(o, See) for o in found), target


# All axes of a single number stay constant.
NUMBERS = {op(name) for name in "sum mean max min var std var_mean std_mean dot".split()}


@pytest.mark.parametrize("kind", [Kill, Carry])
@pytest.mark.parametrize("target", TABLE, ids=op_label)
def test_a_rule_that_says_too_much_is_caught(
    monkeypatch: pytest.MonkeyPatch, target: Any, kind: type
) -> None:
    def rule(read: Read) -> Outcome:
        return Kill() if kind is Kill else Carry(frozenset(range(read.result.ndim)))

    monkeypatch.setitem(TABLE, target, replace(TABLE[target], rule=rule))
    with nullcontext() if kind is Carry and target in NUMBERS else pytest.raises(AssertionError):
        seeded(target)


PLANTED: dict[str, tuple[str, Callable[[Read], Outcome]]] = {
    "a shift passes a gate": ("mul.Tensor", lambda r: Carry(r.moved())),
    "tanh carries a shift": ("tanh", lambda r: Carry(r.axes)),
    "a root-mean-square norm removes the mean": ("rms_norm", lambda r: Kill()),
    "a residual add is no reader": ("add.Tensor", lambda r: Kill()),
    "a slice keeps what was cut off": ("pad", lambda r: Carry(r.axes)),
    "gather keeps what its index varies along": ("gather", lambda r: Carry(r.axes)),
    "a product keeps all but the contracted axis": (
        "matmul",
        lambda r: Carry(r.moved() - {r.result.ndim - (1 if r.slot == "self" else 2)}),
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    target, rule = op(PLANTED[fault][0]), PLANTED[fault][1]
    family = TABLE.get(target) or Family("planted", rule, (target,))
    seeded(target)
    monkeypatch.setitem(TABLE, target, replace(family, rule=rule))
    with pytest.raises(AssertionError):
        seeded(target)


def test_a_parameter_vector_that_counts_as_constant_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Constants, "__call__", lambda self, node: all_axes(node.meta["val"].shape))
    with pytest.raises(AssertionError):
        seeded(aten.mul.Tensor)


def traced(module: nn.Module | Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> Any:
    """The flat graph of a function or a module in float64, and how it is called."""
    if not isinstance(module, nn.Module):
        holder = nn.Module()
        holder.forward = module
        module = holder
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = tuple(auto for _ in inputs) if dynamic else None
    ep = torch.export.export(module.double(), inputs, dynamic_shapes=shapes, strict=False)
    gm = ep.module(check_guards=False)
    for node in list(gm.graph.nodes):
        node.meta["weight"] = node.op == "get_attr"
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
    return gm, inputs


class Shifted(fx.Interpreter):
    """Runs a graph with something added to the value of one node."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node, axes: Any, seed: int) -> None:
        super().__init__(gm)
        self.node, self.axes, self.draw = node, axes, Draw(random.Random(seed).randint)

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        return found + shift_of(found, self.axes, self.draw) if n is self.node else found


def outputs(gm: fx.GraphModule, inputs: Any, node: Any, axes: Any, seed: int = 0) -> list[Any]:
    run = Shifted(gm, node, axes, seed).run(*inputs, enable_io_processing=False)
    return pytree.tree_leaves(run)


def truthful(graph: Any, node: fx.Node, axes: Any, allowed: Any = None) -> Proof | Seen:
    """The verdict, once random shifts have failed to contradict it."""
    (gm, inputs), verdict = graph, dead(node, axes, allowed=allowed)
    if isinstance(verdict, Seen):
        assert verdict.path[0] is node
        assert verdict.reason
        return verdict
    recheck(verdict)
    before = outputs(gm, inputs, None, ())
    for seed in range(3):
        for k, after in enumerate(outputs(gm, inputs, node, set(axes), seed)):
            if isinstance(after, Tensor):
                free = (allowed or {}).get(k)
                kept = frozenset(a % after.ndim for a in free or ())
                check(Kill() if free is None else Carry(kept), before[k], after)
    return verdict


class HandNorm(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.ones(width)), kind

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.kind == "hand rms":
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight
        square = ((x - mean) ** 2).mean(-1, keepdim=True)
        spread = x.var(-1, keepdim=True, unbiased=False) if self.kind == "hand var" else square
        return (x - mean.to(x.dtype)) / torch.sqrt(spread + 1e-5) * self.weight


RETURNS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "logits": lambda z, x, t: z,
    "probabilities": lambda z, x, t: F.softmax(z, -1),
    "nll": lambda z, x, t: F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), t.flatten()),
    "capped": lambda z, x, t: 30 * torch.tanh(z / 30),
    "logits, maximum": lambda z, x, t: (z, z.max(-1).values),
    "logits, loss": lambda z, x, t: {
        "logits": z,
        "loss": F.cross_entropy(z.flatten(0, 1), t.flatten()),
    },
    "logits, softmax": lambda z, x, t: (z, z.softmax(-1)),
    "logits, stream": lambda z, x, t: (z, x),
}


class Tiny(nn.Module):
    """A pre-norm transformer; every size may be the same number."""

    def __init__(self, norm: str, returns: str, size: int, vocab: int) -> None:
        super().__init__()
        kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norms = nn.ModuleList(
            kinds[norm](size) if norm in kinds else HandNorm(size, norm) for _ in range(5)
        )
        self.wte, self.wpe = nn.Embedding(vocab, size), nn.Embedding(8, size)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.head, self.returns = nn.Linear(size, vocab), RETURNS[returns]
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor) -> Any:
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t))
        for i in range(2):
            pieces = self.qkv[i](self.norms[2 * i](x)).chunk(3, -1)
            q, k, v = (p.view(b, t, 2, -1).transpose(1, 2) for p in pieces)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.proj[i](z.transpose(1, 2).reshape(b, t, -1))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.returns(self.head(self.norms[4](x)), x, ids)


@cache
def tiny(norm: str = "layer", returns: str = "logits", dynamic: bool = False) -> Any:
    torch.manual_seed(0)
    b, t, vocab = (3, 5, 6) if dynamic else (4, 4, 4)
    ids = torch.arange(b * t).reshape(b, t) * 7 % vocab
    return traced(Tiny(norm, returns, 4, vocab), ids, dynamic=dynamic)


def nodes(graph: Any, *names: str) -> list[fx.Node]:
    return [n for n in graph[0].graph.nodes if n.op == "call_function" and op_name(n) in names]


def first_input(graph: Any) -> fx.Node:
    return next(n for n in graph[0].graph.nodes if n.op == "placeholder")


def leaves(proof: Proof | Seen) -> set[str]:
    assert isinstance(proof, Proof), proof
    return {"contract" if s.rule == "contract" else op_name(s.node) for s in proof.leaves}


SHIFT = {0: (-1,)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("returns", "contract", "expected"),
    [
        ("logits", SHIFT, {"contract"}),
        ("probabilities", None, {"softmax"}),
        ("nll", None, {"log_softmax"}),
        ("logits, loss", SHIFT, {"contract", "cross_entropy_loss"}),
        ("logits, softmax", SHIFT, {"contract", "softmax"}),
        ("logits, stream", SHIFT, {"contract"}),
    ],
)
def test_shift_of_all_logits_is_dead(
    returns: str, contract: Any, expected: Any, dynamic: bool
) -> None:
    graph = tiny(returns=returns, dynamic=dynamic)
    head = nodes(graph, "linear")[-1]
    assert leaves(truthful(graph, head, {2}, contract)) == expected
    assert isinstance(truthful(graph, head, {0, 1}, contract), Seen)


@pytest.mark.parametrize(
    ("returns", "contract", "words"),
    [
        ("logits", None, "it is output 0 of the model; allowed only under a contract"),
        ("logits", {0: (1,)}, "its contract allows only what is constant along its axes [1]"),
        ("capped", SHIFT, "%tanh reads it non-linearly (tanh): a shift along axis 2 would be seen"),
        ("logits, maximum", SHIFT, "it is output 1 of the model"),
        ("logits, loss", None, "it is output 0 of the model"),
    ],
)
def test_shift_of_all_logits_is_seen(returns: str, contract: Any, words: str) -> None:
    graph = tiny(returns=returns)
    seen = truthful(graph, nodes(graph, "linear")[-1], {2}, contract)
    assert isinstance(seen, Seen)
    assert words in seen.reason
    assert seen.node in seen.path[-1].users


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", ["layer", "hand", "hand var"])
def test_mean_of_a_stream_into_layer_norms_is_dead(norm: str, dynamic: bool) -> None:
    graph = tiny(norm, dynamic=dynamic)
    linear = nodes(graph, "linear")
    gauge, stream = Gauge(), [n for n in nodes(graph, "add") if n.meta["val"].shape[-1] == 4]
    for writer in (*nodes(graph, "embedding"), *linear[1::4], *linear[3::4], *stream):
        axis = writer.meta["val"].ndim - 1
        kills = {"layer_norm"} if norm == "layer" else {"mean", "sub", "var"}
        assert leaves(truthful(graph, writer, {axis})) <= kills
        assert gauge.dead(writer, {axis}) == dead(writer, {axis})
    for other in (linear[0], linear[2]):
        assert isinstance(truthful(graph, other, {2}), Seen)


@pytest.mark.parametrize(
    ("norm", "returns", "words"),
    [
        ("rms", "logits", "is a root-mean-square norm: it keeps the mean of axis 2"),
        ("hand rms", "logits", "multiplies it by %add"),
        ("layer", "logits, stream", "it is output 1 of the model"),
    ],
)
def test_mean_of_a_stream_is_seen(norm: str, returns: str, words: str) -> None:
    graph = tiny(norm, returns)
    seen = truthful(graph, nodes(graph, "linear")[1], {2}, SHIFT)
    assert isinstance(seen, Seen)
    assert words in seen.reason


@pytest.mark.parametrize("dynamic", [False, True])
def test_key_bias_is_dead_and_the_others_are_seen(dynamic: bool) -> None:
    graph = tiny(dynamic=dynamic)
    q, k, v = (n for n in nodes(graph, "getitem")[:3])
    proof = truthful(graph, k, {0, 1})
    assert leaves(proof) == {"scaled_dot_product_attention"}
    assert isinstance(proof, Proof)
    assert [s.rule for s in proof.steps] == ["carry", "carry", "kill"]
    query, value = (truthful(graph, n, {0, 1}) for n in (q, v))
    assert isinstance(query, Seen)
    assert query.reason.endswith("reads it as its query: a shift would be seen")
    assert isinstance(value, Seen)


def test_oracle_never_contradicts_a_proof() -> None:
    proofs = 0
    for norm, returns in (
        ("layer", "logits, loss"),
        ("hand", "logits"),
        ("rms", "logits, softmax"),
    ):
        graph = tiny(norm, returns)
        for node in graph[0].graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, Tensor) and val.is_floating_point() and node.op != "get_attr":
                for axes in ({val.ndim - 1}, {0, 1}, {0}, set(range(val.ndim))):
                    axes = {a for a in axes if 0 <= a < val.ndim}
                    proofs += isinstance(truthful(graph, node, axes, SHIFT), Proof)
    assert proofs > 60


def test_an_output_that_sees_no_shift_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, at_output = tiny(returns="logits, stream"), Gauge._at_output
    blind = Gauge(lambda k: ())
    monkeypatch.setattr(Gauge, "_at_output", lambda self, *args: at_output(blind, *args))
    with pytest.raises(AssertionError):
        truthful(graph, nodes(graph, "linear")[1], {2})


X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "softmax": (lambda s: s.softmax(-1), True),
    "softmax of a view": (lambda s: s.transpose(0, 1).reshape(12, 5)[:4].softmax(1), True),
    "log softmax": (lambda s: s.log_softmax(-1), False),
    "layer norm": (lambda s: F.layer_norm(s, (5,)), False),
    "argmax": (lambda s: s.argmax(-1), False),
    "scaled": (lambda s: (s * 1e-4).softmax(-1), False),
    "layer norm of a view": (lambda s: F.layer_norm(s.transpose(0, 1), (5,)), False),
    "centred": (lambda s: s - s.mean(-1, keepdim=True), False),
    "output": (lambda s: s, False),
}


def filled(name: str, fill: float) -> Any:
    return traced(lambda x: FUNCTIONS[name][0](x.masked_fill(X < 0.5, fill)), X)


@pytest.mark.parametrize("fill", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masked_fill_carries_only_to_a_softmax(name: str, fill: float) -> None:
    graph = filled(name, fill)
    verdict = truthful(graph, first_input(graph), {2}, SHIFT if name == "output" else None)
    assert isinstance(verdict, Proof) == (FUNCTIONS[name][1] or fill == -torch.inf)


def test_a_masked_fill_that_carries_to_any_reader_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = aten.masked_fill.Scalar
    monkeypatch.setitem(TABLE, target, replace(TABLE[target], rule=lambda r: Carry(r.moved())))
    for name in ("layer norm", "log softmax", "scaled"):
        graph = filled(name, -1e4)
        with pytest.raises(AssertionError):
            truthful(graph, first_input(graph), {2})


DEAD: dict[str, tuple[bool, Callable[[Tensor], Any]]] = {
    "x - mean": (True, lambda x: x - x.mean(-1, keepdim=True)),
    "x - maximum": (True, lambda x: (x - x.max(-1, keepdim=True).values).exp()),
    "x - logsumexp": (True, lambda x: x - x.logsumexp(-1, keepdim=True)),
    "x - half the mean": (False, lambda x: torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5)),
    "mean - x": (False, lambda x: x.mean(-1, keepdim=True) - x),
    "mean seen": (False, lambda x: (lambda m: (x - m, m))(x.mean(-1, keepdim=True))),
    "mean of another axis": (False, lambda x: x - x.mean(1, keepdim=True)),
    "mean of another": (False, lambda x: x - (2 * x).mean(-1, keepdim=True)),
    "mean rounded": (False, lambda x: x - x.mean(-1, keepdim=True).to(torch.int64)),
    "sizes only": (True, lambda x: torch.zeros_like(x) + x.shape[0]),
    "scores of dead sinks": (True, lambda x: torch.cat([x.softmax(-1), X[..., :1]], -1)),
    "sinks": (False, lambda x: torch.cat([x, X[..., :1]], -1).softmax(-1)),
    "stack": (True, lambda x: torch.stack([x, X], 1).softmax(-1)),
    "scale": (False, lambda x: (x * torch.arange(5.0)).softmax(-1)),
    "routing weight": (True, lambda x: (x * X[..., :1].sigmoid()).softmax(-1)),
    "square": (False, lambda x: (x * x).softmax(-1)),
    "a random gate": (False, lambda x: (x * F.dropout(torch.ones(5), 0.5)).softmax(-1)),
    "a constant gate": (True, lambda x: (x * (torch.ones(5) * 2).exp()[None]).softmax(-1)),
    "partly constant": (False, lambda x: (x * (torch.ones(5) + torch.arange(5.0))).softmax(-1)),
    "a new axis": (True, lambda x: x.unsqueeze(-1).softmax(-1)),
    "sizes of itself": (True, lambda x: torch.ops.aten.type_as(x, x).softmax(-1)),
    "sum, then broadcast": (True, lambda x: (x.sum(-1, keepdim=True) + X).softmax(-1)),
}


@pytest.mark.parametrize("name", DEAD)
def test_shift_along_the_last_axis(name: str) -> None:
    expected, function = DEAD[name]
    graph = traced(function, X)
    verdict = truthful(graph, first_input(graph), {2})
    assert isinstance(verdict, Proof) == expected, verdict


def test_hook_points_carry() -> None:
    plain, inputs = tiny()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in plain.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in nodes((plain, ()), "linear", "add", "embedding"):
            copies[node] = graph.call_function(hook_point, (copies[node], node.name))
            copies[node].meta.update(node.meta)
    hooked = fx.GraphModule(plain, graph)
    for node, copy in copies.items():
        if copy.target is hook_point:
            axes = {node.meta["val"].ndim - 1}
            proof = truthful((hooked, inputs), copy, axes, SHIFT)
            assert isinstance(proof, Proof) == isinstance(dead(node, axes, allowed=SHIFT), Proof)


def test_what_is_constant_before_the_shift_is_not_after_it() -> None:
    def function(x: Tensor) -> Tensor:
        v = x.expand(4, 4)
        y = v * v.t()
        z = y - y.mean(0, keepdim=True)
        return z - z.mean(1, keepdim=True)

    graph = traced(function, X[:1, :1, 0])
    v = nodes(graph, "expand")[0]
    for gauge in (Gauge(), Gauge()):
        assert isinstance(gauge.dead(v, {0, 1}), Proof)
        assert isinstance(gauge.dead(v, {0}), Seen)
        assert isinstance(gauge.dead(first_input(graph), ()), Proof)
    assert isinstance(truthful(graph, v, {0}), Seen)
    assert isinstance(truthful(graph, v, {0, 1}), Proof)


@pytest.mark.parametrize("nested", [True, False])
def test_readers_of_unknown_make_see(nested: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = X
    odd = graph.call_function(len, ([[x]] if nested else x,))
    odd.meta["val"] = X
    graph.output((odd,))
    seen = dead(x, {0, 1, 2})
    assert isinstance(seen, Seen)
    assert seen.reason == "no rule for len at %len_1; nothing is assumed"


def test_what_nobody_reads_is_dead_unless_it_writes() -> None:
    for target, kind in ((aten.tanh.default, Proof), (aten.tanh_.default, Seen)):
        graph = fx.Graph()
        x = graph.placeholder("x")
        unread = graph.call_function(target, (x,))
        x.meta["val"] = unread.meta["val"] = X
        graph.output(())
        assert isinstance(dead(x, {2}), kind)


def test_recheck_misses_no_step() -> None:
    proof = dead(nodes(tiny(), "linear")[1], {2})
    assert isinstance(proof, Proof)
    recheck(proof)
    for step in proof.steps:
        with pytest.raises(AssertionError):
            recheck(replace(proof, steps=tuple(s for s in proof.steps if s is not step)))


def test_only_axes_of_tensors_can_be_asked_about() -> None:
    node = nodes(tiny(), "linear")[0]
    with pytest.raises(LensError, match="a value of 3 axes does not have all of the axes"):
        dead(node, {-1})
    with pytest.raises(LensError, match="only a tensor can be shifted"):
        dead(nodes(tiny(), "chunk")[0], {0})


def test_long_chains_need_no_deep_stack() -> None:
    graph = fx.Graph()
    value = first = graph.placeholder("x")
    first.meta["val"] = X
    for _ in range(20_000):
        value = graph.call_function(aten.add.Tensor, (value, value))
        value.meta["val"] = X
    out = graph.call_function(aten.mul.Tensor, (first, value))
    out.meta["val"] = X
    graph.output((value, out))
    seen = dead(first, {2}, allowed={0: (2,)})
    assert isinstance(seen, Seen)
    assert seen.node is out
    graph.erase_node(graph.output_node())
    graph.erase_node(out)
    graph.output((value,))
    proof = dead(first, {2}, allowed=lambda k: (2,) if k == 0 else None)
    assert isinstance(proof, Proof)
    assert len(proof.steps) == 20_001


@given(data=st.data())
def test_groups_are_the_finest_that_fit(data: st.DataObject) -> None:
    before, after = Draw(lambda low, high: data.draw(st.integers(low, high))).regrouped()
    found = groups(before, after)
    assert [i for ins, _ in found for i in ins] == [i for i, n in enumerate(before) if n > 1]
    assert [i for _, outs in found for i in outs] == [i for i, n in enumerate(after) if n > 1]
    for ins, outs in found:
        assert prod(before[i] for i in ins) == prod(after[i] for i in outs)
        inner = {prod(before[i] for i in ins[:k]) for k in range(1, len(ins))}
        assert not inner & {prod(after[i] for i in outs[:k]) for k in range(1, len(outs))}
