"""Models whose structure is known by hand: streams of images and signals, and more than one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .structures import BLOCKS, WIDTH, Attention, Decoder, Norm, ids, known


@known(
    "image patches and a class token",
    embeddings=("position",),
    inputs=lambda: (torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),),
)
class Patches(Decoder):
    attention = {"masked": False}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pos = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.empty(1, 5, WIDTH))
        self.token = nn.Parameter(torch.empty(1, 1, WIDTH))

    def embed(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.pos

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for b in self.h:
            x = self.block(b, x)
        return self.head(self.ln_f(x)[:, 0])


@known(
    "convolutions in front",
    embeddings=("position",),
    inputs=lambda: (torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0)),),
)
class Convolved(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.c2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def embed(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c2(F.gelu(self.c1(x.transpose(1, 2))))).transpose(1, 2)
        return x + self.wpe(torch.arange(x.shape[1]))


@known(
    "encoder and decoder",
    blocks=("attention cross_attention mlp",) * BLOCKS,
    beside=("attention mlp",) * BLOCKS,
    inputs=lambda: (ids(length=5, seed=1), ids()),
)
class EncoderDecoder(Decoder):
    """One table for both; `encoder` is the second stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList(self.parts() for _ in range(BLOCKS))
        for b in self.enc:
            b["attn"].masked = False
        self.ln_e = Norm()

    def more(self) -> dict[str, nn.Module]:
        return {"cross": Attention(masked=False)}

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:
        m = self.embed(source)
        for b in self.enc:
            m = super().block(b, m)
        m, x = self.ln_e(m), self.embed(ids)
        for b in self.h:
            x = x + b["attn"](b["n1"](x))
            x = x + b["cross"](b["n3"](x), m)
            x = x + b["mlp"](b["n2"](x))
        return self.head(self.ln_f(x))


@known(
    "encoder and decoder of the same ids",
    blocks=("attention cross_attention mlp",) * BLOCKS,
    beside=("attention mlp",) * BLOCKS,
)
class Denoiser(EncoderDecoder):
    """Both streams run over the same positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids, ids)


@known(
    "two towers",
    inputs=lambda: (ids(), torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))),
    beside=("attention mlp",) * BLOCKS,
    unembed=False,
)
class Towers(Decoder):
    """Two encoders that meet in a product of their last states."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.ModuleList(self.parts() for _ in range(BLOCKS))
        self.lift, self.ln_o, self.p = nn.Linear(WIDTH, WIDTH), Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, signal: Tensor) -> Tensor:
        x, y = self.embed(ids), self.lift(signal)
        for b in self.h:
            x = self.block(b, x)
        for b in self.other:
            y = self.block(b, y)
        a, b = self.head(self.ln_f(x)[:, -1]), self.p(self.ln_o(y)[:, 0])
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
