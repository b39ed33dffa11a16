"""What analysis code written for TransformerLens asks of a model, beside running it with hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lensfx.errors import LensError
from lensfx.graph.program import Program
from lensfx.run.cfg import Config, config
from lensfx.run.layers import BlockView, Table, Unembed
from lensfx.run.norms import AppliedNorm
from lensfx.run.stream import Summed
from lensfx.run.weights import ByRole

__all__ = ["Protocol"]

Tokens = int | str | Sequence[int] | torch.Tensor


class Protocol(ByRole):
    """Tokens, blocks, norms and biases of a model by the names TransformerLens gives them.

    `tokenizer` is one of the transformers library, or None; give it as `lens.tokenizer = ...`.
    """

    tokenizer: Any = None
    _config: tuple[Program, Config] | None = None

    @property
    def cfg(self) -> Config:
        """The sizes and kinds of the model, found in its graph.

        Raises: LensError if it has no residual stream.
        """
        program = self.program
        if self._config is None or self._config[0] is not program:
            self._config = program, config(program, self.structure)
        return self._config[1]

    @property
    def blocks(self) -> list[BlockView]:
        """One light object for each block, with `attn`, `mlp`, `ln1` and `ln2`."""
        return [BlockView(self, i) for i in range(len(self.structure.blocks))]

    @property
    def ln_final(self) -> AppliedNorm:
        """The norm ahead of the unembedding, as a function of a stream.

        Raises: LensError if there is none.
        """
        stream = self.structure.stream
        if stream is None or stream.final_norm is None:
            raise LensError("this model has no norm ahead of its unembedding", hint="lens.unembed")
        return AppliedNorm(self.program, stream.final_norm)

    @property
    def unembed(self) -> Unembed:
        """The head as a function of what the final norm gives."""
        return Unembed(self)

    @property
    def embed(self) -> Table:
        """The token embedding; `embed.W_E` is its table."""
        return Table(self)

    @property
    def pos_embed(self) -> Table:
        """The absolute positions; `pos_embed.W_pos` is their table."""
        return Table(self, positions=True)

    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... for every head of every block that has attention."""
        return [
            f"L{block.index}H{head}"
            for block in self.structure.blocks
            if block.attn is not None
            for head in range(block.attn.heads or 0)
        ]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> torch.Tensor:
        """The sum of the biases that are added to the stream ahead of a layer, `[d_model]`.

        `mlp_input` counts the attention of that layer too.

        Raises: LensError where a norm divides what a branch adds: then its bias is no constant.
        """
        stream = Summed(self)
        if not 0 <= layer <= len(self.structure.blocks):
            raise LensError(
                f"layer={layer}, but there are {len(self.structure.blocks)} blocks",
                hint="print(lens.structure)",
            )
        stream.check(layer)
        total = torch.zeros_like(self.W_E[0])
        for addend in stream.addends(layer, mlp_input):
            if addend.short in ("attn", "cross_attn") or (
                addend.short == "mlp" and include_mlp_biases
            ):
                out = stream.out(addend)
                if out.norm is not None:
                    raise LensError(
                        f"{addend.label} goes through a norm, so its bias is another one every run",
                        hint="the row `bias` of cache.get_full_resid_decomposition()",
                    )
                total = total + out.bias
        return total

    def tokens_to_residual_directions(self, tokens: Tokens) -> torch.Tensor:
        """The column of W_U for each token, `[..., d_model]`; a string is one token."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        table = self.W_U.transpose(0, 1)
        found = table[torch.as_tensor(tokens, device=table.device)]
        # One token gives one direction, however it is wrapped.
        return found.reshape(-1) if found.numel() == table.shape[1] and found.ndim == 2 else found

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> torch.Tensor:
        """The token ids of a text or several, `[batch, pos]`.

        A beginning-of-sequence token is put in front unless `prepend_bos` is False or the
        tokenizer has none; with `prepend_bos=None` such a tokenizer adds its own special tokens.

        Raises: LensError without a tokenizer, or without what it needs.
        """
        texts = [input] if isinstance(input, str) else list(input)
        rows = [self._ids(text, prepend_bos) for text in texts]
        limit = self.cfg.n_ctx if truncate else None
        rows = [row[:limit] for row in rows]
        side = str(padding_side or getattr(self._tokens, "padding_side", "right"))
        longest = max(map(len, rows), default=0)
        padded = [_padded(row, longest, self._pad(rows), side) for row in rows]
        found = torch.tensor(padded, dtype=torch.long)
        return found.to(self.cfg.device) if move_to_device else found

    @property
    def _tokens(self) -> Any:
        if self.tokenizer is None:
            raise LensError(
                "this lens has no tokenizer", hint="lens.tokenizer = AutoTokenizer.from_pretrained"
            )
        return self.tokenizer

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        tokenizer = self._tokens
        bos = getattr(tokenizer, "bos_token_id", None)
        if prepend_bos and bos is None:
            raise LensError(
                "this tokenizer has no token for the beginning", hint="prepend_bos=None"
            )
        own = prepend_bos is None and bos is None
        ids = list(tokenizer.encode(text, add_special_tokens=own))
        return ids if bos is None or prepend_bos is False else [int(bos), *ids]

    def _pad(self, rows: list[list[int]]) -> int:
        names = ("pad_token_id", "eos_token_id", "bos_token_id")
        known = (getattr(self._tokens, n, None) for n in names)
        found = next((int(t) for t in known if t is not None), None)
        if found is None and len({len(r) for r in rows}) > 1:
            raise LensError(
                "texts of different lengths need a padding token, and this tokenizer has none",
                hint="lens.tokenizer.pad_token = ...",
            )
        return found or 0

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of token ids; a list of texts for a batch of them."""
        ids = torch.as_tensor(tokens) if not _is_ragged(tokens) else tokens
        if isinstance(ids, torch.Tensor) and ids.ndim <= 1:
            return str(self._tokens.decode(ids.reshape(-1).tolist()))
        if isinstance(ids, torch.Tensor) and ids.ndim > 2:
            raise LensError(f"tokens have {ids.ndim} axes; one or two are a text or a batch")
        return [str(self._tokens.decode(torch.as_tensor(row).tolist())) for row in ids]

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None
    ) -> list[str] | list[list[str]]:
        """Each token of a text, or of token ids, as a string; a list for each text of several."""
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self._strings(self._text_ids(text, prepend_bos)) for text in input]
        if isinstance(input, str):
            return self._strings(self._text_ids(input, prepend_bos))
        ids = torch.as_tensor(input)
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim > 1:
            raise LensError("to_str_tokens takes one row of tokens", hint="call it row by row")
        return self._strings(ids.reshape(-1).tolist())

    def _text_ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        return self._ids(text, prepend_bos)[: self.cfg.n_ctx]

    def _strings(self, ids: list[int]) -> list[str]:
        return [str(self._tokens.decode([i])) for i in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises: LensError if it is none, or several.
        """
        ids = self._ids(string, False)
        if len(ids) != 1:
            parts = self._strings(ids)
            raise LensError(f"{string!r} is {len(ids)} tokens, not one: {parts}", hint="to_tokens")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return self._strings([int(int_token)])[0]


def _padded(row: list[int], length: int, pad: int, side: str) -> list[int]:
    if side not in ("left", "right"):
        raise LensError(f"padding_side={side!r} is none", hint="'left' or 'right'")
    fill = [pad] * (length - len(row))
    return [*fill, *row] if side == "left" else [*row, *fill]


def _is_ragged(tokens: Any) -> bool:
    nested = isinstance(tokens, (list, tuple)) and tokens and not isinstance(tokens[0], int)
    return bool(nested) and len({len(torch.as_tensor(t).reshape(-1)) for t in tokens}) > 1
