"""The component graph: its edges are the reads that numbers show, and no others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import networkx as nx
import pytest
import torch
from fixtures.models import BUILDERS, IDS
from models import CASES, STRANGERS
from torch import Tensor

import lensfx

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama"])
def lens(request: pytest.FixtureRequest) -> lensfx.Lens:
    model = BUILDERS[request.param]().eval()
    return lensfx.wrap(model, IDS, passes=None, verify=False, use_cache=False)


def writers(graph: nx.MultiDiGraph) -> Iterator[str]:
    yield from (n for n, facts in graph.nodes(data=True) if facts["kind"] in ("head", "mlp"))


def inputs(lens: lensfx.Lens, hooks: Any = ()) -> dict[str, Tensor]:
    """Every value that a component reads, under hooks."""

    def names(name: str) -> bool:
        return name.endswith(("_input", "hook_mlp_in")) or name == "unembed.hook_in"

    with lens.hooks(fwd_hooks=list(hooks)):
        _, cache = lens.run_with_cache(IDS, names_filter=names)
    return dict(cache)


def read(values: dict[str, Tensor], graph: nx.MultiDiGraph, hook: str, target: str) -> Tensor:
    """What one component reads at a hook: its own copy where there is one for each head."""
    value, head = values[hook], graph.nodes[target]["head"]
    if value.ndim < 4:
        return value
    # Of grouped heads the copies are those of the key/value heads.
    heads = sum(graph.nodes[n]["block"] == graph.nodes[target]["block"] for n in graph) - 1
    return value[:, :, head * value.shape[2] // heads]


def test_an_edge_is_a_read_that_changes_with_the_writer(lens: lensfx.Lens) -> None:
    graph = lens.to_networkx("heads")
    clean = inputs(lens)
    reads = {(v, d["read"], d["hook"]) for _, v, d in graph.edges(data=True)}
    assert all(hook in clean for _, _, hook in reads)
    for source in writers(graph):
        facts = graph.nodes[source]

        def moved(value: Tensor, hook: Any, head: int | None = facts["head"]) -> Tensor:
            value = value.clone()
            (value if head is None else value[:, :, head]).mul_(1.5)
            return value

        after = inputs(lens, [(facts["hook"], moved)])
        for target, kind, hook in reads:
            edges = graph.get_edge_data(source, target) or {}
            told = any(d["read"] == kind for d in edges.values())
            pair = [read(v, graph, hook, target) for v in (clean, after)]
            assert told == (not torch.equal(*pair)), (source, target, kind)


def test_heads_mlps_and_ends_are_there_once(lens: lensfx.Lens) -> None:
    graph = lens.to_networkx(component="heads")
    heads = [f"blocks.{i}.attn.{h}" for i, h in itertools.product(range(2), range(4))]
    assert {*heads, "blocks.0.mlp", "blocks.1.mlp", "embed", "unembed"} <= set(graph)
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes["blocks.1.attn.2"]["hook"] == "blocks.1.attn.hook_result"
    assert {d["hook"] for _, d in graph.nodes(data=True)} <= set(lens.hook_names)


def test_parallel_branches_do_not_read_each_other() -> None:
    lens = lensfx.wrap(BUILDERS["neox"]().eval(), IDS, passes=None, verify=False, use_cache=False)
    graph = lens.to_networkx("heads")
    assert not graph.has_edge("blocks.0.attn.0", "blocks.0.mlp")
    assert graph.has_edge("blocks.0.attn.0", "blocks.1.mlp")


def test_blocks(lens: lensfx.Lens) -> None:
    graph = lens.to_networkx("blocks")
    assert set(graph) - {"pos_embed"} == {"embed", "blocks.0", "blocks.1", "unembed"}
    found = graph.get_edge_data("blocks.0", "blocks.1").values()
    assert {d["read"] for d in found} == {"q", "k", "v", "mlp"}


def test_values_that_go_round_the_stream_are_direct_edges() -> None:
    stranger = STRANGERS["gpt_value_residual"]
    args, kwargs = stranger.inputs(2, 7, 0)
    lens = lensfx.wrap(stranger.build(), *args, passes=None, verify=False, **kwargs)
    graph = lens.to_networkx("heads")
    direct = [(u, v, d["read"]) for u, v, d in graph.edges(data=True) if d["direct"]]
    assert ("blocks.0.attn.0", "blocks.1.attn.0", "v") in direct
    assert {kind for _, _, kind in direct} == {"v"}


def test_an_encoder_is_read_through_k_and_v() -> None:
    stranger = STRANGERS["translator"]
    args, kwargs = stranger.inputs(2, 7, 0)
    lens = lensfx.wrap(stranger.build(), *args, passes=None, verify=False, **kwargs)
    graph = lens.to_networkx("heads")
    crossing = graph.get_edge_data("encoder_blocks.0.mlp", "decoder_blocks.0.cross_attn.0")
    assert {d["read"] for d in crossing.values()} == {"k", "v"}
    assert not graph.has_edge("encoder_blocks.0.mlp", "decoder_blocks.0.attn.0")


def test_no_component_graph_without_a_structure() -> None:
    stranger = STRANGERS["moe_dense"]
    args, kwargs = stranger.inputs(2, 7, 0)
    lens = lensfx.wrap(stranger.build(), *args, passes=None, verify=False, **kwargs)
    with pytest.raises(lensfx.LensError, match="no residual stream"):
        lens.to_networkx("heads")
    case = CASES["nanogpt"]
    args, kwargs = case.inputs(2, 7, 0)
    lens = lensfx.wrap(case.build(), *args, passes=None, verify=False, **kwargs)
    with pytest.raises(lensfx.LensError, match="no component graph of 'layers'"):
        lens.to_networkx("layers")
