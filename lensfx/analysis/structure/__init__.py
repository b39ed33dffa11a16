"""The structure of a model found from its dataflow: stream, blocks, attention, MLPs, embeddings."""

from lensfx.analysis.structure.components import component_graph
from lensfx.analysis.structure.facts import (
    MLP,
    AttentionBranch,
    Block,
    Branch,
    Embedding,
    Layout,
    Note,
    Place,
    Stream,
    Write,
)
from lensfx.analysis.structure.normalise import Norm
from lensfx.analysis.structure.points import Point
from lensfx.analysis.structure.structure import Structure, structure

__all__ = [
    "MLP",
    "AttentionBranch",
    "Block",
    "Branch",
    "Embedding",
    "Layout",
    "Norm",
    "Note",
    "Place",
    "Point",
    "Stream",
    "Structure",
    "Write",
    "component_graph",
    "structure",
]
