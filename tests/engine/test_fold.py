"""fold evaluates weights once, rounds them once, and leaves everything else as it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import FoldScale, Once, Sketch, node
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lensfx.capture import capture
from lensfx.graph import Program
from lensfx.graph.blocks import evaluate
from lensfx.rewrite import Edit, Match, Maybe, Op, Param, Pipeline, fold

aten = torch.ops.aten
blocks = importlib.import_module("lensfx.graph.blocks")


def folded(program: Program) -> Program:
    return Pipeline([FoldScale()], strict=True).run(program)


def normed(
    readers: dict[str, bool], dtype: torch.dtype = torch.float32, shift: bool = True
) -> Program:
    """A layer norm read by linears; `readers` says of each whether it has a bias."""
    s = Sketch()
    x = s.input("x", "B", 8, dtype=dtype)
    g = s.weight("ln.weight", 8, dtype=dtype)
    b = s.weight("ln.bias", 8, dtype=dtype) if shift else None
    weights = {
        k: (
            s.weight(f"{k}.weight", 6, 8, dtype=dtype),
            s.weight(f"{k}.bias", 6, dtype=dtype) if biased else None,
        )
        for k, biased in readers.items()
    }
    n = s.call(aten.layer_norm.default, x, [8], g, b, path="ln")
    return s.done(*(s.call(aten.linear.default, n, *w, path=k) for k, w in weights.items()))


def names(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]


def wide(program: Program, name: str) -> Tensor:
    return program.tensors[name].detach().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_result_is_the_float64_result_rounded_once(dtype: torch.dtype) -> None:
    before = normed({"q": False, "k": True}, dtype)
    after = folded(before)
    g, s = wide(before, "ln.weight"), wide(before, "ln.bias")
    expected = {
        "q.weight": wide(before, "q.weight") * g,
        "q.bias": wide(before, "q.weight") @ s,
        "k.weight": wide(before, "k.weight") * g,
        "k.bias": wide(before, "k.bias") + wide(before, "k.weight") @ s,
    }
    assert after.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert after.tensors[name].dtype == dtype
        assert torch.equal(after.tensors[name], value.to(dtype)), name
    if dtype == torch.bfloat16:
        twice = (before.tensors["k.weight"] @ before.tensors["ln.bias"]) + before.tensors["k.bias"]
        assert not torch.equal(after.tensors["k.bias"], twice)


def stored(m: Match, name: str) -> fx.Node:
    """The read of a stored tensor in the graph of a match."""
    return next(n for n in m.root.graph.nodes if n.op == "get_attr" and n.target == name)


LINEAR = Op("linear", (aten.linear.default,), {"weight": Param("W"), "bias": Maybe(Param("b"))})


def test_a_cast_in_the_formula_rounds_nothing_on_the_way() -> None:
    s = Sketch()
    x = s.input("x", 2, 8, dtype=torch.bfloat16)
    w, g = s.weight("w", 4, 8, dtype=torch.bfloat16), s.weight("g", 8)
    before = s.done(s.call(aten.linear.default, x, w), g)

    def scale(m: Match, edit: Edit) -> None:
        at = edit.before(m.linear)
        low = at.call(aten.to.dtype, stored(m, "g"), torch.bfloat16)
        product = at.call(aten.mul.Tensor, at.call(aten.mul.Tensor, m.W, low), low)
        at.set(m.linear, weight=at.call(aten.to.dtype, product, torch.bfloat16))

    after = Pipeline([Once(pattern=LINEAR, rewrite=scale)]).run(before)
    exact = wide(before, "w") * wide(before, "g") * wide(before, "g")
    assert torch.equal(after.tensors["w"], exact.to(torch.bfloat16))
    low = before.tensors["g"].to(torch.bfloat16)
    assert not torch.equal(after.tensors["w"], before.tensors["w"] * low * low)


def test_an_expression_over_another_reads_the_parameters_as_they_were() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    w, b = s.weight("q.weight", 6, 8), s.weight("q.bias", 6)
    g, v = s.weight("g", 8), s.weight("v", 8)
    q = s.call(aten.linear.default, x, w, b, path="q")
    before = s.done(q, *(s.call(aten.mul.Tensor, x, p) for p in (g, v)))

    def chain(m: Match, edit: Edit) -> None:
        at = edit.before(m.linear)
        scaled = at.call(aten.mul.Tensor, m.W, stored(m, "g"))
        moved = at.call(aten.mv.default, scaled, stored(m, "v"))
        at.set(m.linear, weight=scaled, bias=at.call(aten.add.Tensor, m.b, moved))

    after = Pipeline([Once(pattern=LINEAR, rewrite=chain)]).run(before)
    scaled = wide(before, "q.weight") * wide(before, "g")
    moved = wide(before, "q.bias") + scaled @ wide(before, "v")
    assert torch.equal(after.tensors["q.weight"], scaled.float())
    assert torch.equal(after.tensors["q.bias"], moved.float())
    assert after.formulas["q.bias"].text == "add(q.bias, mv(mul(q.weight, g), v))"
    assert names(after) == ["g", "v", "q.weight", "q.bias"]


def test_names_are_kept_where_nobody_else_reads_them() -> None:
    before = normed({"q": False, "k": True})
    after = folded(before)
    assert names(after) == ["q.weight", "q.bias", "k.weight", "k.bias"]
    assert [(f.name, f.text, f.sources) for f in after.formulas.values()] == [
        ("q.weight", "mul(q.weight, ln.weight)", ("ln.weight", "q.weight")),
        ("q.bias", "mv(q.weight, ln.bias)", ("ln.bias", "q.weight")),
        ("k.weight", "mul(k.weight, ln.weight)", ("ln.weight", "k.weight")),
        (
            "k.bias",
            "add(k.bias, mv(k.weight, ln.bias))",
            ("ln.bias", "k.weight", "k.bias"),
        ),
    ]
    for name, formula in after.formulas.items():
        value = evaluate_formula(formula.graph, before)
        assert torch.equal(after.tensors[name], value.to(torch.float32)), name


def evaluate_formula(graph: fx.Graph, program: Program) -> Tensor:
    held = {str(n.target): wide(program, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    (value,) = fx.GraphModule(held, graph)()
    return value


def test_a_parameter_that_others_read_keeps_its_name() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    g, w = s.weight("ln.weight", 8), s.weight("q.weight", 8, 8)
    b = s.weight("q.bias", 8)
    n = s.call(aten.layer_norm.default, x, [8], g)
    inside = s.call(aten.linear.default, n, w, b)
    before = s.done(s.call(aten.linear.default, inside, w, b))
    after = folded(before)
    assert sorted(names(after)) == ["q.bias", "q.weight", "q.weight_folded"]
    assert after.tensors["q.weight"] is before.tensors["q.weight"]
    assert after.tensors["q.bias"] is before.tensors["q.bias"]
    assert node(after, "linear").args[2] is node(after, "linear_1").args[2]


def test_a_name_that_is_taken_is_never_taken_over() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    g, w = s.weight("ln.weight", 8), s.weight("q.weight", 8, 8)
    held = s.weight("q.weight_folded", 8)
    n = s.call(aten.layer_norm.default, x, [8], g)
    twice = s.call(aten.linear.default, s.call(aten.linear.default, n, w), w)
    after = folded(s.done(s.call(aten.mul.Tensor, twice, held)))
    assert set(names(after)) == {"q.weight", "q.weight_folded", "q.weight_folded_1"}
    assert after.tensors["q.weight_folded"] is s.tensors["q.weight_folded"]


class Tied(nn.Module):
    """An embedding table that is also the unembedding, behind a final norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(11, 8)
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight
        for p in self.ln.parameters():
            nn.init.normal_(p)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.ln(self.wte(idx)))


def test_a_tied_table_unties() -> None:
    model = Tied()
    idx = torch.randint(0, 11, (2, 5))
    before = capture(model, idx)
    after = folded(before)
    assert after.tensors["wte.weight"] is model.wte.weight
    assert after.tensors["head.weight"] is not model.wte.weight
    expected = (model.wte.weight.double() * model.ln.weight.double()).float()
    assert torch.equal(after.tensors["head.weight"], expected)
    torch.testing.assert_close(after(idx), model(idx))
    assert model.head.weight is model.wte.weight
    assert before.tensors["head.weight"] is before.tensors["wte.weight"]


class Repeated(nn.Module):
    """One block applied three times: a norm and the linear that reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ln = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        for p in self.ln.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.q(self.ln(x)))
        return x


def test_a_block_applied_three_times_gives_three() -> None:
    model, x = Repeated(), torch.randn(2, 5, 8)
    after = folded(capture(model, x))
    stems = [f"q.{k}_folded{i}" for i in ("", "_1", "_2") for k in ("weight", "bias")]
    assert sorted(after.tensors) == sorted(stems)
    assert len(after.journal) == 3
    torch.testing.assert_close(after(x), model(x))


def test_the_callers_parameters_are_never_written() -> None:
    before = normed({"q": False, "k": True})
    held = {k: (t, t.data_ptr(), t._version, t.detach().clone()) for k, t in before.tensors.items()}
    after = folded(before)
    for name, (tensor, pointer, version, value) in held.items():
        assert before.tensors[name] is tensor
        assert (tensor.data_ptr(), tensor._version) == (pointer, version)
        assert torch.equal(tensor, value)
    mine = {t.data_ptr() for t, *_ in held.values()}
    assert mine.isdisjoint(t.data_ptr() for t in after.tensors.values())


def test_what_no_pass_touched_is_the_same_object() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    g, w, v = s.weight("g", 8), s.weight("w", 4, 8), s.weight("v", 8, 8)
    own = s.call(aten.mul.Tensor, v, 0.5)
    n = s.call(aten.layer_norm.default, s.call(aten.linear.default, x, own), [8], g)
    before = s.done(s.call(aten.linear.default, n, w))
    after = folded(before)
    assert after.tensors["v"] is before.tensors["v"]
    # The model's own expression over v is no business of any pass, so it stays an expression.
    assert node(after, "mul").args[0].target == "v"
    assert set(after.formulas) == {"w"}
    assert set(after.tensors) == {"v", "w"}


def test_nothing_to_fold_gives_the_same_program() -> None:
    before = normed({"q": False})
    assert fold(before) is before
    after = folded(before)
    assert after.unfolded is not None
    assert after.unfolded.tensors.keys() == before.tensors.keys()
    again = fold(after)
    assert names(again) == names(after)
    assert all(again.tensors[k] is after.tensors[k] for k in after.tensors)


@pytest.mark.parametrize("trained", [True, False])
def test_parameters_and_buffers_stay_what_they_were(trained: bool) -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    g, w = s.stored("ln.scale", torch.full((8,), 2.0)), s.stored("table", torch.randn(4, 8))
    frozen = s.weight("frozen", 4, 8)
    n = s.call(aten.rms_norm.default, x, [8], g)
    before = s.done(*(s.call(aten.linear.default, n, v) for v in (w, frozen)))
    before.tensors["frozen"].requires_grad_(trained)
    after = folded(before)
    assert type(after.tensors["table"]) is Tensor
    assert isinstance(after.tensors["frozen"], nn.Parameter)
    assert after.tensors["frozen"].requires_grad is trained
    assert not after.tensors["table"].requires_grad


Expression = Callable[..., Any]


def expression(make: Expression, *sizes: tuple[int, ...]) -> tuple[fx.Node, list[Tensor]]:
    """A weight expression over fresh float32 tensors of these sizes, and the tensors."""
    s = Sketch()
    reads = [s.weight(f"w{i}", *size) for i, size in enumerate(sizes)]
    root = make(s.call, *reads)
    s.done(root)
    return root, list(s.tensors.values())


def evaluated(root: fx.Node, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return evaluate(root, lambda n: tensors[int(str(n.target)[1:])], dtype)


def product(call: Expression, w: fx.Node, g: fx.Node) -> fx.Node:
    return call(aten.mul.Tensor, w, g)


def row_centred(call: Expression, w: fx.Node) -> fx.Node:
    return call(aten.sub.Tensor, w, call(aten.mean.dim, w, [-1], True))


def column_centred(call: Expression, w: fx.Node) -> fx.Node:
    return call(aten.sub.Tensor, w, call(aten.mean.dim, w, [0], True))


def shift(call: Expression, b: fx.Node, w: fx.Node, s: fx.Node) -> fx.Node:
    return call(aten.add.Tensor, b, call(aten.mv.default, w, s))


def turned(call: Expression, w: fx.Node, g: fx.Node) -> fx.Node:
    return call(aten.mul.Tensor, call(aten.t.default, w), g)


def turned_after(call: Expression, w: fx.Node, g: fx.Node) -> fx.Node:
    return call(aten.t.default, call(aten.mul.Tensor, w, g))


def mixed(call: Expression, w: fx.Node, v: fx.Node, c: fx.Node) -> fx.Node:
    scaled = call(aten.div.Tensor, call(aten.neg.default, w), 3.0)
    return call(aten.add.Tensor, call(aten.rsub.Scalar, scaled, 1.0), call(aten.mul.Tensor, v, c))


def narrow_mean(call: Expression, w: fx.Node) -> fx.Node:
    return call(aten.mean.dim, w, [1])


def both_means(call: Expression, w: fx.Node) -> fx.Node:
    return call(aten.sub.Tensor, w, call(aten.mean.dim, w, [0, 1], True))


def composed(call: Expression, w: fx.Node, v: fx.Node) -> fx.Node:
    return call(aten.mm.default, w, call(aten.t.default, v))


CASES: dict[str, tuple[Expression, tuple[tuple[int, ...], ...]]] = {
    "mul by a row": (product, ((40, 16), (16,))),
    "mul by a column": (product, ((40, 16), (40, 1))),
    "mul of two matrices": (product, ((40, 16), (40, 16))),
    "mul by one row of rank 2": (product, ((40, 16), (1, 16))),
    "minus the mean of each row": (row_centred, ((40, 16),)),
    "minus the mean of each column": (column_centred, ((40, 16),)),
    "mv": (shift, ((40,), (40, 16), (16,))),
    "transposed first": (turned, ((16, 40), (16,))),
    "transposed last": (turned_after, ((40, 16), (16,))),
    "several steps": (mixed, ((40, 16), (40, 16), (16,))),
    "mean as the result": (narrow_mean, ((40, 16),)),
    "a mean over both axes": (both_means, ((40, 16),)),
    "a product of two": (composed, ((40, 16), (8, 16))),
}


def ulps(a: Tensor, b: Tensor) -> float:
    unit = (torch.nextafter(b.abs(), torch.full_like(b, float("inf"))) - b.abs()).double()
    return float(((a.double() - b.double()).abs() / unit).max())


@pytest.mark.parametrize(("make", "sizes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("block", [1, 50, 64])
def test_evaluation_by_rows_is_evaluation(
    make: Expression,
    sizes: tuple[tuple[int, ...], ...],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, tensors = expression(make, *sizes)
    plain = evaluated(root, tensors)
    monkeypatch.setattr(blocks, "BLOCK", block)
    assert ulps(evaluated(root, tensors), plain) <= 1
    assert evaluated(root, tensors).is_contiguous()
    exact = direct(root, [t.detach().double() for t in tensors])
    assert torch.equal(plain, exact.float())


def direct(root: fx.Node, tensors: list[Tensor]) -> Tensor:
    """The expression run as it stands on the given tensors."""
    values: dict[fx.Node, Any] = {}
    for n in root.graph.nodes:
        if n.op == "output":
            break
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda m: values[m])
        values[n] = tensors[int(n.target[1:])] if n.op == "get_attr" else n.target(*args, **kwargs)
    return values[root]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.sampled_from(list(CASES)))
def test_any_size_of_matrix_and_block(rows: int, columns: int, block: int, case: str) -> None:
    make, sizes = CASES[case]
    shape = {40: rows, 16: columns}
    root, tensors = expression(make, *(tuple(shape.get(k, k) for k in size) for size in sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", block)
        blocked = evaluated(root, tensors, torch.float64)
    plain = direct(root, [t.detach().double() for t in tensors])
    torch.testing.assert_close(blocked, plain, rtol=1e-14, atol=1e-14)


class Largest(TorchDispatchMode):
    """The number of entries of the largest float64 tensor that was made."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.entries = max(self.entries, out.untyped_storage().nbytes() // 8)
        return out


def largest(root: fx.Node, tensors: list[Tensor]) -> int:
    with Largest() as seen:
        evaluated(root, tensors)
    return seen.entries


WHOLE = {"transposed last", "a mean over both axes", "a product of two"}


@pytest.mark.parametrize("case", CASES)
def test_only_a_block_is_held_in_float64(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, sizes = CASES[case]
    big = {40: 400, 16: 160}
    root, tensors = expression(make, *(tuple(big.get(k, k) for k in size) for size in sizes))
    whole = max(t.numel() for t in tensors)
    monkeypatch.setattr(blocks, "BLOCK", whole)
    assert largest(root, tensors) >= whole
    monkeypatch.setattr(blocks, "BLOCK", 1600)
    assert (largest(root, tensors) <= 1600) == (case not in WHOLE)


def test_a_column_that_grows_by_broadcasting(monkeypatch: pytest.MonkeyPatch) -> None:
    root, tensors = expression(product, (40, 1), (16,))
    monkeypatch.setattr(blocks, "BLOCK", 10)
    assert evaluated(root, tensors).shape == (40, 16)


def test_large_results_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    root, tensors = expression(product, (40, 16), (16,))
    monkeypatch.setattr(blocks, "BLOCK", 10)
    moved = [t.detach().to("meta") for t in tensors]
    assert evaluated(root, moved).device.type == "meta"


def test_a_number_is_no_weight() -> None:
    s = Sketch()
    w = s.weight("w0", 4, 8)
    size = s.call(aten.sym_size.int, w, 0)
    s.done(size)
    with pytest.raises(TypeError, match="is not a tensor"):
        evaluated(size, list(s.tensors.values()))
