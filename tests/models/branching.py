"""Models whose path through the code depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Inputs, builder, token_ids
from .stranger import VOCAB, WIDTH, Stranger, floats, ids_only, vectors
from .trunk import GPT


class Two(nn.Module):
    """Two layers for the bodies below to choose from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class SignBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.a(x)
        return self.b(x).relu()


class NotBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not (h.mean() < 0) and bool(h.isfinite().all()):
            h = h * 2
        elif h.max() > 3:
            h = self.b(h)
        return h


class ItemBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        peak = x.abs().max().item()
        return self.a(x / 2) if peak > 2.7 else self.b(x)


class WeightBranch(Two):
    """Decides on a weight and on a buffer, neither of which a call can change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("enabled", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        if self.enabled and self.a.weight.norm() > 0.5:
            x = self.a(x)
        return self.b(x)


class SizeFromValue(nn.Module):
    """Pads every row to the longest length that the batch asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        keep = torch.arange(longest, device=ids.device)[None] < lengths[:, None]
        return self.emb(ids[:, :longest]) * keep[..., None]


class RangeFromValue(Two):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n.max())):
            x = x + self.a(x).tanh()
        return self.b(x)


class EarlyExit(GPT):
    """Stops at the first layer that is sure enough of itself."""

    def __init__(self) -> None:
        super().__init__(layers=3)

    def forward(self, idx: Tensor) -> Any:
        x, depth = self.embed(idx), 0
        for block in self.h:
            x, depth = block(x), depth + 1
            logits = self.lm_head(self.ln_f(x))
            if logits.softmax(-1).amax(-1).mean() > 0.74:
                break
        return {"logits": logits, "depth": depth}


class Converging(Two):
    """A fixed point by iteration: as many steps as it takes, at most eight."""

    def forward(self, x: Tensor) -> Tensor:
        z, steps = torch.zeros_like(x), 0
        while steps < 8:
            new = torch.tanh(0.5 * self.a(z) + x)
            if torch.max(torch.abs(new - z)) < 0.02:
                break
            z, steps = new, steps + 1
        return self.b(z)


class EqualBranch(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.equal(x, y) or torch.allclose(x, -y):
            return self.a(x)
        return self.a(x) + self.b(y)


class TolistLoop(nn.Module):
    """Cuts the rows apart at lengths given as values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pooled = [self.lin(row[:n]).mean(0) for row, n in zip(x, lengths.tolist(), strict=True)]
        return torch.stack(pooled)


class InPlaceThenBranch(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.neg_()
        if y.sum() > 0:
            y += self.a(y)
        return self.b(y)


class MaskOrNot(nn.Module):
    """Skips the mask when there is nothing to mask, as the library encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if mask.all():
            return F.scaled_dot_product_attention(q, k, v)
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, -1e4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, :])


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        out, _ = self.lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]


class Adaptive(Two):
    """Halts position by position: loops until every position has had enough."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[:-1])
        for _ in range(5):
            p = torch.sigmoid(self.a(x)[..., 0])
            running = total < 0.9
            if not running.any():
                break
            total = total + p * running
            x = torch.where(running[..., None], x + self.b(x).tanh(), x)
        return x


class PrunedPositions(Two):
    """Drops the positions that score low: the result's length depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x).mean((0, 2))
        kept = torch.nonzero(scores > scores.median() - 1e-6).squeeze(-1)
        if kept.shape[0] < 1:
            return self.b(x)
        return self.b(x[:, kept])


def _lengths(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[0] = length
    return lengths


def _ids_and_lengths(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length, seed, VOCAB)
    return (ids, _lengths(batch, length, seed)), {}


def _vectors_and_lengths(batch: int, length: int, seed: int) -> Inputs:
    x = floats(batch, length, WIDTH, seed=seed)
    return (x, _lengths(batch, length, seed)), {}


def _steps(batch: int, length: int, seed: int) -> Inputs:
    x = floats(batch, length, WIDTH, seed=seed)
    return (x,), {"n": torch.tensor([1, 2 + seed % 2])}


def _twice(batch: int, length: int, seed: int) -> Inputs:
    x = floats(batch, length, WIDTH, seed=seed)
    return (x, x.clone() if seed % 2 else x + 1), {}


def _masked(batch: int, length: int, seed: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[:, length - seed % 2 :] = False
    if length == 1:
        mask[:] = True
    return (floats(batch, length, WIDTH, seed=seed),), {"mask": mask}


def _one(name: str, factory: Callable[[], nn.Module], inputs: Any = vectors) -> Stranger:
    return Stranger(f"branch_{name}", builder(factory), inputs, "branch")


STRANGERS = [
    _one("sign", SignBranch),
    _one("not", NotBranch),
    _one("item", ItemBranch),
    _one("weight", WeightBranch),
    _one("size", SizeFromValue, _ids_and_lengths),
    _one("range", RangeFromValue, _steps),
    _one("early_exit", EarlyExit, ids_only),
    _one("converging", Converging),
    _one("equal", EqualBranch, _twice),
    _one("tolist", TolistLoop, _vectors_and_lengths),
    _one("in_place", InPlaceThenBranch),
    _one("mask_all", MaskOrNot, _masked),
    Stranger(
        "branch_packed_lstm",
        builder(PackedLSTM),
        _vectors_and_lengths,
        "refused",
        refused_by="not allocated yet",
        note="torch packs sequences in a kernel that no trace can follow, here at the root",
    ),
    _one("adaptive", Adaptive),
    _one("pruned", PrunedPositions),
]
