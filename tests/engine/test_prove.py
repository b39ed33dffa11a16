"""prove and check: right rewrites pass on every model, wrong ones do not, and are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import FoldScale, Once, Sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES
from torch import Tensor, fx, nn

from lensfx import ContractError, Lens, LensError, Pipeline, Program, capture
from lensfx.graph import graph_text, native_name
from lensfx.rewrite import Any as AnyNode
from lensfx.rewrite import Edit, Match, Op
from lensfx.verify import Exact, Observes, UpToLogitShift, check, hard_inputs, prove
from lensfx.verify.inputs import scenarios

aten = torch.ops.aten
# Importing x-transformers makes torch warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


# whole models: no false alarm, nothing lost


@dataclass(frozen=True)
class Whole:
    model: nn.Module
    captured: Program
    program: Program


@pytest.fixture(scope="module", params=CASES)
def whole(request: pytest.FixtureRequest) -> Whole:
    case = CASES[request.param]
    args, kwargs = case.inputs(2, 7, 0)
    model = case.build()
    captured = capture(model, *args, **kwargs)
    return Whole(model, captured, Pipeline.default().run(captured))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_passes_are_proved_on_every_model(whole: Whole, seed: int) -> None:
    proved = prove(whole.program, seed)
    fired = [r.name for r in whole.program.reports if r.fired]
    assert [p.name for p in proved.passes] == fired
    assert proved.worst <= 1e-12
    assert proved.drift <= 4
    assert proved.folded <= 1
    assert all(p.calls >= 4 for p in proved.passes)
    looked = [p for p in proved.passes if p.name == "insert-hooks"]
    assert all(p.site_error == p.output_error == 0.0 for p in looked)


def test_a_lens_is_its_model_up_to_a_shift_of_the_logits(whole: Whole) -> None:
    moved = [k for e in whole.program.journal for k in e.shifted]
    compared = check(whole.model, Lens(whole.program), up_to=UpToLogitShift(tuple(moved)))
    assert compared.error <= 1e-12
    if moved:
        assert not check(whole.model, Lens(whole.program))


def test_a_second_run_changes_nothing(whole: Whole) -> None:
    for entry in Pipeline.default().passes:
        again = Pipeline([entry]).rewrite(replace(whole.program, reports=()))
        assert again.reports[-1].fired == ()
        assert graph_text(again.graph) == graph_text(whole.program.graph)


def test_every_node_is_described_and_no_parameter_is_lost(whole: Whole) -> None:
    program = whole.program
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    names = [native_name(n) for n in calls if isinstance(n.meta["val"], Tensor)]
    assert all(names)
    assert len(set(names)) == len(names)
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert read == set(program.tensors)
    used = {s for f in program.formulas.values() for s in f.sources}
    assert set(whole.captured.tensors) <= read | used
    known = {*read, *used, *program.source.unread, *program.source.aliases}
    assert {name for name, _ in whole.model.named_parameters(remove_duplicate=False)} <= known
    for name, tensor in whole.captured.tensors.items():
        assert name in program.formulas or name not in read or program.tensors[name] is tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["nanogpt", "llamalike_offset", "xt_decoder"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    args, kwargs = case.inputs(2, 7, 0)
    model = case.build().to(dtype)
    program = Pipeline.default().run(capture(model, *args, **kwargs))
    proved = prove(program)
    assert proved.worst <= 1e-12
    assert proved.drift <= 4
    assert check(model, Lens(program), up_to=UpToLogitShift()).error <= 1e-12


# the proof


def branch(s: Sketch, x: fx.Node, i: int = 0) -> fx.Node:
    n = s.call(
        aten.layer_norm.default, x, [8], s.weight(f"{i}.g", 8), s.weight(f"{i}.s", 8), path=f"ln{i}"
    )
    return s.call(aten.linear.default, n, s.weight(f"{i}.W", 8, 8), path=f"q{i}")


def small(sites: int = 3, *sizes: int | str) -> Program:
    s = Sketch()
    x = s.input("x", *(sizes or ("B", "T")), 8)
    for i in range(sites):
        x = s.call(aten.add.Tensor, x, branch(s, x, i))
    return s.done(x)


TANH = Op("tanh", (aten.tanh.default,), {"self": AnyNode("x")})


def scale_by(*factors: float) -> Once:
    """A pass that multiplies the n-th tanh from the front by the n-th factor."""

    def rewrite(m: Match, edit: Edit) -> None:
        number = int(m.tanh.name.rpartition("_")[2] or 0) if "_" in m.tanh.name else 0
        at = edit.after(m.tanh)
        told = [n for n in m.tanh.users]
        scaled = at.call(aten.mul.Tensor, m.tanh, factors[number])
        for reader in told:
            at.redirect(reader, m.tanh, scaled)

    return Once(pattern=TANH, rewrite=rewrite)


@dataclass(frozen=True)
class Scale(Once):
    contract = Exact()


def scaled(*factors: float) -> Program:
    s = Sketch()
    x = s.input("x", "B", 8)
    for i in range(len(factors)):
        x = s.call(aten.tanh.default, x, path=f"t{i}")
    once = scale_by(*factors)
    entry = Scale(pattern=once.pattern, rewrite=once.rewrite)
    return Pipeline([entry]).rewrite(s.done(s.call(aten.add.Tensor, x, x)))


@settings(max_examples=15)
@given(count=st.integers(1, 7), guilty=st.integers(0, 6))
def test_one_wrong_rewrite_of_many_is_found_by_bisection(count: int, guilty: int) -> None:
    factors = [1.0] * count
    factors[guilty % count] = 1 + 1e-9
    with pytest.raises(ContractError) as caught:
        prove(scaled(*factors))
    first, second, third, fourth = str(caught.value).splitlines()
    assert first.startswith("scale broke its contract exact: %")
    assert first.endswith("relative in float64 (bound 1e-12)")
    assert second.strip().startswith(f"at %tanh{f'_{guilty % count}' if guilty % count else ''}  t")
    assert second.endswith(f"(rewrite {count - 1 - guilty % count} of {count})")
    assert third.strip().startswith("at first differing value: %")
    assert third.endswith("under own weights, call 0")
    assert fourth.strip().startswith("try: save the smallest graph that shows it: error.save(")


def test_rounding_is_no_fault_and_just_above_the_bound_is() -> None:
    assert prove(scaled(1 + 2e-16, 1.0)).worst <= 1e-15
    with pytest.raises(ContractError):
        prove(scaled(1 + 1e-11, 1.0))


@dataclass(frozen=True)
class Fold(FoldScale):
    contract = Exact()


def test_the_figures() -> None:
    program = Pipeline([Fold()]).run(small())
    proved = prove(program)
    (entry,) = proved.passes
    assert (entry.name, entry.contract, entry.rewrites) == ("fold", Exact(), 3)
    # As in the example, each size at 1, the example itself; then the moved weights.
    assert entry.calls == 5
    assert 0 < max(entry.site_error, entry.output_error) == proved.worst < 1e-14
    assert 0 < proved.folded <= 0.5
    assert 0.2 < proved.drift < 5
    assert prove(program) == proved
    assert prove(program.unfolded or program).worst == proved.worst


def test_a_program_that_no_pass_changed_needs_no_proof() -> None:
    program = small()
    nothing = prove(program)
    assert (nothing.passes, nothing.drift, nothing.folded, nothing.worst) == ((), 1.0, 0.0, 0.0)


def test_weights_of_less_precision_are_found() -> None:
    program = Pipeline(Pipeline.default().passes[-1:]).run(lookup())
    assert prove(program).drift == 1.0
    rounded = {k: t.detach().bfloat16().float() for k, t in program.tensors.items()}
    with pytest.raises(ContractError, match="times the rounding noise of the model's own"):
        prove(replace(program, tensors=rounded))


def test_drift_is_measured_beside_infinite_logits() -> None:
    s = Sketch()
    x = branch(s, s.input("x", "B", 8))
    mask = s.call(aten.gt.Scalar, s.weight("mask", 8), 0.0)
    before = s.done(s.call(aten.masked_fill.Scalar, x, mask, float("-inf")))
    assert prove(Pipeline([Fold()]).run(before)).drift < 5


def test_a_folded_weight_that_is_not_its_formula_is_a_fault() -> None:
    program = Pipeline([Fold()]).run(small())
    wrong = {**program.tensors, "1.W": program.tensors["1.W"].detach() * (1 + 1e-6)}
    with pytest.raises(ContractError) as caught:
        prove(replace(program, tensors=wrong))
    assert "the folded parameter 1.W is" in str(caught.value)
    assert "at 1.W = mul(1.W, 1.g)" in str(caught.value)


def test_a_rewrite_that_cannot_be_run_is_blamed() -> None:
    def fixed(m: Match, edit: Edit) -> None:
        at = edit.before(m.tanh)
        ones = at.call(aten.ones.default, [3, 8])
        at.replace(m.tanh, at.call(aten.mul.Tensor, at.call(aten.tanh.default, m.x), ones))

    s = Sketch()
    before = s.done(s.call(aten.tanh.default, s.input("x", 3, 8), path="t"))
    after = Pipeline([Scale(pattern=TANH, rewrite=fixed)]).rewrite(before)
    assert prove(after).worst == 0.0
    loose = replace(after, stages=(after.stages[0], _without_ones(after)))
    with pytest.raises(ContractError, match=r"(?s)it cannot be run: .*") as caught:
        prove(loose)
    assert "at %tanh  t" in str(caught.value)


def _without_ones(after: Program) -> Any:
    graph = fx.Graph()
    graph.graph_copy(after.stages[1].graph, {})
    copied = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in after.stages[1].graph.nodes:
        env[n] = copied.node_copy(n, lambda m: env[m])
        if n.target is aten.ones.default:
            env[n].args = ([4, 8],)
    return replace(after.stages[1], graph=copied)


def test_the_second_pass_is_blamed_with_its_place_in_the_whole_journal() -> None:
    wrong = scale_by(1 + 1e-6)
    s = Sketch()
    x = s.call(aten.tanh.default, branch(s, s.input("x", "B", 8)), path="t")
    passes = [Fold(), Scale(pattern=wrong.pattern, rewrite=wrong.rewrite)]
    program = Pipeline(passes).run(s.done(s.call(aten.neg.default, x)))
    with pytest.raises(ContractError, match=r"(?s)^scale broke .*%tanh  t .*\(rewrite 1 of 2\)"):
        prove(program)


def test_proving_writes_to_nothing() -> None:
    program = Pipeline([Fold()]).run(small())
    kept = {k: (t, t.detach().clone()) for k, t in program.tensors.items()}
    state = torch.get_rng_state()
    prove(program)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(program.tensors[k] is t and torch.equal(t, c) for k, (t, c) in kept.items())


# what it is tried on


def lookup(shift: int = 0, rows: int = 11) -> Program:
    s = Sketch()
    ids = s.input("ids", "B", "T", dtype=torch.int64)
    moved = s.call(aten.add.Tensor, ids, shift) if shift else ids
    return s.done(s.call(aten.embedding.default, s.weight("W", rows, 8), moved))


def test_hard_inputs_are_small_and_go_down_to_one() -> None:
    program = lookup()
    calls = [t for (t,) in hard_inputs(program)]
    assert [tuple(t.shape) for t in calls] == [(3, 5), (1, 5), (3, 1), (3, 5)]
    assert all(0 <= int(t.min()) and int(t.max()) < 11 for t in calls)
    assert max(int(t.max()) for t in calls) > 5
    # The last row of a batch is one token all along.
    assert all(len(set(t[-1].tolist())) == 1 for t in calls if len(t) > 1)
    assert torch.equal(calls[0], hard_inputs(program)[0][0])
    assert not torch.equal(calls[0], hard_inputs(program, 1)[0][0])


def test_inputs_that_belong_together_go_down_to_one_together() -> None:
    s = Sketch()
    ids, mask = (s.input(name, "B", "T", dtype=torch.int64) for name in ("ids", "mask"))
    x = s.call(aten.embedding.default, s.weight("W", 11, 8), ids)
    program = s.done(s.call(aten.mul.Tensor, x, s.call(aten.unsqueeze.default, mask, -1)))
    tied = [f"t[0].shape[{i}] == t[1].shape[{i}]" for i in range(2)]
    program = replace(program, guards=program.guards.with_relations(tied))
    shapes = [{tuple(t.shape) for t in call} for call in hard_inputs(program)]
    assert shapes == [{(3, 5)}, {(1, 5)}, {(3, 1)}, {(3, 5)}]


def test_ids_that_are_computed_from_an_input_are_taken_from_the_example() -> None:
    program = lookup(shift=6)
    for (ids,) in hard_inputs(program):
        assert set(ids.flatten().tolist()) <= set(program.example[0].flatten().tolist())
    assert prove(Pipeline.default().run(program)).worst <= 1e-12


def test_other_inputs_follow_the_example() -> None:
    s = Sketch()
    x = s.input("x", "B", 8)
    mask = s.input("mask", "B", dtype=torch.int64)
    kept = s.call(aten.mul.Tensor, x, s.call(aten.unsqueeze.default, mask, -1))
    program = s.done(kept)
    program = replace(program, example=(1000 * program.example[0], program.example[1]))
    for drawn, chosen in hard_inputs(program):
        assert 100 < float(drawn.std()) < 10000
        assert set(chosen.tolist()) <= set(program.example[1].tolist())


def test_scenarios_move_the_weights_and_scale_the_tables() -> None:
    program = lookup()
    found = list(scenarios(program))
    assert [s.name for s in found] == [
        *(f"own weights, call {i}" for i in range(4)),
        "moved weights",
        "tiny embeddings",
        "an outlier channel",
    ]
    own, moved, tiny, outlier = (found[i].weights["W"] for i in (0, 4, 5, 6))
    assert own.dtype is torch.float64
    assert not torch.equal(own, moved)
    torch.testing.assert_close(tiny, moved * 1e-3)
    torch.testing.assert_close(outlier[:, 1:], moved[:, 1:])
    torch.testing.assert_close(outlier[:, 0], moved[:, 0] * 500)
    assert own.abs().max() == program.tensors["W"].detach().double().abs().max()


def test_tied_weights_move_together() -> None:
    s = Sketch()
    ids = s.input("ids", "B", dtype=torch.int64)
    x = s.call(aten.embedding.default, s.weight("embed", 11, 8), ids)
    y = s.call(aten.linear.default, x, s.weight("head", 11, 8, like="embed"))
    found = {scenario.name: scenario.weights for scenario in scenarios(s.done(y))}
    moved = found["moved weights"]
    assert torch.equal(moved["embed"], moved["head"])


# check


def double(x: Tensor) -> Tensor:
    return x + x


class Twice(nn.Module):
    def forward(self, x: Tensor, by: float = 2.0) -> Tensor:
        return x * by


IDS = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    "inputs",
    [[IDS], [(IDS,)], [{"x": IDS}], [((IDS,), {})], [((), {"x": IDS})], [IDS, (IDS[:1],)]],
)
def test_two_callables_with_inputs_in_any_form(inputs: list[Any]) -> None:
    assert check(double, Twice(), inputs=[i for i in inputs if not isinstance(i, dict)] or [IDS])
    compared = check(Twice(), Twice(), inputs=inputs)
    assert compared
    assert (compared.error, compared.equivalent) == (0.0, True)
    compared.raise_if_different()


def test_keywords_and_positions_go_together() -> None:
    assert check(Twice(), lambda x, by: x + by * x - x, inputs=[((IDS,), {"by": 3.0})])


def test_it_says_where_two_functions_differ() -> None:
    def wrong(x: Tensor) -> dict[str, Tensor]:
        return {"same": x, "off": x + (x == 4) * 1e-6}

    compared = check(lambda x: {"same": x, "off": x}, wrong, inputs=[IDS[:1], IDS])
    assert not compared
    assert (compared.output, compared.call) == ("output['off']", 1)
    assert compared.difference.index == (1, 1)
    with pytest.raises(ContractError) as caught:
        compared.raise_if_different()
    assert str(caught.value).splitlines() == [
        "not equivalent under exact: output['off'] differs by 1.4e-07 relative (bound 1e-12)",
        "  at call 1, output['off'][1, 1]   before 4   after 4   (1.4e-07 relative)",
        "  try: compare intermediate values with run_with_cache on both",
    ]


def test_another_shape_is_a_difference_with_words() -> None:
    compared = check(double, lambda x: double(x)[:1], inputs=[IDS])
    with pytest.raises(ContractError, match=r"output  shape \[2, 3\] became \[1, 3\]"):
        compared.raise_if_different()


def test_float64_tells_a_rounding_from_a_fault() -> None:
    def rounded(x: Tensor) -> Tensor:
        return (x.bfloat16() + x.half()).float()

    assert check(double, rounded, inputs=[IDS + 0.1])
    assert not check(double, lambda x: x * 2.0000001, inputs=[IDS])
    assert not check(F.gelu, lambda x: F.gelu(x, approximate="tanh"), inputs=[IDS])


def test_results_in_another_order_of_keys() -> None:
    left = check(lambda x: {"a": x, "b": -x}, lambda x: {"b": -x, "a": x}, inputs=[IDS])
    assert left


SHIFT = UpToLogitShift()


def test_a_shift_of_all_logits_and_nothing_else() -> None:
    rows = torch.tensor([[3.0], [-1e3]])
    assert check(double, lambda x: double(x) + rows, up_to=SHIFT, inputs=[IDS])
    assert not check(double, lambda x: double(x) + rows, inputs=[IDS])
    for wrong in (lambda x: double(x) + rows.T.repeat(1, 2)[:, :3], lambda x: double(x) * 1.001):
        assert not check(double, wrong, up_to=SHIFT, inputs=[IDS])


@pytest.mark.parametrize("named", [0, "logits", (0,), ("logits",)])
def test_a_shift_of_one_output_only(named: Any) -> None:
    def both(x: Tensor) -> dict[str, Tensor]:
        return {"logits": x, "hidden": x}

    only = UpToLogitShift(output=named)
    assert check(both, lambda x: {"logits": x + 1, "hidden": x}, up_to=only, inputs=[IDS])
    assert not check(both, lambda x: {"logits": x, "hidden": x + 1}, up_to=only, inputs=[IDS])


def test_observing_is_bitwise() -> None:
    look = Observes()
    assert check(double, lambda x: x * 2, up_to=look, inputs=[IDS])
    assert check(double, lambda x: x * 0.2 * 10, inputs=[IDS])
    assert not check(double, lambda x: x * 0.2 * 10, up_to=look, inputs=[IDS + 0.1])
    assert not check(torch.neg, lambda x: 0 - x, up_to=look, inputs=[torch.zeros(2)])


def test_a_program_with_float_inputs_knows_how_it_is_called() -> None:
    before = small()
    after = Pipeline([Fold()]).run(before)
    for left, right in ((before, Lens(after)), (after, before), (Lens(before), after)):
        assert check(left, right).error <= 1e-12
    other = small(2)
    assert not check(before, other)


@pytest.mark.parametrize(
    ("left", "right", "inputs", "words"),
    [
        (double, double, None, "neither side says how it is called"),
        (double, double, [], "inputs is empty, so nothing would be compared"),
        (double, lambda x: (x, x), [IDS], "one side returns 1 tensors, the other 2"),
        (lambda x: 1, lambda x: 2, [IDS], "neither side returned a tensor"),
        (lambda x: x[9], double, [IDS], "the reference cannot be run on call 0: IndexError"),
        (double, lambda x: x @ x, [IDS], "the candidate cannot be run on call 0: RuntimeError"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    left: Callable[..., Any], right: Callable[..., Any], inputs: Any, words: str
) -> None:
    with pytest.raises(LensError, match=words):
        check(left, right, inputs=inputs)


def test_checking_leaves_inputs_and_modules_as_they_were() -> None:
    kept = IDS.clone()
    check(lambda x: x.mul_(2), double, inputs=[IDS])
    assert torch.equal(IDS, kept)
