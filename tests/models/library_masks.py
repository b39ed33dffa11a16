"""PyTorch's own encoder, decoder and attention with every spelling of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import Inputs, builder
from .stranger import VOCAB, WIDTH, Stranger, floats

causal_float = nn.Transformer.generate_square_subsequent_mask
Make = Callable[[int], Tensor]


def causal_bool(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def banded(length: int) -> Tensor:
    return causal_bool(length) | torch.ones(length, length, dtype=torch.bool).tril(-6)


def padded(batch: int, length: int) -> Tensor:
    """True where a key is padding: the last third of every second row."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[1::2, length - length // 3 :] = True
    return mask


def encoder(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"batch_first": True, "dim_feedforward": 24} | options
    layer = nn.TransformerEncoderLayer(WIDTH, 2, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder(**options: Any) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 24, batch_first=True, **options)
    return nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(WIDTH))


class LanguageModel(nn.Module):
    """The tutorial: an encoder made causal by a mask that forward itself makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.transformer_encoder = encoder(activation="gelu", norm_first=True)
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, src: Tensor) -> Tensor:
        mask = causal_float(src.size(1)).to(src.device)
        return self.linear(self.transformer_encoder(self.embedding(src) * 4, mask))


class PaddedClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.encoder = encoder()

    def forward(self, ids: Tensor) -> Tensor:
        pad = ids == 0
        h = self.encoder(self.embedding(ids), src_key_padding_mask=pad)
        return h.masked_fill(pad[..., None], 0).sum(1)


def _attend(make: Make | None = None, pad: bool = False, **options: Any) -> Any:
    def inputs(batch: int, length: int, seed: int) -> Inputs:
        x = floats(batch, length, WIDTH, seed=seed)
        kwargs: dict[str, Any] = dict(options)
        if make is not None:
            kwargs["attn_mask"] = make(length)
        if pad:
            kwargs["key_padding_mask"] = padded(batch, length)
        return (x, x, x), kwargs

    return inputs


def _per_head(batch: int, length: int, seed: int) -> Inputs:
    x = floats(batch, length, WIDTH, seed=seed)
    mask = floats(2 * batch, length, length, seed=seed + 1)
    return (x, x, x), {"attn_mask": mask, "average_attn_weights": False}


def _cross(batch: int, length: int, seed: int) -> Inputs:
    q, m = (floats(batch, length + k, WIDTH, seed=seed + k) for k in (0, 2))
    return (q, m, m), {"key_padding_mask": padded(batch, length + 2)}


def _encode(make: Make | None, pad: bool = False, **options: Any) -> Any:
    def inputs(batch: int, length: int, seed: int) -> Inputs:
        kwargs: dict[str, Any] = dict(options)
        if make is not None:
            kwargs["mask"] = make(length)
        if pad:
            kwargs["src_key_padding_mask"] = padded(batch, length)
        return (floats(batch, length, WIDTH, seed=seed),), kwargs

    return inputs


def _decode(make: Make | None, pad: bool = False, **options: Any) -> Any:
    def inputs(batch: int, length: int, seed: int) -> Inputs:
        tgt, memory = (floats(batch, length + k, WIDTH, seed=seed + k) for k in (0, 1))
        kwargs: dict[str, Any] = dict(options)
        if make is not None:
            kwargs["tgt_mask"] = make(length)
        if pad:
            kwargs["memory_key_padding_mask"] = padded(batch, length + 1)
        return (tgt, memory), kwargs

    return inputs


def _ids(batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    return (ids.masked_fill(padded(batch, length), 0),), {}


def _mha(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


def _seq_first(batch: int, length: int, seed: int) -> Inputs:
    x = floats(length, batch, WIDTH, seed=seed)
    return (x, x, x), {"attn_mask": causal_float(length), "is_causal": True}


def _row(
    name: str, factory: Callable[[], nn.Module], inputs: Any, branch: bool, **more: Any
) -> Stranger:
    return Stranger(name, builder(factory), inputs, "branch" if branch else "captured", **more)


_BATCHES: dict[str, Any] = {
    "note": "how the memory lies differs at batch 1, so that is another capture",
    "shapes": ((2, 7), (3, 11), (2, 1)),
}


STRANGERS = [
    _row("mha_plain", _mha, _attend(), False),
    _row("mha_no_weights", _mha, _attend(need_weights=False), False),
    _row("mha_causal_bool", _mha, _attend(causal_bool), False),
    _row("mha_causal_float", _mha, _attend(causal_float, need_weights=False), False),
    _row("mha_hint", _mha, _attend(causal_float, is_causal=True, need_weights=False), False),
    _row("mha_padding", _mha, _attend(pad=True), False),
    _row("mha_both", _mha, _attend(banded, pad=True, need_weights=False), False),
    _row("mha_per_head", _mha, _per_head, False),
    _row("mha_cross", lambda: _mha(add_bias_kv=True, add_zero_attn=True), _cross, False),
    _row("mha_seq_first", lambda: nn.MultiheadAttention(WIDTH, 2), _seq_first, False),
    _row("encoder_plain", encoder, _encode(None), False),
    _row("encoder_causal_float", encoder, _encode(causal_float), True),
    _row("encoder_causal_bool", encoder, _encode(causal_bool), True),
    _row("encoder_banded", lambda: encoder(norm_first=True), _encode(banded), True),
    _row("encoder_hint", encoder, _encode(causal_float, is_causal=True), False),
    _row("encoder_no_hint", encoder, _encode(causal_float, is_causal=False), False),
    _row("encoder_padding", encoder, _encode(None, pad=True), False),
    _row("encoder_both", encoder, _encode(causal_bool, pad=True), True),
    _row("decoder_plain", decoder, _decode(None), False, **_BATCHES),
    _row("decoder_causal", decoder, _decode(causal_float), True),
    _row("decoder_hint", decoder, _decode(causal_bool, tgt_is_causal=True), False, **_BATCHES),
    _row("decoder_padding", decoder, _decode(banded, pad=True), True),
    _row("encoder_lm", LanguageModel, _ids, True),
    _row("encoder_classifier", PaddedClassifier, _ids, False),
]
