"""Ways in and out of a model: containers, keywords, options, losses, several sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Inputs, builder, padding_mask, token_ids
from .stranger import VOCAB, WIDTH, Stranger, floats, ids_only, vectors
from .trunk import GPT, Block


class Output(NamedTuple):
    logits: Tensor
    hidden: list[Tensor]
    loss: Tensor | None = None


@dataclass
class Result:
    logits: Tensor
    steps: int
    aux: Tensor | None = None


class TupleOut(GPT):
    def forward(self, idx: Tensor) -> Any:
        x = self.embed(idx)
        return self.lm_head(x), x, None, idx.shape[1], "done"


class NamedTupleOut(GPT):
    def forward(self, idx: Tensor) -> Any:
        x, hidden = self.embed(idx), []
        for block in self.h:
            x = block(x)
            hidden.append(x)
        return Output(self.lm_head(self.ln_f(x)), hidden)


class DataclassOut(GPT):
    def forward(self, idx: Tensor) -> Any:
        x = self.h[0](self.embed(idx))
        return Result(logits=self.lm_head(x), steps=3)


class NestedOut(GPT):
    def forward(self, idx: Tensor) -> Any:
        layers = {}
        x = self.embed(idx)
        for i, block in enumerate(self.h):
            x = block(x)
            layers[f"layer_{i}"] = {"out": x, "stats": (x.mean(), [x.std(-1)])}
        return OrderedDict(out=OrderedDict(logits=self.lm_head(x)), layers=layers, same=(x, x))


class Batched(nn.Module):
    """One argument, a nested dict, as a data loader would give it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.dense = nn.Embedding(VOCAB, WIDTH), nn.Linear(3, WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        ids, mask = batch["text"]["ids"], batch["text"]["mask"].float()
        pooled = (self.text(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for extra in batch["features"]:
            pooled = pooled + self.dense(extra)
        return {"scores": self.out(pooled), "meta": dict(batch["meta"])}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class TwoTowers(nn.Module):
    """Both towers share the trunk; the temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Block()
        self.left, self.right = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, pair: Pair) -> tuple[Tensor, Tensor]:
        a = F.normalize(self.left(self.trunk(pair.left).mean(1)), dim=-1)
        b = F.normalize(self.right(self.trunk(pair.right).amax(1)), dim=-1)
        logits = self.logit_scale.exp() * a @ b.t()
        labels = torch.arange(len(a), device=a.device)
        both = F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)
        return logits, both / 2


class KeywordOnly(GPT):
    def forward(self, *, tokens: Tensor, temperature: float = 1.0, **unused: Any) -> Tensor:  # type: ignore[override]
        return super().forward(tokens) / temperature


class Flexible(nn.Module):
    """Ids or embeddings, optional mask, optional labels, optional list of layers to return."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        states: tuple[Tensor, ...] = ()
        for block in self.blocks:
            states += (x,)
            x = block(x)
            if attention_mask is not None:
                x = x * attention_mask[..., None].to(x.dtype)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            shift, target = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
            loss = F.cross_entropy(shift.view(-1, VOCAB), target.view(-1), ignore_index=-100)
        if not return_dict:
            return (logits, *states) if output_hidden_states else logits
        out = {"loss": loss, "logits": logits, "hidden": states if output_hidden_states else None}
        return {k: v for k, v in out.items() if v is not None}


class VarArgs(nn.Module):
    """Any number of sequences, and options by name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, *sequences: Tensor, **scales: float) -> list[Tensor]:
        gain = sum(scales.values(), 1.0)
        return [self.lin(s).cumsum(1) * gain for s in sequences]


class Translator(nn.Module):
    """Encoder and decoder of PyTorch's own layers, each its own vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.src, self.tgt = nn.Embedding(VOCAB, WIDTH), nn.Embedding(23, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 24, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, 24, batch_first=True, norm_first=True)
        self.generator = nn.Linear(WIDTH, 23)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        memory = self.encoder(self.src(src))
        return self.generator(self.decoder(self.tgt(tgt), memory))


class Written(nn.Module):
    """Writes into the caller's list, which a graph of tensors cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, state: list[Tensor]) -> Tensor:
        state[0] = torch.tanh(self.cell(torch.cat([x[:, 0], state[0]], -1)))
        return x + state[0][:, None]


def _batch(batch: int, length: int, seed: int) -> Inputs:
    ids, mask = token_ids(batch, length, seed, VOCAB), padding_mask(batch, length)
    features = [floats(batch, 3, seed=seed + k) for k in (1, 2)]
    text = {"ids": ids, "mask": mask}
    return ({"text": text, "features": features, "meta": {"split": "train", "n": 3}},), {}


def _pair(batch: int, length: int, seed: int) -> Inputs:
    sides = (floats(batch, n, WIDTH, seed=seed + n) for n in (length, length + 2))
    return (Pair(*sides),), {}


def _keyword(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length, seed, VOCAB)
    return (), {"temperature": 0.7, "tokens": ids, "user": "someone"}


def _embeds(batch: int, length: int, seed: int) -> Inputs:
    mask = padding_mask(batch, length)
    x = floats(batch, length, WIDTH, seed=seed)
    return (), {"attention_mask": mask, "inputs_embeds": x, "output_hidden_states": True}


def _labelled(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length + 1, seed, VOCAB)
    labels = ids.masked_fill(padding_mask(batch, length + 1) == 0, -100)
    return (ids,), {"labels": labels}


def _several(batch: int, length: int, seed: int) -> Inputs:
    return (
        tuple(floats(batch, length + k, WIDTH, seed=seed + k) for k in range(3)),
        {"a": 0.5, "b": 2.0},
    )


def _languages(batch: int, length: int, seed: int) -> Inputs:
    tgt = token_ids(batch, length + 3, seed + 1, 23)
    return (token_ids(batch, length, seed, VOCAB), tgt), {}


def _state(batch: int, length: int, seed: int) -> Inputs:
    state = [floats(batch, WIDTH, seed=seed + 1)]
    return (floats(batch, length, WIDTH, seed=seed), state), {}


STRANGERS = [
    Stranger("tuple_out", builder(TupleOut), ids_only),
    Stranger("namedtuple_out", builder(NamedTupleOut), ids_only),
    Stranger("dataclass_out", builder(DataclassOut), ids_only),
    Stranger("nested_out", builder(NestedOut), ids_only),
    Stranger("batch_in", builder(Batched), _batch),
    Stranger("two_towers", builder(TwoTowers), _pair, shapes=((2, 7), (2, 11), (2, 1))),
    Stranger("keyword_only", builder(KeywordOnly), _keyword),
    Stranger("inputs_embeds", builder(Flexible), _embeds),
    Stranger("labels", builder(Flexible), _labelled, shapes=((2, 7), (3, 11), (1, 3))),
    Stranger("varargs", builder(VarArgs), _several),
    Stranger("translator", builder(Translator), _languages, shapes=((2, 7), (3, 11), (2, 1))),
    Stranger("positional_vectors", builder(Block), vectors),
    Stranger("writes_callers_list", builder(Written), _state, expect="refused", refused_by="list"),
]
