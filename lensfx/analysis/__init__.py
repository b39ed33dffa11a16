"""Facts proved from the graph; each answer carries the nodes it rests on."""

from lensfx.analysis import frozen
from lensfx.analysis.basis import Basis, Bound, basis_of, orthogonal, random_rotation
from lensfx.analysis.channels import Channels, broadcast, replay, seed, through
from lensfx.analysis.circuits import Circuit, circuits
from lensfx.analysis.contraction import weight_einsum
from lensfx.analysis.dead_bias import DeadBias, dead_biases
from lensfx.analysis.factoring import Heads, declare
from lensfx.analysis.gauge import Gauge, Proof, Seen, dead, recheck
from lensfx.analysis.head_axes import heads_of
from lensfx.analysis.mean_zero import mean_parts, mean_sources
from lensfx.analysis.norms import NORMS, WRITTEN_NORM, Norm, written_norm
from lensfx.analysis.pieces import Piece, pieces
from lensfx.analysis.reach import Reach, Refused, follow_all, reach
from lensfx.analysis.rows import Cut, Rows, attended, attends_fully, rows
from lensfx.analysis.scales import Scaled, is_learned, scaled
from lensfx.analysis.sinks import Sink
from lensfx.analysis.structure import (
    Block,
    Point,
    Stream,
    Structure,
    Write,
    component_graph,
    structure,
)
from lensfx.analysis.unembed import Head, heads, token_tables, unembedding
from lensfx.analysis.weights import (
    CONVS,
    LINEARS,
    TURNED,
    again,
    channel_axis,
    like,
    maker,
    rows_of,
    steps_of,
    taken_by,
    times_channels,
    weight_of,
)
from lensfx.analysis.writers import Writer, writers

__all__ = [
    "CONVS",
    "LINEARS",
    "NORMS",
    "TURNED",
    "WRITTEN_NORM",
    "Basis",
    "Block",
    "Bound",
    "Channels",
    "Circuit",
    "Cut",
    "DeadBias",
    "Gauge",
    "Head",
    "Heads",
    "Norm",
    "Piece",
    "Point",
    "Proof",
    "Reach",
    "Refused",
    "Rows",
    "Scaled",
    "Seen",
    "Sink",
    "Stream",
    "Structure",
    "Write",
    "Writer",
    "again",
    "attended",
    "attends_fully",
    "basis_of",
    "broadcast",
    "channel_axis",
    "circuits",
    "component_graph",
    "dead",
    "dead_biases",
    "declare",
    "follow_all",
    "frozen",
    "heads",
    "heads_of",
    "is_learned",
    "like",
    "maker",
    "mean_parts",
    "mean_sources",
    "orthogonal",
    "pieces",
    "random_rotation",
    "reach",
    "recheck",
    "replay",
    "rows",
    "rows_of",
    "scaled",
    "seed",
    "steps_of",
    "structure",
    "taken_by",
    "through",
    "times_channels",
    "token_tables",
    "unembedding",
    "weight_einsum",
    "weight_of",
    "writers",
    "written_norm",
]
