"""Facts proved from the graph; each answer carries the nodes it rests on."""

from lensfx.analysis.contraction import weight_einsum
from lensfx.analysis.gauge import Proof, Seen, dead
from lensfx.analysis.norms import NORMS, WRITTEN_NORM, Norm, is_norm, written_norm
from lensfx.analysis.stream import Block, Stream, Unknown, Write, residual_stream
from lensfx.analysis.unembed import Head, heads, token_tables, unembedding

__all__ = [
    "NORMS",
    "WRITTEN_NORM",
    "Block",
    "Head",
    "Norm",
    "Proof",
    "Seen",
    "Stream",
    "Unknown",
    "Write",
    "dead",
    "heads",
    "is_norm",
    "residual_stream",
    "token_tables",
    "unembedding",
    "weight_einsum",
    "written_norm",
]
