"""Edit places nodes that are complete, refuses what would break a graph, and journals the rest."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import FoldScale, Sketch, every_value
from torch import Tensor, fx

from lensfx.errors import RewriteError
from lensfx.graph import Program, arguments, graph_text, is_weight, native_name
from lensfx.rewrite import Edit, Pipeline

aten = torch.ops.aten
Nodes = dict[str, fx.Node]


def chain() -> tuple[Program, Nodes]:
    """neg(relu(x) * w + 1), a size read of relu, and tanh(relu(x)) as a second output."""
    s = Sketch()
    x, w = s.input("x", "B", 8), s.weight("w", 8)
    r = s.call(aten.relu.default, x, path="act")
    m = s.call(aten.mul.Tensor, r, w, path="scale")
    a = s.call(aten.add.Tensor, m, 1)
    n = s.call(aten.neg.default, a)
    t = s.call(aten.tanh.default, r)
    size = s.call(aten.sym_size.int, r, 0)
    flat = s.call(aten.reshape.default, t, [size, 2, 4])
    program = s.done(n, flat)
    return program, {n.name: n for n in program.graph.nodes}


def opened(program: Program, root: fx.Node, interior: tuple[fx.Node, ...] = ()) -> Edit:
    edit = Edit(program.graph, "some-pass", first=3)
    edit.begin(root, interior)
    return edit


def order(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes]


def refused(program: Program, act: Callable[[], object]) -> str:
    """The headline of the RewriteError that `act` raises without having changed the graph."""
    before = graph_text(program.graph)
    with pytest.raises(RewriteError) as caught:
        act()
    assert graph_text(program.graph) == before
    return caught.value.headline


def test_before_and_after() -> None:
    program, n = chain()
    edit = opened(program, n["mul"])
    edit.before(n["mul"]).call(aten.sin.default, n["relu"])
    at = edit.after(n["mul"])
    first = at.call(aten.cos.default, n["mul"])
    at.call(aten.exp.default, first)
    names = order(program)
    at_mul = names.index("mul")
    assert names[at_mul - 1 : at_mul + 3] == ["sin_default", "mul", "cos_default", "exp_default"]
    program.graph.lint()


def test_a_new_node_is_complete() -> None:
    program, n = chain()
    edit = opened(program, n["mul"])
    at = edit.before(n["mul"])
    product = at.call(aten.mul.Tensor, n["relu"], n["w"])
    again = at.call(aten.mul.Tensor, n["relu"], n["w"])
    weight = at.call(aten.neg.default, n["w"])
    made = at.call(aten.ones.default, [8])
    mixed = at.call(aten.add.Tensor, weight, made)
    number = at.call(aten.sym_size.int, n["x"], 0)
    for node in (product, again, weight, made, mixed, number):
        assert node.meta["nn_module_stack"] == n["mul"].meta["nn_module_stack"]
        assert node.meta["stack_trace"] == n["mul"].meta["stack_trace"]
        assert node.meta["lensfx"] == ("some-pass", 3)
    assert product.meta["val"].shape == n["mul"].meta["val"].shape
    assert [native_name(v) for v in (product, again)] == ["scale.mul_1", "scale.mul_2"]
    natives = [native_name(v) for v in program.graph.nodes if native_name(v)]
    assert len(set(natives)) == len(natives)
    flags = [is_weight(v) for v in (product, weight, made, mixed, number)]
    assert flags == [False, True, True, True, False]
    assert number.meta["val"] == n["x"].meta["val"].shape[0]


def test_a_new_root_node_is_named_by_its_operator() -> None:
    program, n = chain()
    edit = opened(program, n["add"])
    assert native_name(edit.before(n["add"]).call(aten.sin.default, n["mul"])) == "sin"
    assert native_name(edit.before(n["add"]).call(aten.add.Tensor, n["mul"], 2)) == "add_1"


def test_reading_what_is_computed_later() -> None:
    program, n = chain()
    edit = opened(program, n["mul"])
    too_late = "some-pass would read add before it is computed"
    at = edit.before(n["mul"])
    assert refused(program, lambda: at.call(aten.neg.default, n["add"])) == too_late
    own = too_late.replace("add", "mul")
    assert refused(program, lambda: at.call(aten.neg.default, n["mul"])) == own
    behind = edit.after(n["mul"])
    assert refused(program, lambda: behind.call(aten.neg.default, n["add"])) == too_late
    assert refused(program, lambda: behind.call(aten.stack.default, [n["add"]])) == too_late
    assert refused(program, lambda: at.set(n["mul"], other=n["add"])) == too_late


def test_calls_that_cannot_run() -> None:
    program, n = chain()
    at = opened(program, n["mul"]).before(n["mul"])
    said = refused(program, lambda: at.call(aten.mm.default, n["relu"], n["w"]))
    assert said.startswith("some-pass makes a call that cannot run: aten.mm.default: ")
    n["relu"].meta.pop("val")
    said = refused(program, lambda: at.call(aten.neg.default, n["relu"]))
    assert said == "relu has no value to compute shapes from"


def test_an_edit_outside_a_rewrite() -> None:
    program, n = chain()
    edit = Edit(program.graph, "some-pass")
    acts: list[Callable[[], object]] = [
        lambda: edit.before(n["mul"]).call(aten.neg.default, n["relu"]),
        lambda: edit.before(n["mul"]).set(n["mul"], other=n["relu"]),
        lambda: edit.remark("why"),
        edit.commit,
    ]
    for act in acts:
        assert refused(program, act) == "an edit was made outside a rewrite"


def normed() -> tuple[Program, Nodes]:
    s = Sketch()
    x = s.input("x", "B", 8)
    g, b = s.weight("ln.weight", 8), s.weight("ln.bias", 8)
    n = s.call(aten.layer_norm.default, x, [8], g, b, 1e-05, False, path="ln")
    program = s.done(s.call(aten.neg.default, n))
    return program, {n.name: n for n in program.graph.nodes}


def test_set_keeps_the_node_and_leaves_trailing_defaults_out() -> None:
    program, n = normed()
    norm = n["layer_norm"]
    edit = opened(program, norm)
    at = edit.before(norm)
    at.set(norm, bias=None)
    assert norm.args == (n["x"], [8], n["ln_weight"], None, 1e-05, False)
    at.set(norm, cudnn_enable=True)
    assert norm.args == (n["x"], [8], n["ln_weight"])
    at.set(norm, weight=None, eps=1e-3)
    assert norm.args == (n["x"], [8], None, None, 1e-3)
    assert arguments(norm)["cudnn_enable"] is True
    assert (norm.name, native_name(norm)) == ("layer_norm", "ln.layer_norm")
    edit.commit()
    assert {"ln_weight", "ln_bias"}.isdisjoint(order(program))


def test_set_keyword_only_arguments() -> None:
    program, n = chain()
    at = opened(program, n["add"]).before(n["add"])
    at.set(n["add"], alpha=2)
    assert (n["add"].args, n["add"].kwargs) == ((n["mul"], 1), {"alpha": 2})
    at.set(n["add"], alpha=1, other=n["relu"])
    assert (n["add"].args, n["add"].kwargs) == ((n["mul"], n["relu"]), {})


def test_set_keeps_the_weight_flag_current() -> None:
    s = Sketch()
    x, w = s.input("x", 8), s.weight("w", 8)
    negated = s.call(aten.neg.default, w)
    program = s.done(s.call(aten.mul.Tensor, x, negated))
    at = opened(program, negated).before(negated)
    assert is_weight(negated)
    at.set(negated, self=x)
    assert not is_weight(negated)
    at.set(negated, self=w)
    assert is_weight(negated)


def test_set_refuses() -> None:
    program, n = chain()
    at = opened(program, n["mul"]).before(n["mul"])
    said = refused(program, lambda: at.set(n["mul"], self=n["w"]))
    assert said == (
        f"some-pass would change mul from torch.float32 {tuple(n['mul'].meta['val'].shape)} "
        "to torch.float32 (8,)"
    )
    size = at.call(aten.sym_size.int, n["x"], 0)
    wide = at.call(aten.to.dtype, n["relu"], torch.float64)
    assert "to torch.float64" in refused(program, lambda: at.set(n["mul"], self=wide))
    unknown = refused(program, lambda: at.set(n["mul"], scale=2))
    assert unknown == "aten.mul.Tensor has no argument ['scale']"
    said = refused(program, lambda: at.set(n["mul"], self=size, other=[1]))
    assert "cannot run" in said


def test_replace_and_redirect() -> None:
    program, n = chain()
    edit = opened(program, n["mul"])
    at = edit.before(n["mul"])
    product = at.call(aten.mul.Tensor, n["w"], n["relu"])
    at.replace(n["mul"], product)
    assert n["add"].args[0] is product
    at.redirect(n["tanh"], n["relu"], product)
    assert n["tanh"].args[0] is product
    entry = edit.commit()
    assert "mul" not in order(program)
    assert entry.sites == (("mul", "mul_tensor"), ("tanh", "tanh"))
    for old, new in (("relu", "w"), ("add", "w")):
        edit.begin(n["add"])
        acts: list[Callable[[], None]] = [
            lambda old=old, new=new: at.replace(n[old], n[new]),
            lambda old=old, new=new: at.redirect(n["neg"], n[old], n[new]),
        ]
        for act in acts:
            assert refused(program, act).startswith(f"some-pass would change {old} from")


def test_a_replacement_may_read_what_it_replaces() -> None:
    program, n = chain()
    edit = opened(program, n["relu"])
    at = edit.after(n["relu"])
    at.replace(n["relu"], at.call(aten.neg.default, n["relu"]))
    entry = edit.commit()
    program.graph.lint()
    assert [u.name for u in n["relu"].users] == ["neg_default"]
    assert {u.name for u in program.graph.nodes if n["relu"] in u.all_input_nodes} == {
        "neg_default"
    }
    assert (entry.added, entry.removed) == (1, 0)


def test_what_nobody_reads_any_more_goes_and_nothing_else() -> None:
    program, n = chain()
    dead = program.graph.create_node("call_function", aten.sin.default, (n["x"],), name="dead")
    n["neg"].append(dead)
    edit = opened(program, n["neg"])
    at = edit.before(n["neg"])
    at.set(n["neg"], self=n["relu"])
    entry = edit.commit()
    # w, mul and add fed only neg; relu is still read, and dead was nothing to this rewrite.
    assert {"w", "mul", "add"}.isdisjoint(order(program))
    assert {"x", "relu", "dead"} <= set(order(program))
    assert (entry.added, entry.removed) == (0, 3)


def test_what_has_an_effect_stays() -> None:
    s = Sketch()
    x = s.input("x", 2)
    noise = s.call(aten.bernoulli.p, x, 0.5)
    out = s.call(aten.neg.default, noise)
    program = s.done(out)
    edit = opened(program, out)
    edit.before(out).set(out, self=x)
    assert edit.commit().removed == 0
    assert "bernoulli" in order(program)


def test_the_journal_entry() -> None:
    program, n = chain()
    edit = opened(program, n["mul"])
    at = edit.before(n["mul"])
    at.set(n["mul"], self=at.call(aten.neg.default, n["relu"]))
    edit.remark("because", shifted=[1])
    entry = edit.commit()
    assert edit.journal == [entry]
    assert (entry.index, entry.pass_name, entry.root, entry.path) == (
        3,
        "some-pass",
        "mul",
        "scale",
    )
    assert entry.line == "model.py:7  self.scale(x)"
    assert (entry.sites, entry.added, entry.removed) == ((("mul", "mul"),), 1, 0)
    assert (entry.note, entry.shifted) == ("because", (1,))
    assert str(entry) == "%mul  scale  model.py:7  self.scale(x)  because"
    edit.begin(n["neg"])
    assert edit.before(n["neg"]).call(aten.sin.default, n["add"]).meta["lensfx"][1] == 4
    assert edit.commit().index == 4


def test_sites_are_what_untouched_nodes_read() -> None:
    program, n = chain()
    edit = opened(program, n["add"])
    at = edit.before(n["mul"])
    at.set(n["mul"], other=at.call(aten.neg.default, n["w"]))
    edit.before(n["add"]).set(n["add"], alpha=-1)
    # mul has one reader, add, which this rewrite changes too: only add is claimed to be kept.
    assert edit.commit().sites == (("add", "add"),)
    program, n = chain()
    edit = opened(program, n["relu"], interior=(n["relu"],))
    at = edit.before(n["relu"])
    at.set(n["relu"], self=at.call(aten.relu.default, n["x"]))
    assert edit.commit().sites == ()


def shared_norm(reshape: bool) -> Program:
    s, dtype = Sketch(), torch.float64
    x = s.input("x", "B", "T", 8, dtype=dtype)
    g, b = (s.weight(f"ln.{k}", 8, dtype=dtype) for k in ("weight", "bias"))
    q, k = (s.weight(f"{p}.weight", 6, 8, dtype=dtype) for p in "qk")
    c = s.weight("k.bias", 6, dtype=dtype)
    n = s.call(aten.layer_norm.default, x, [8], g, b, path="ln")
    view = s.call(aten.reshape.default, n, [-1, 8]) if reshape else n
    first = s.call(aten.linear.default, n, q, path="q")
    second = s.call(aten.linear.default, view, k, c, path="k")
    return s.done(s.call(aten.relu.default, first), s.call(aten.tanh.default, second))


@pytest.mark.parametrize("reshape", [False, True])
def test_every_claimed_site_holds(reshape: bool) -> None:
    before = shared_norm(reshape)
    after = Pipeline([FoldScale()]).rewrite(before)
    (entry,) = after.journal
    assert set(entry.sites) == {("linear", "linear"), ("linear_1", "linear_1")}
    old, new = every_value(before), every_value(after)
    for a, b in entry.sites:
        torch.testing.assert_close(old[a], new[b], rtol=1e-12, atol=1e-12)
    views = ("layer_norm", *(["reshape"] if reshape else []))
    for inside in views:
        assert not torch.allclose(old[inside], new[inside])


def test_fake_values_are_made_once_for_a_shape() -> None:
    runs: list[Tensor] = []

    def doubled(x: Tensor) -> Tensor:
        runs.append(x)
        return x * 2

    s = Sketch()
    a, b, c = s.input("a", "B", 8), s.input("b", "T", 8), s.input("c", "T", 8)
    pairs = [s.call(aten.neg.default, v) for v in (a, b, c, b)]
    program = s.done(*pairs)
    edit = opened(program, pairs[-1])
    made = [edit.after(pairs[-1]).call(doubled, v) for v in pairs]
    assert [v.meta["val"].shape for v in made] == [v.meta["val"].shape for v in pairs]
    # Three different symbols; the second read of b has the shape that was seen before.
    assert len(runs) == 3
    edit.after(pairs[-1]).call(doubled, pairs[0])
    assert len(runs) == 3


def test_fake_values_tell_literals_dtypes_and_strides_apart() -> None:
    s = Sketch()
    x, wide = s.input("x", 4, 4), s.input("wide", 4, 4, dtype=torch.float64)
    t = s.call(aten.t.default, x)
    program = s.done(t)
    at = opened(program, t).after(t)
    calls: list[tuple[Any, ...]] = [
        (aten.reshape.default, x, [2, 8]),
        (aten.reshape.default, x, [8, 2]),
        (aten.to.dtype, x, torch.float64),
        (aten.to.dtype, x, torch.bool),
        (aten.sum.dim_IntList, x, [0], True),
        (aten.sum.dim_IntList, x, [0], False),
        (aten.clone.default, x),
        (aten.clone.default, t),
        (aten.neg.default, x),
        (aten.neg.default, wide),
        (aten.mul.Tensor, x, 2),
        (aten.add.Tensor, x, True),
    ]
    held = {x: torch.zeros(4, 4), wide: torch.zeros(4, 4).double(), t: torch.zeros(4, 4).t()}
    for target, *args in calls:
        val = at.call(target, *args).meta["val"]
        real = [held[v] if isinstance(v, fx.Node) else v for v in args]
        expected = target(*real)
        assert (tuple(val.shape), val.dtype, val.stride()) == (
            tuple(expected.shape),
            expected.dtype,
            expected.stride(),
        )


def test_set_refuses_another_shape_of_several_results() -> None:
    s = Sketch()
    x = s.input("x", 4, 4)
    parts = s.call(aten.split.Tensor, x, 2)
    program = s.done(s.call(operator.getitem, parts, 0), s.call(operator.getitem, parts, 1))
    at = opened(program, parts).before(parts)
    refused(program, lambda: at.set(parts, split_size=1))


def test_weight_flags_follow_through_the_readers() -> None:
    s = Sketch()
    x, w = s.input("x", 8), s.weight("w", 8)
    first = s.call(aten.neg.default, w)
    second = s.call(aten.exp.default, first)
    program = s.done(s.call(aten.mul.Tensor, x, second))
    at = opened(program, first).before(first)
    at.set(first, self=x)
    assert not is_weight(second)


def test_a_call_that_needs_two_dynamic_sizes_equal_is_refused() -> None:
    s = Sketch()
    a, b = s.input("a", "T", 4), s.input("b", "T", 4)
    out = s.call(aten.neg.default, a)
    program = s.done(out, s.call(aten.neg.default, b))
    at = opened(program, out).before(out)
    with pytest.raises(RewriteError, match="two sizes that may differ would have to be equal"):
        at.call(aten.add.Tensor, a, b)
