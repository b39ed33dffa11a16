"""ExposeAttention: fused attention becomes scores, pattern and values, and stays what it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lensfx.passes import ExposeAttention
from models import CASES
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lensfx
from lensfx import ContractError, Lens, Pipeline, PipelineError, Program, capture
from lensfx.analysis import Proof, Seen, dead
from lensfx.graph import graph_text, is_op, native_name
from lensfx.rewrite import Lowered, Lowering, lowered
from lensfx.verify import Float64, check, prove

aten = torch.ops.aten
module = importlib.import_module("lensfx.rewrite.attention")
FUSED = aten.scaled_dot_product_attention.default
INF = float("inf")
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
GROUPED = ((3, 4, 5, 4), (3, 2, 5, 4), (3, 2, 5, 4))


def program(
    q: tuple[int | str, ...] = ("B", 2, "T", 4),
    *others: tuple[int | str, ...],
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Program:
    """One attention: of an input to itself, or over the inputs whose sizes are given."""
    s = Sketch()
    named = zip("qkv", (q, *others), strict=False)
    operands = [s.input(name, *sizes, dtype=dtype) for name, sizes in named]
    if not others:
        weights = [s.weight(f"w{n}", 1, dtype=dtype) for n in "qkv"]
        operands = [s.call(aten.mul.Tensor, operands[0], w) for w in weights]
    held = None if mask is None else s.stored("mask", mask)
    return s.done(s.call(FUSED, *operands, held, **options, path="h.0.attn"))


def stack(*each: dict[str, Any]) -> Program:
    """One attention after another over three heads of one group, keys and values from weights."""
    s = Sketch()
    x = s.input("x", "B", 6, 5, 4)
    for i, options in enumerate(each):
        k, v = (s.weight(f"h.{i}.{name}", 1, 3, 5, 4) for name in "kv")
        mask = options.get("attn_mask")
        held = None if mask is None else s.stored(f"h.{i}.mask", mask)
        options = {"enable_gqa": True, **options, "attn_mask": held}
        x = s.call(FUSED, x, k, v, **options, path=f"h.{i}.attn")
    return s.done(x)


def exposed(before: Program, **options: Any) -> Program:
    return Pipeline([ExposeAttention(**options)]).run(before)


def fused(of: Program) -> list[fx.Node]:
    return [n for n in of.graph.nodes if is_op(n, FUSED)]


def assert_equal(before: Program, after: Program) -> None:
    assert fused(after) == []
    assert prove(after).worst <= 1e-12
    assert check(before, Lens(after)).error <= 1e-12


def elsewhere(node: fx.Node, edit: Any = None) -> Any:
    """The steps of a fused node, the scores edited by an operator, written into another graph."""
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in node.all_input_nodes}

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    steps = Lowering(node, call, env.__getitem__)
    scores = steps.scores() if edit is None else call(edit, steps.scores(), [-1])
    pattern = steps.pattern(scores)
    graph.output((scores, pattern, steps.weighed(pattern)))
    return fx.GraphModule(nn.Module(), graph)


# fires


def test_the_smallest_graph(golden: Callable[[str, str], None]) -> None:
    before = program(is_causal=True)
    after = exposed(before)
    golden("expose_attention.before", graph_text(before.graph))
    golden("expose_attention.after", graph_text(after.graph))
    grouped = exposed(program(*GROUPED, mask=CAUSAL, enable_gqa=True))
    golden("expose_attention.grouped", graph_text(grouped.graph))
    (entry,) = after.journal
    (z,) = after.graph.output_node().all_input_nodes
    assert entry.note == "scores %where_scalar_other, pattern %softmax_int"
    assert entry.sites == (("scaled_dot_product_attention", z.name),)


THREE = stack({}, {"is_causal": True}, {"attn_mask": CAUSAL})
AT: dict[str, tuple[Any, list[str]]] = {
    "all": ((), ["h.2.attn", "h.1.attn", "h.0.attn"]),
    "modules": (("h.0", "h.1.attn"), ["h.1.attn", "h.0.attn"]),
    "a module around it": ("h.2", ["h.2.attn"]),
    "a node": (("scaled_dot_product_attention",), ["h.0.attn"]),
    "a native name": (("h.1.attn.scaled_dot_product_attention",), ["h.1.attn"]),
}


@pytest.mark.parametrize("case", AT)
def test_only_what_is_named_is_written_out(case: str) -> None:
    at, paths = AT[case]
    after = exposed(THREE, at=at, expect=len(paths))
    assert [e.path for e in after.journal] == paths
    assert len(fused(after)) == 3 - len(paths)
    assert prove(after).worst <= 1e-12
    assert graph_text(exposed(after, at=at).graph) == graph_text(after.graph)


@pytest.mark.parametrize("at", ["h.3", "h.1.att", "scaled_dot_product_attention_3"])
def test_an_unknown_place_is_an_error_that_lists_what_there_is(at: str) -> None:
    with pytest.raises(PipelineError, match=f"there is no fused attention at '{at}'\n") as caught:
        exposed(THREE, at=("h.0", at))
    assert caught.value.hint.endswith("what there is: h.0.attn, h.1.attn, h.2.attn")
    with pytest.raises(PipelineError, match="what there is: none at all"):
        exposed(exposed(THREE), at=at)


class Padded(nn.Module):
    """torch's own attention module; a row of padding alone has no key at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Any:
        return self.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]


def model(name: str) -> tuple[nn.Module, Callable[[int, int], tuple[Tensor, ...]]]:
    if name in CASES:
        return CASES[name].build(), lambda b, t: CASES[name].inputs(b, t, b + t)[0]
    padding = [torch.arange(9)[:t] >= t - torch.arange(4)[:, None] * t // 2 for t in range(10)]
    return Padded().eval(), lambda b, t: (torch.randn(b, t, 8), padding[t][:b])


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama", "padded"])
def test_a_model_of_any_length_and_batch_size(name: str) -> None:
    built, inputs = model(name)
    lens = lensfx.wrap(built, *inputs(3, 6), passes=(ExposeAttention(),))
    assert fused(lens.program) == []
    others = [inputs(b, t) for b, t in ((1, 1), (4, 9), (1, 7))]
    assert check(built, lens, inputs=others).error <= 1e-12
    _, cache = lens.run_with_cache(*inputs(3, 5))
    softmaxes = [n for n in lens.program.graph.nodes if is_op(n, aten.softmax.int, SAFE)]
    assert len(softmaxes) == (1 if name == "padded" else 2)
    for node in softmaxes:
        pattern, scores = (cache[native_name(n)] for n in (node, *node.all_input_nodes))
        assert pattern.shape == scores.shape == (3, 4, 5, 5)
        empty = (scores == -INF).all(-1)
        assert empty.any() == (name == "padded")
        torch.testing.assert_close(pattern.sum(-1), (~empty).to(pattern.dtype))


# contract


Call = tuple[list[Tensor], Tensor | None, dict[str, Any]]


def static(operands: list[Tensor], mask: Any, options: Any, dtype: Any = torch.float64) -> Program:
    if mask is not None and mask.is_floating_point():
        # Torch takes a mask in float32 beside operands of any dtype.
        mask = mask.detach().to(torch.float32 if dtype is torch.bfloat16 else dtype)
    return program(*(tuple(t.shape) for t in operands), mask=mask, dtype=dtype, **options)


@st.composite
def calls(draw: Any) -> Call:
    def of(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    rank, random = of(2, 3, 4, 4, 4, 5), torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q, k, d, dv, few = of(1, 2, 5), of(1, 3, 5), of(1, 4), of(4, 3), of(1, 2)
    grouped = rank > 2 and of(True, False)
    # Keys and values may have their own numbers of heads, each repeated to those of the queries.
    heads = (few * 6, few * 2, few * 3) if grouped else (few,) * 3
    lead = (of(1, 2),) * (rank - 3)
    ends = zip(heads, ((q, d), (k, d), (k, dv)), strict=True)
    shapes = [(*lead, *((h,) if rank > 2 else ()), *end) for h, end in ends]
    operands = [torch.randn(s, dtype=torch.float64, generator=random) for s in shapes]
    kind, mask = of("none", "causal", "bool", "float"), None
    if kind in ("bool", "float"):
        sizes = (*shapes[0][:-1], k)[draw(st.integers(0, rank - 2)) :]
        mask = torch.rand([of(n, n, 1) for n in sizes], generator=random) < of(0.3, 0.7, 2.0)
        mask[..., 0, :] &= of(True, False)
        if kind == "float":
            numbers = torch.randn(mask.shape, dtype=torch.float64, generator=random)
            mask = numbers.masked_fill(~mask, -INF)
    options = {"is_causal": kind == "causal", "scale": of(None, 0.3, 1.0, -0.5, 0.0)}
    return operands, mask, {**options, "enable_gqa": grouped}


@settings(max_examples=150)
@given(call=calls())
def test_the_steps_are_torchs_own_in_value_and_gradient(call: Call) -> None:
    operands, mask, options = call
    leaves = operands if mask is None else [*operands, mask]
    learned = [t.requires_grad_() for t in leaves if t.is_floating_point()]
    scores, pattern, z = elsewhere(fused(static(*call))[0])(*leaves)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = scaled_dot_product_attention(*operands, mask, **options)
    for own in (wanted, scaled_dot_product_attention(*operands, mask, **options)):
        torch.testing.assert_close(z, own, rtol=1e-12, atol=1e-12)
    # Weights: not negative, in rows that sum to one wherever there is a key.
    assert (pattern >= 0).all()
    torch.testing.assert_close(pattern.sum(-1), (scores > -INF).any(-1).double())
    along = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    got, right = (torch.autograd.grad((x * along).sum(), learned) for x in (z, wanted))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(max_examples=40)
@given(call=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_rewritten_graph_keeps_its_contract(call: Call, dtype: torch.dtype) -> None:
    before = static(*call, dtype)
    after = exposed(before, expect=1)
    assert_equal(before, after)
    assert not after(*before.example)[0].isnan().any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lead", [("B", 1), ("B",), (1, "B", 1), ()])
def test_the_graph_holds_for_other_sizes(lead: tuple[int | str, ...], causal: bool) -> None:
    before = program((*lead, "T", 4), is_causal=causal)
    after = exposed(before)
    assert_equal(before, after)
    for b, t in ((1, 1), (1, 6), (7, 1), (4, 9)):
        x = torch.randn([{"B": b, "T": t}.get(str(n), 1) for n in lead] + [t, 4])
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 1.0, 40.0])
def test_half_precision_rounds_no_more_than_the_kernel(dtype: torch.dtype, scale: Any) -> None:
    before = program((2, 2, 64, 32), dtype=dtype, is_causal=True, scale=scale)
    with Float64() as oracle:
        exact = oracle.read(before.flat(*before.example))[0]
    both = (before, exposed(before))
    kernel, steps = ((p.flat(*p.example)[0] - exact).norm() for p in both)
    assert steps <= 1.02 * kernel


def test_keys_and_values_of_their_own_length() -> None:
    # Torch gives their length two symbols, which the fused call does not compare.
    def operands(b: int, q: int, k: int) -> list[Tensor]:
        return [torch.randn(b, t, 8) for t in (q, k, k)]

    built = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    after = exposed(capture(built, *operands(3, 5, 7), need_weights=False), expect=1)
    assert prove(after).worst <= 1e-12
    calls = [((*operands(*n),), {"need_weights": False}) for n in ((2, 4, 9), (1, 9, 1))]
    assert check(built, after, inputs=calls).error <= 1e-12


def test_an_edit_between_the_steps_goes_on_from_there() -> None:
    before = program(*GROUPED, dtype=torch.bfloat16, enable_gqa=True)
    q, k, v = (t.float() for t in before.example)
    scores, pattern, z = elsewhere(fused(before)[0], aten.flip.default)(*before.example)
    wanted = q / 2 @ k.repeat_interleave(2, 1).mT
    torch.testing.assert_close(scores, wanted.flip(-1))
    torch.testing.assert_close(pattern, wanted.softmax(-1).flip(-1))
    torch.testing.assert_close(z, (pattern @ v.repeat_interleave(2, 1)).bfloat16())


@pytest.mark.parametrize("masked", [False, True])
def test_the_gauge_sees_through_the_steps_what_it_sees_in_the_fused_call(masked: bool) -> None:
    s = Sketch()
    q, k, v = (s.input(name, 2, 2, 5, 4) for name in "qkv")
    k = s.call(aten.add.Tensor, k, s.weight("b", 4))
    mask = {"attn_mask": s.stored("mask", CAUSAL)} if masked else {"is_causal": True}
    before = s.done(s.call(FUSED, q, k, v, **mask))
    for either in (before, exposed(before)):
        add = next(n for n in either.graph.nodes if is_op(n, aten.add.Tensor))
        assert isinstance(dead(add, [2]), Proof)
        assert isinstance(dead(add, [3]), Seen)


# refuses

REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "dropout": (
        [],
        {"dropout_p": 0.1},
        "it drops out entries of the pattern (dropout_p=0.1), drawn inside the kernel",
    ),
    "width": ([(2, 3, 4, "T")], {}, "its scale follows from a head width that is not fixed"),
    "groups": (
        [(2, "T", 4, 4), (2, 1, 4, 4), (2, 1, 4, 4)],
        {"enable_gqa": True},
        "its groups follow from numbers of heads that are not fixed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_reason(case: str) -> None:
    sizes, options, reason = REFUSED[case]
    before = program(*sizes, **options)
    after = exposed(before)
    (refused,) = after.reports[-1].refused
    assert (refused.root, refused.reason) == (fused(before)[0].name, reason)
    assert refused.blame == "%scaled_dot_product_attention  h.0.attn  model.py:7  self.h.0.attn(x)"
    assert graph_text(after.graph) == graph_text(before.graph)


@pytest.mark.parametrize("value", [None, torch.ones(2, dtype=torch.int64), torch.ones(2) * 1j])
def test_a_result_that_is_no_plain_floating_tensor_is_refused(value: Any) -> None:
    before = program()
    fused(before)[0].meta["val"] = value
    (refused,) = exposed(before).reports[-1].refused
    assert refused.reason == "its result is not a plain tensor of floating numbers"


def test_a_width_that_is_not_fixed_needs_a_scale() -> None:
    before = program((2, 3, 4, "T"), scale=0.25)
    assert_equal(before, exposed(before))


# faults

HIDDEN = torch.tensor([[1, 0, 1, 1, 0]] * 2 + [[0] * 5] + [[0, 1, 1, 1, 1]] * 2).bool()
MASKS = (HIDDEN, torch.arange(25.0).reshape(5, 5).sin().masked_fill(~HIDDEN, -INF))
ROOTS = ["scaled_dot_product_attention" + end for end in ("", "_1", "_2")]

WHERE, TRIL, SAFE = aten.where.ScalarOther, aten.tril.default, aten._safe_softmax.default
REPEAT, NOT = aten.repeat_interleave.self_int, aten.logical_not.default
BOOLS, FLOATS = ({"attn_mask": mask} for mask in MASKS)
# The operator that goes wrong, what is made in its place, and how the attention is called.
FAULTS: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "no scale": (aten.mul.Tensor, lambda f, q, scale: q, {}),
    "no mask": (aten.add.Tensor, lambda f, scores, mask: scores, FLOATS),
    "inverted mask": (WHERE, lambda f, mask, *args: f(WHERE, f(NOT, mask), *args), BOOLS),
    "nan rows": (SAFE, lambda f, *args: f(aten.softmax.int, *args), FLOATS),
    "diagonal": (TRIL, lambda f, ones: f(TRIL, ones, 1), {"is_causal": True}),
    "repeat": (REPEAT, lambda f, x, n, dim: f(aten.repeat.default, x, [1, n, 1, 1]), {}),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_attention_is_found_and_blamed_on_it(
    fault: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, instead, options = FAULTS[fault]

    def planted(call: Any, node: fx.Node, env: Any = lambda n: n) -> Lowered:
        def spoiled(target: Any, *args: Any, **kwargs: Any) -> Any:
            here = target is wrong and f"h.{place}.attn" in node.meta["nn_module_stack"]
            return instead(call, *args) if here else call(target, *args, **kwargs)

        return lowered(spoiled, node, env)

    monkeypatch.setattr(module, "lowered", planted)
    before = stack(*[options] * 3)
    with pytest.raises(ContractError) as caught:
        prove(exposed(before))
    first, second, *_ = str(caught.value).splitlines()
    assert first.startswith("expose-attention broke its contract exact: ")
    assert second.strip().startswith(f"at %{ROOTS[place]}  h.{place}.attn  model.py:7")
    assert f"(rewrite {2 - place} of 3)" in second


# again


def test_a_second_run_changes_nothing_and_every_node_is_described() -> None:
    for before in (THREE, program(*GROUPED, enable_gqa=True, dtype=torch.bfloat16)):
        after = exposed(before)
        again = exposed(after)
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(after.graph)
        calls = [n for n in after.graph.nodes if n.op == "call_function"]
        assert all(n.meta.get("val") is not None and native_name(n) for n in calls)
        read = {str(n.target) for n in after.graph.nodes if n.op == "get_attr"}
        sources = {name for f in after.formulas.values() for name in f.sources}
        assert read == set(after.tensors)
        assert set(before.tensors) - read <= sources
