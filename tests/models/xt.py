"""Two decoders of the x-transformers library."""

from __future__ import annotations

from typing import Any

from torch import nn

from .case import Case, Inputs, builder, token_ids

VOCAB = 61
POSITIONS = 32


def decoder(**options: Any) -> nn.Module:
    # Imported late for the same reason as transformers: it is slow, and only its own tests use it.
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=POSITIONS,
        attn_layers=Decoder(dim=32, depth=2, heads=2, **options),
    )


def rotary_decoder() -> nn.Module:
    return decoder(rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True)


def ids_only(batch: int, length: int, seed: int) -> Inputs:
    return (token_ids(batch, length, seed, VOCAB),), {}


CASES = [
    Case("xt_decoder", builder(decoder), ids_only, "pre", True, POSITIONS),
    Case("xt_rotary", builder(rotary_decoder), ids_only, "pre", True, POSITIONS),
]
