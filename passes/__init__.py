"""The passes, one per file, listed by hand."""

from lensfx.passes.canonical_linear import CanonicalLinear
from lensfx.passes.canonical_norm import CanonicalNorm
from lensfx.passes.center_unembed import CenterUnembed
from lensfx.passes.center_writers import CenterWriters
from lensfx.passes.expose_attention import ExposeAttention
from lensfx.passes.fold_batch_norm import FoldBatchNorm
from lensfx.passes.fold_embedding_scale import FoldEmbeddingScale
from lensfx.passes.fold_key_bias import FoldKeyBias
from lensfx.passes.fold_linear import FoldLinear
from lensfx.passes.fold_norm import FoldNorm
from lensfx.passes.fold_scale import FoldScale
from lensfx.passes.fold_value_bias import FoldValueBias
from lensfx.passes.freeze_norm import FreezeNorm
from lensfx.passes.insert_hooks import InsertHooks
from lensfx.passes.layer_norm_to_rms import LayerNormToRMS
from lensfx.passes.merge_fused import MergeFused
from lensfx.passes.refactor_attention import RefactorAttention
from lensfx.passes.rotate_stream import RotateStream
from lensfx.passes.split_fused import SplitFused
from lensfx.passes.split_heads import SplitHeads
from lensfx.passes.untie import Untie

__all__ = [
    "CanonicalLinear",
    "CanonicalNorm",
    "CenterUnembed",
    "CenterWriters",
    "ExposeAttention",
    "FoldBatchNorm",
    "FoldEmbeddingScale",
    "FoldKeyBias",
    "FoldLinear",
    "FoldNorm",
    "FoldScale",
    "FoldValueBias",
    "FreezeNorm",
    "InsertHooks",
    "LayerNormToRMS",
    "MergeFused",
    "RefactorAttention",
    "RotateStream",
    "SplitFused",
    "SplitHeads",
    "Untie",
]
