"""More of x-transformers: its wrappers, options and the pair of encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import Inputs, builder, padding_mask, token_ids
from .stranger import VOCAB, Stranger, floats, ids_only

LENGTH = 24


def layers(kind: str, **options: Any) -> nn.Module:
    import x_transformers

    return getattr(x_transformers, kind)(dim=16, depth=2, heads=2, attn_dim_head=8, **options)


def wrapper(kind: str = "Decoder", outer: dict[str, Any] | None = None, **options: Any) -> Any:
    from x_transformers import TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=LENGTH, attn_layers=layers(kind, **options), **(outer or {})
    )


class SummedTables(nn.Module):
    """A custom `token_emb`: two tables, one by id and one by id modulo five."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Embedding(VOCAB, 16), nn.Embedding(5, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fine(ids) + self.coarse(ids % 5)


def pair(**options: Any) -> nn.Module:
    from x_transformers import XTransformer

    sides = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in dict(depth=1, heads=2, max_seq_len=LENGTH, num_tokens=VOCAB).items()
    }
    return XTransformer(dim=16, **sides, **options)


def continuous() -> nn.Module:
    from x_transformers import ContinuousTransformerWrapper

    encoder = layers("Encoder", sandwich_norm=True)
    return ContinuousTransformerWrapper(
        dim_in=5, dim_out=7, max_seq_len=LENGTH, attn_layers=encoder
    )


def vision() -> nn.Module:
    from x_transformers import ViTransformerWrapper

    return ViTransformerWrapper(
        image_size=12, patch_size=4, num_classes=5, attn_layers=layers("Encoder")
    )


def _masked(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length, seed, VOCAB)
    return (ids,), {"mask": padding_mask(batch, length).bool()}


def _embeddings(batch: int, length: int, seed: int) -> Inputs:
    return (token_ids(batch, length, seed, VOCAB),), {"return_embeddings": True}


def _two(batch: int, length: int, seed: int) -> Inputs:
    src = token_ids(batch, length, seed, VOCAB)
    tgt = token_ids(batch, length + 2, seed + 1, VOCAB)
    return (src, tgt), {"mask": torch.ones(batch, length, dtype=torch.bool)}


def _points(batch: int, length: int, seed: int) -> Inputs:
    return (floats(batch, length, 5, seed=seed),), {}


def _image(batch: int, length: int, seed: int) -> Inputs:
    return (floats(batch, 3, 12, 12, seed=seed),), {}


def _one(name: str, factory: Callable[[], Any], inputs: Any = ids_only, **more: Any) -> Stranger:
    return Stranger(f"xt_{name}", builder(factory), inputs, **more)


_EINX: dict[str, Any] = {
    "note": "einx makes a plain number of every size it sees",
    "shapes": ((2, 7), (2, 7), (2, 7)),
}

STRANGERS = [
    _one("flash", lambda: wrapper(attn_flash=True, rotary_pos_emb=True)),
    _one("rms_glu", lambda: wrapper(use_rmsnorm=True, ff_glu=True, ff_swish=True)),
    _one("memory", lambda: wrapper(outer={"num_memory_tokens": 3})),
    _one("tied", lambda: wrapper(outer={"tie_embedding": True})),
    _one("token_emb", lambda: wrapper(outer={"token_emb": SummedTables()})),
    _one("l2norm", lambda: wrapper(outer={"l2norm_embed": True}, attn_qk_norm=True)),
    _one("encoder", lambda: wrapper("Encoder"), _masked, **_EINX),
    _one("encoder_embeddings", lambda: wrapper("Encoder", pre_norm=False), _embeddings),
    _one("alibi", lambda: wrapper(alibi_pos_bias=True, alibi_num_heads=1), **_EINX),
    _one("t5_bias", lambda: wrapper("Encoder", rel_pos_bias=True), **_EINX),
    _one("grouped", lambda: wrapper(attn_kv_heads=1, attn_gate_values=True)),
    _one("value_residual", lambda: wrapper(add_value_residual=True, gate_residual=True)),
    _one("talking_heads", lambda: wrapper(attn_pre_talking_heads=True, shift_tokens=1)),
    _one("emb_dim", lambda: wrapper(outer={"emb_dim": 8, "emb_frac_gradient": 0.5})),
    _one("pair", pair, _two, **_EINX),
    _one("pair_tied", lambda: pair(tie_token_emb=True, enc_use_rmsnorm=True), _two, **_EINX),
    _one("continuous", continuous, _points),
    _one("vision", vision, _image, note="one image size", shapes=((2, 3), (3, 3), (1, 3))),
]
