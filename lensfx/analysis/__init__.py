"""Facts proved from the graph; each answer carries the nodes it rests on."""

from lensfx.analysis.contraction import weight_einsum
from lensfx.analysis.gauge import Proof, Seen, dead
from lensfx.analysis.norms import NORMS, WRITTEN_NORM, Norm, written_norm
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

__all__ = [
    "NORMS",
    "WRITTEN_NORM",
    "Block",
    "Head",
    "Norm",
    "Point",
    "Proof",
    "Seen",
    "Stream",
    "Structure",
    "Write",
    "component_graph",
    "dead",
    "heads",
    "structure",
    "token_tables",
    "unembedding",
    "weight_einsum",
    "written_norm",
]
