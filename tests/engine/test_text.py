"""The text of a graph is the same for the same computation and another for another."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import FoldScale, Sketch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lensfx.capture import capture
from lensfx.graph import Program, copy_graph, graph_diff, graph_text, hook_point
from lensfx.graph.text import expression_text
from lensfx.rewrite import Pipeline

aten = torch.ops.aten
Golden = Callable[[str, str], None]


class Block(nn.Module):
    """A bit of everything a text has to show: modules, sizes, literals, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.ln = nn.LayerNorm(8)
        self.q = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        n = self.ln(self.emb(idx))
        q = self.q(n).unflatten(-1, (2, 4)).transpose(1, 2)
        pattern = torch.softmax(q @ q.mT / 2.0, -1)
        return self.head(n), (pattern @ q).flatten(0, 1)


def captured() -> Program:
    torch.manual_seed(0)
    return capture(Block(), torch.randint(0, 11, (2, 5)))


def test_captured_and_folded_as_whole_texts(golden: Golden) -> None:
    before = captured()
    after = Pipeline([FoldScale()]).rewrite(before)
    # The linear reads the norm and so does the tied head.
    assert len(after.journal) == 1
    golden("block", graph_text(before.graph))
    golden("block_rewritten", graph_text(after.graph))
    golden("block_folded", graph_text(Pipeline([FoldScale()]).run(before).graph))


def test_the_golden_fixture_can_fail(golden: Golden, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--update-golden"):
        pytest.skip("every text is right while the files are being written")
    with pytest.raises(pytest.fail.Exception, match=r"absent\.txt differs"):
        golden("absent", "anything")


def renamed(graph: fx.Graph, prefix: str) -> fx.Graph:
    new, mapping = fx.Graph(), {}
    for i, node in enumerate(graph.nodes):
        twin = new.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, mapping.__getitem__),
            fx.node.map_arg(node.kwargs, mapping.__getitem__),
            name=f"{prefix}{i}",
        )
        twin.meta = dict(node.meta)
        mapping[node] = twin
    return new


def test_node_names_do_not_show() -> None:
    graph = captured().graph
    assert graph_text(renamed(graph, "other")) == graph_text(graph)
    copy, mapping = copy_graph(graph)
    assert graph_text(copy) == graph_text(graph)
    assert [n.name for n in copy.nodes] == [n.name for n in graph.nodes]
    assert all(mapping[n].meta is not n.meta for n in graph.nodes)


def flattened(*names: str) -> str:
    s = Sketch()
    inputs = [s.input(name, "B", "T", 8) for name in names]
    flat = [s.call(aten.reshape.default, x, [-1, 8]) for x in inputs]
    text = graph_text(s.done(*flat).graph)
    for i, name in enumerate(names):
        text = text.replace(f"input {name}", f"input {i}")
    return text


def test_size_symbols_do_not_show() -> None:
    texts = {flattened(a, b) for a in "abcd" for b in "wxyz"}
    assert len(texts) == 1
    assert "# f32[(n0*n1),8]" in texts.pop()


def line(target: Any, *args: Any, **kwargs: Any) -> str:
    """The line of one call on x: [2, 8], named by `"x"` among the arguments."""
    s = Sketch()
    x = s.input("x", 2, 8)

    def real(value: Any) -> Any:
        if isinstance(value, list):
            return [real(v) for v in value]
        return x if isinstance(value, str) and value == "x" else value

    s.done(s.call(target, *map(real, args), **kwargs))
    return graph_text(s.graph).splitlines()[1].partition(" = ")[2]


def test_arguments_by_name_without_defaults() -> None:
    assert line(aten.relu.default, "x") == "relu(%0)  # f32[2,8]"
    norm = "layer_norm(%0, normalized_shape=[8])  # f32[2,8]"
    assert line(aten.layer_norm.default, "x", [8]) == norm
    assert line(aten.layer_norm.default, "x", [8], None, None, 1e-05, True) == norm
    shown = "layer_norm(%0, normalized_shape=[8], eps=0.001, cudnn_enable=False)  # f32[2,8]"
    assert line(aten.layer_norm.default, "x", [8], None, None, 0.001, False) == shown
    assert line(aten.add.Tensor, "x", 2, alpha=1) == "add(%0, other=2)  # f32[2,8]"
    assert line(aten.add.Tensor, "x", "x", alpha=3) == "add(%0, other=%0, alpha=3)  # f32[2,8]"
    assert line(aten.pow.Scalar, 2, "x") == "pow(self=2, exponent=%0)  # f32[2,8]"
    assert line(aten.cat.default, ["x", "x"], -1) == "cat(tensors=[%0, %0], dim=-1)  # f32[2,16]"
    assert line(aten.to.dtype, "x", torch.bool) == "to(%0, dtype=torch.bool)  # bool[2,8]"
    assert line(aten.mean.dim, "x", [0], True) == "mean(%0, dim=[0], keepdim=True)  # f32[1,8]"
    assert line(hook_point, "x", "resid") == "hook_point(%0, 'resid')  # f32[2,8]"
    assert line(hook_point, "x", name="a") == "hook_point(%0, name='a')  # f32[2,8]"
    assert line(aten.split.Tensor, "x", 1) == "split(%0, split_size=1)"


def test_a_default_of_another_type_is_shown() -> None:
    assert line(aten.add.Tensor, "x", 2, alpha=True) != line(aten.add.Tensor, "x", 2)
    assert line(aten.sum.dim_IntList, "x", None) == "sum(%0, dim=None)  # f32[]"


def test_other_outputs_and_other_weights_are_other_texts() -> None:
    def program(order: tuple[int, int], name: str = "w", path: str = "") -> str:
        s = Sketch()
        x, w = s.input("x", 2, 8), s.weight(name, 8)
        made = [s.call(aten.mul.Tensor, x, w, path=path), s.call(aten.relu.default, x)]
        return graph_text(s.done(*(made[i] for i in order)).graph)

    texts = [program((0, 1)), program((1, 0)), program((0, 0)), program((0, 1), "v")]
    texts.append(program((0, 1), path="scale"))
    assert len(set(texts)) == len(texts)
    assert texts[4].endswith("relu(%0)  # f32[2,8]\nreturn [%2, %3]")
    assert "# f32[2,8]  scale" in texts[4]


CALLS: tuple[tuple[Any, ...], ...] = (
    (aten.relu.default,),
    (aten.neg.default,),
    (aten.add.Tensor, 1),
    (aten.add.Tensor, 1.0),
    (aten.add.Tensor, True),
    (aten.mul.Tensor, 2),
    (aten.sub.Tensor, 2),
    (aten.clamp.default, 0.0),
    (aten.clamp.default, None, 0.0),
    (aten.transpose.int, 0, 1),
    (aten.to.dtype, torch.float64),
)
PROGRAMS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(CALLS)), min_size=1, max_size=4)


def drawn(calls: list[tuple[int, tuple[Any, ...]]]) -> tuple[object, fx.Graph]:
    """What is computed, written out as nested tuples, and its graph."""
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    meanings: list[object] = ["x", "y"]
    for at, (target, *args) in calls:
        at %= len(values)
        values.append(graph.call_function(target, (values[at], *args)))
        meanings.append((str(target), meanings[at], *map(repr, args)))
    graph.output((values[-1],))
    return tuple(meanings), graph


@given(PROGRAMS, PROGRAMS)
def test_equal_text_exactly_if_equal_calls(first: list[Any], second: list[Any]) -> None:
    (meaning, graph), (other, twin) = drawn(first), drawn(second)
    assert (graph_text(graph) == graph_text(twin)) == (meaning == other)
    assert graph_text(renamed(graph, "n")) == graph_text(graph)


def test_expressions() -> None:
    s = Sketch()
    w, g = s.weight("q.weight", 4, 8), s.weight("ln.weight", 8)
    scaled = s.call(aten.mul.Tensor, w, g)
    mean = s.call(aten.mean.dim, scaled, [0], True)
    root = s.call(aten.sub.Tensor, scaled, mean, alpha=2)
    assert expression_text(root) == (
        "sub(mul(q.weight, ln.weight), mean(mul(q.weight, ln.weight), [0], True), alpha=2)"
    )
    assert expression_text(w) == "q.weight"


def test_results_of_several() -> None:
    s = Sketch()
    parts = s.call(aten.split.Tensor, s.input("x", 4, 8), 2)
    program = s.done(s.call(operator.getitem, parts, 1))
    assert graph_text(program.graph).splitlines()[1:] == [
        "%1 = split(%0, split_size=2)",
        "%2 = getitem(%1, 1)  # f32[2,8]",
        "return [%2]",
    ]


def steps(*targets: Any) -> fx.Graph:
    s = Sketch()
    value = s.input("x", 2, 8)
    for target in targets:
        value = s.call(target, value)
    return s.done(value).graph


def test_diff() -> None:
    relu, neg, sin = (aten.relu.default, aten.neg.default, aten.sin.default)
    assert graph_diff(steps(relu, neg), steps(relu, neg)) == ""
    assert graph_diff(steps(relu, neg), steps(relu, sin)).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -1,4 +1,4 @@",
        " %0 = input x  # f32[2,8]",
        " %1 = relu(%0)  # f32[2,8]",
        "-%2 = neg(%1)  # f32[2,8]",
        "+%2 = sin(%1)  # f32[2,8]",
        " return [%2]",
    ]
