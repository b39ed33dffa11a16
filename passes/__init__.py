"""The passes, one per file, listed by hand."""

from lensfx.passes.canonical_linear import CanonicalLinear
from lensfx.passes.canonical_norm import CanonicalNorm
from lensfx.passes.center_unembed import CenterUnembed
from lensfx.passes.expose_attention import ExposeAttention
from lensfx.passes.fold_norm import FoldNorm
from lensfx.passes.insert_hooks import InsertHooks

__all__ = [
    "CanonicalLinear",
    "CanonicalNorm",
    "CenterUnembed",
    "ExposeAttention",
    "FoldNorm",
    "InsertHooks",
]
