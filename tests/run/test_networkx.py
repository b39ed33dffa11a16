"""The computation as a networkx graph: values, and who reads them by which argument."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from models import CASES
from torch import Tensor, nn

import lensfx


@pytest.fixture(scope="module")
def lens() -> lensfx.Lens:
    args, _ = CASES["nanogpt_targets"].inputs(2, 7, 0)
    return lensfx.wrap(CASES["nanogpt_targets"].build(), *args, passes=None, verify=False)


@pytest.fixture(scope="module")
def graph(lens: lensfx.Lens) -> nx.MultiDiGraph:
    return lens.to_networkx()


def labels(graph: nx.MultiDiGraph, source: str, reader: str) -> list[str]:
    return sorted(facts["argument"] for facts in graph.get_edge_data(source, reader).values())


def test_every_value_is_a_node(lens: lensfx.Lens, graph: nx.MultiDiGraph) -> None:
    parts = ("scale", "normalized", "_input", "attn_in", "scores", "pattern", "result")
    assert set(lens.hook_names) - set(graph) == {
        n for n in lens.hook_names if ".hook_" in n and n.endswith(parts)
    }
    assert {"idx", "targets", "output", "lm_head.weight", "transformer.wpe.weight"} <= set(graph)
    assert graph.number_of_nodes() == len({_key(n) for n in lens.program.graph.nodes})


def _key(node: Any) -> Any:
    return node.target if node.op == "get_attr" else node


def test_every_edge_says_by_which_argument_the_reader_reads(graph: nx.MultiDiGraph) -> None:
    first = "transformer.h.0.attn.c_attn"
    assert labels(graph, f"{first}.weight", f"{first}.linear") == ["weight"]
    assert labels(graph, "transformer.h.0.ln_1.layer_norm", f"{first}.linear") == ["input"]
    attention = "transformer.h.0.attn.scaled_dot_product_attention"
    read = {facts["argument"] for _, _, facts in graph.in_edges(attention, data=True)}
    assert read == {"query", "key", "value"}
    assert all(facts["argument"] for _, _, facts in graph.edges(data=True))


def test_it_is_acyclic_and_leads_from_tokens_to_the_loss(graph: nx.MultiDiGraph) -> None:
    assert nx.is_directed_acyclic_graph(graph)
    for early, late in [
        ("idx", "hook_embed"),
        ("blocks.0.hook_attn_out", "blocks.0.hook_resid_mid"),
        ("blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre"),
        ("unembed.hook_out", "output"),
        ("targets", "cross_entropy_loss"),
    ]:
        assert nx.has_path(graph, early, late)
        assert not nx.has_path(graph, late, early)
    assert not nx.has_path(graph, "targets", "unembed.hook_out")


def test_a_tied_weight_is_one_node_with_both_readers(graph: nx.MultiDiGraph) -> None:
    readers = set(graph.successors("lm_head.weight")) | set(
        graph.successors("transformer.wte.weight") if "transformer.wte.weight" in graph else ()
    )
    assert {"lm_head.linear", "transformer.wte.embedding"} <= readers


def test_nodes_tell_what_they_are(graph: nx.MultiDiGraph) -> None:
    facts = graph.nodes["transformer.h.1.mlp.c_fc.linear"]
    assert facts["op"] == "linear"
    assert facts["path"] == "transformer.h.1.mlp.c_fc"
    assert facts["dtype"] == "torch.float32"
    assert facts["shape"].endswith(", 128]")
    assert facts["line"].startswith("nanogpt.py:")
    assert not facts["weight"]
    assert graph.nodes["lm_head.weight"]["shape"] == "[61, 32]"
    assert graph.nodes["lm_head.weight"]["weight"]
    assert graph.nodes["blocks.0.hook_resid_mid"]["op"] == "hook_point"


def test_its_facts_are_plain_enough_to_be_written_out(graph: nx.MultiDiGraph) -> None:
    for _, facts in graph.nodes(data=True):
        assert {type(v) for v in facts.values()} <= {str, bool}
    assert "".join(nx.generate_gml(graph))


class Twice(nn.Module):
    """Reads one value twice, and calls its arguments what operators are called."""

    def forward(self, mul: Tensor, cat: Tensor, output: Tensor) -> Tensor:
        square = mul * mul
        return torch.cat([square, square, cat * square, output])


def test_a_value_read_twice_has_two_edges() -> None:
    x = torch.randn(2, 3)
    graph = lensfx.wrap(Twice(), x, x, x, passes=None, verify=False).to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.number_of_nodes() == 7
    by_op = {facts["op"]: n for n, facts in graph.nodes(data=True)}
    assert len([n for n, facts in graph.nodes(data=True) if facts["op"] == "placeholder"]) == 3
    square = next(n for n in graph.predecessors(by_op["cat"]) if len(set(graph.pred[n])) == 1)
    (source,) = graph.pred[square]
    assert labels(graph, source, square) == ["other", "self"]
    assert labels(graph, square, by_op["cat"]) == ["tensors", "tensors"]


def test_an_unknown_component_is_refused(lens: lensfx.Lens) -> None:
    with pytest.raises(lensfx.LensError, match="no component graph of 'circuit'"):
        lens.to_networkx("circuit")
    assert nx.utils.graphs_equal(lens.to_networkx(component="ops"), lens.to_networkx())
