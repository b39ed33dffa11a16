"""Small values for config fields, found from a field's name and its default."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

VOCAB = 64
HIDDEN = 32
HEAD_DIM = 8
POSITIONS = 64
IMAGE = 32
FIRST_FREE_ID = 3

Rule = tuple[str, Callable[[int], int]]

# The first pattern that is found in a field's name decides.
_COUNTS: tuple[Rule, ...] = (
    (r"shared_layers$", lambda v: 0),
    (r"(image|video|audio|vision|visual|box|frame|query)_seq_?len", lambda v: v),
    (r"vocab|codebook_size|num_embeddings$", lambda v: min(v, VOCAB)),
    (r"(?<!per_)heads?$|n_head$", lambda v: min(v, 4)),
    (r"shared_experts?$", lambda v: min(v, 1)),
    (r"n_groups?$|topk_group|expert_groups?", lambda v: min(v, 1)),
    (r"per_tok|top_?k|(^|_)moe_k$", lambda v: min(v, 2)),
    (r"experts?$|num_experts", lambda v: min(v, 4)),
    (r"dense_replace|num_dense_layers|leading_dense", lambda v: min(v, 1)),
)
_LAYERS = r"(?<!shared_)(?<!routed_)layers$|(^|_)(layer|blocks?|depth|n_layers?)$"
_KEY_VALUE_HEADS = r"(kv|key_value)_heads$|num_kv$|n_kv_heads?|num_query_groups"
_HEAD_DIM = r"head_dim$|d_kv$|head_size$|kv_channels|dim_head|dim_per_head|head_width"
_MULTIPLIER = r"(width|depth)_(coefficient|mult)"
_UNKNOWN = 12_345
_WIDTHS: tuple[Rule, ...] = (
    (r"rotary_dim|rotary_ndims|rope_dim$", lambda v: HEAD_DIM // 2),
    (r"lora_rank", lambda v: min(v, 16)),
    (r"intermediate|ffn|d_ff|d_inner|n_inner|feed_forward|mlp_dim|mlp_hidden", lambda v: 64),
    (
        r"hidden_size|d_model|n_embd|embed_dim|embedding_size|embedding_dim|^d_embed",
        lambda v: HIDDEN,
    ),
    (r"(^|_)(hidden_dim|dim|width|emb_dim|proj_dim|projection_size|n_state)$", lambda v: HIDDEN),
    (r"(^|_)(conv_channels|decoder_channels|upsampler?_dim|fusion_hidden)", lambda v: HIDDEN),
    (r"(hidden|embed)\w*_(size|dim)$|^channels$|_width$|^d_latents$", lambda v: HIDDEN),
)
_LENGTHS: tuple[Rule, ...] = (
    (
        r"max_\w*(position|len|seq|source|target)|^n_positions|^n_ctx|context_length|^block_size$",
        lambda v: min(v, POSITIONS),
    ),
    (r"sliding_window$|attention_window|^local_window|attention_chunk", lambda v: min(v, 4)),
    (r"window_size$", lambda v: min(v, 4)),
    (r"image_size|img_size|^input_size|crop_size|^resolution", lambda v: min(v, IMAGE)),
    (r"patch_size", lambda v: min(v, 8)),
    (
        r"num_queries|num_query_tokens|num_latents|^resampler_n_latents|query_num",
        lambda v: min(v, 8),
    ),
)
_KEPT = re.compile(r"num_channels|in_channels|in_chans|temporal|num_labels|num_frames|stages?$")
_TOKEN = re.compile(r"token_(id|index)$|_token$|^(pad|bos|eos|sep|cls|mask)_\w*id$|_idx$")
_SECTION = re.compile(r"section")


@dataclass(frozen=True)
class Rules:
    """Which fields are made small and how: all that are known, or fewer where that does not fit.

    `filled` gives a value to fields that are None by default and that the constructor leaves so.
    """

    layers: int | None = 2
    key_value_heads: int = 2
    head_dim: int | None = HEAD_DIM
    filled: bool = False
    widths: bool = True
    lengths: bool = True
    lists: bool = True
    largest: int = 6_000_000

    def value(self, field: str, default: Any, annotation: str, ids: TokenIds) -> Any:
        """The value for a field with this default; the default itself if no rule is for it."""
        if default is None:
            return self._filled(field, annotation)
        if isinstance(default, bool) or _KEPT.search(field):
            return default
        if isinstance(default, int):
            return self._number(field, default, ids)
        if isinstance(default, float) and self.widths and re.search(_MULTIPLIER, field):
            return min(default, 0.25)
        if isinstance(default, (list, tuple)) and self.lists:
            return type(default)(self._numbers(field, default, ids))
        if isinstance(default, dict) and self.widths:
            return {k: self.value(str(k), v, "", ids) for k, v in default.items()}
        return default

    def _filled(self, field: str, annotation: str) -> Any:
        if not self.filled:
            return None
        if field == "layer_types":
            return ["full_attention"] * (self.layers or 1)
        if field == "pad_token_id":
            return 0
        if field == "rope_parameters":
            half = (self.head_dim or HEAD_DIM) // 2
            sections = [half // 2, half // 4, half // 4]
            return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
        if "int" not in annotation or _TOKEN.search(field) or _KEPT.search(field):
            return None
        found = self._number(field, _UNKNOWN, TokenIds())
        return found if found != _UNKNOWN else None

    def _number(self, field: str, default: int, ids: TokenIds) -> int:
        if _TOKEN.search(field):
            return ids.get(field, default)
        if default <= 1:
            return default
        if re.search(_LAYERS, field):
            return default if self.layers is None else min(default, self.layers)
        if re.search(_KEY_VALUE_HEADS, field):
            return min(default, self.key_value_heads)
        if re.search(_HEAD_DIM, field):
            return default if self.head_dim is None else self.head_dim
        for rules, wanted in ((_LENGTHS, self.lengths), (_COUNTS, True), (_WIDTHS, self.widths)):
            for pattern, small in rules:
                if re.search(pattern, field):
                    return small(default) if wanted else default
        return default

    def _numbers(self, field: str, default: Sequence[Any], ids: TokenIds) -> Sequence[Any]:
        if not default or not all(type(v) is int for v in default):
            return default
        if _SECTION.search(field):
            half = (self.head_dim or HEAD_DIM) // 2
            return [
                *[half // len(default)] * (len(default) - 1),
                half - half // len(default) * (len(default) - 1),
            ]
        if re.search(r"depth|layers|blocks|repeats", field) and min(default) >= 1:
            return [1] * len(default)
        if re.search(r"heads", field):
            return [max(1, v // min(default)) if min(default) > 0 else v for v in default]
        if re.search(r"hidden_sizes|dims|channels|widths|_dim$|embed", field) and self.widths:
            low = min(default)
            return [max(16, 16 * v // low) if low >= 16 else v for v in default]
        if re.search(r"size", field):
            return [self._number(field, v, ids) for v in default]
        return default


class TokenIds:
    """Ids below the vocabulary's size for special tokens, the same for the same field name."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def get(self, field: str, default: int) -> int:
        """The id for this field; small and negative ones stay."""
        if default < FIRST_FREE_ID:
            return default
        key = re.sub(r"_(id|index|idx)$", "", field)
        return self._given.setdefault(key, VOCAB - 1 - len(self._given) % 20)


def all_rules() -> Iterator[Rules]:
    """Sets of rules to try, those that give the smallest models first."""
    yield from (Rules(), Rules(key_value_heads=4), Rules(filled=True))
    for layers in (2, 3, 6, None):
        for head_dim in (HEAD_DIM, 2 * HEAD_DIM, None):
            for filled in (False, True):
                yield Rules(layers, 4, head_dim, filled)
    large = Rules(largest=12_000_000)
    yield replace(large, lists=False)
    yield replace(large, lengths=False)
    yield replace(large, lists=False, lengths=False)
    wide = replace(large, head_dim=None, key_value_heads=1000, widths=False, largest=25_000_000)
    yield wide
    yield replace(wide, lists=False)
    yield replace(wide, lists=False, lengths=False)
    yield replace(wide, lists=False, lengths=False, layers=None)
