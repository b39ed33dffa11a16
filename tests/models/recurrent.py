"""Things that go along the sequence: recurrences, scans, long convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import builder
from .stranger import ONE_LENGTH, VOCAB, WIDTH, Stranger, floats, ids_only, vectors


class SelectiveScan(nn.Module):
    """A state-space layer whose recurrence is a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)
        self.x_proj = nn.Linear(WIDTH, 2 + 2 * 3, bias=False)
        self.dt_proj = nn.Linear(2, WIDTH)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, 4).repeat(WIDTH, 1)))
        self.D = nn.Parameter(torch.ones(WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        _, L, _ = hidden.shape
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :L].transpose(1, 2))
        dt, B, C = self.x_proj(x).split([2, 3, 3], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        y = self.scan(x, dt, -torch.exp(self.A_log.float()), B, C) + x * self.D
        return self.out_proj(y * F.silu(z))

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], WIDTH, 3)
        ys = []
        for t in range(x.shape[1]):
            dA = torch.exp(dt[:, t, :, None] * A)
            state = dA * state + dt[:, t, :, None] * B[:, t, None, :] * x[:, t, :, None]
            ys.append((state * C[:, t, None, :]).sum(-1))
        return torch.stack(ys, dim=1)


class CumsumScan(SelectiveScan):
    """The same state space in one go, by cumulative sums in the exponent."""

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = (dt[..., None] * A).cumsum(1)
        drive = dt[..., None] * B[:, :, None] * x[..., None] * torch.exp(-decay.clamp(min=-20))
        return torch.einsum("btdn,btn->btd", drive.cumsum(1) * torch.exp(decay), C)


class TimeMix(nn.Module):
    """Token shift and a decaying linear attention, as a triangular product."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.ParameterDict({k: nn.Parameter(torch.rand(WIDTH)) for k in "rkv"})
        self.time_decay = nn.Parameter(torch.rand(WIDTH))
        self.time_first = nn.Parameter(torch.rand(WIDTH))
        self.proj = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH, bias=False) for k in "rkvo"})
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))

    def forward(self, x: Tensor) -> Tensor:
        xx = self.shift(x)
        r, k, v = (self.proj[n](x * self.mu[n] + xx * (1 - self.mu[n])) for n in "rkv")
        T = x.size(1)
        gap = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
        w = -torch.exp(self.time_decay)[None, None] * (gap - 1).clamp(min=0)[..., None]
        w = torch.where(gap[..., None] == 0, self.time_first, w)
        w = w.masked_fill((gap < 0)[..., None], float("-inf")).exp()
        ek = k.clamp(max=30).exp()
        num = torch.einsum("tsd,bsd->btd", w, ek * v)
        den = torch.einsum("tsd,bsd->btd", w, ek)
        return self.proj["o"](r.sigmoid() * num / den)


class GatedRecurrence(nn.Module):
    """A linear recurrence with a gate per channel, two layers, state passed in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.Linear(2 * WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor, h: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        if h is None:
            h = [torch.zeros(x.shape[0], WIDTH, device=x.device, dtype=x.dtype) for _ in range(2)]
        h = list(h)
        outputs = []
        for step in x.unbind(1):
            for i, cell in enumerate(self.cells):
                r, z, n = cell(torch.cat([step, h[i]], dim=-1)).chunk(3, -1)
                h[i] = torch.lerp(h[i], torch.tanh(r.sigmoid() * n), z.sigmoid())
                step = h[i]
            outputs.append(step)
        return torch.stack(outputs, 1), h


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.lstm = nn.LSTM(WIDTH, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.tag = nn.Linear(16, 5)

    def forward(self, words: Tensor) -> Tensor:
        out, (h, _) = self.lstm(self.emb(words))
        return self.tag(out) + self.tag(torch.cat([h[-2], h[-1]], -1))[:, None]


class GRUEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.h0 = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out, h = self.gru(x, self.h0.expand(-1, x.size(0), -1).contiguous())
        return {"sequence": out, "state": h.squeeze(0)}


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
        assert state is not None
        return state[0]


class LongConv(nn.Module):
    """A convolution as long as the sequence, by FFT; its filter comes from a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, WIDTH))
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, u: Tensor) -> Tensor:
        L = u.shape[1]
        t = self.times(u)[:, None]
        k = self.filter(torch.cat([t, torch.sin(t), torch.cos(t)], -1))
        k = k * torch.exp(-t * self.decay.abs())
        y = torch.fft.irfft(
            torch.fft.rfft(u, 2 * L, dim=1) * torch.fft.rfft(k, 2 * L, dim=0), dim=1
        )
        return y[:, :L]

    def times(self, u: Tensor) -> Tensor:
        return torch.arange(u.shape[1], device=u.device) / u.shape[1]


class LinspaceConv(LongConv):
    def times(self, u: Tensor) -> Tensor:
        return torch.linspace(0, 1, u.shape[1], device=u.device)


class TokenMixing(nn.Module):
    """A mean over the past, and a running maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.size(1) + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
        mean = torch.cumsum(x, 1) / count
        return x + self.mix(torch.cat([mean, torch.cummax(x, 1).values], -1))


def _with_state(batch: int, length: int, seed: int) -> Any:
    state = [floats(batch, WIDTH, seed=seed + k) for k in (1, 2)]
    return (floats(batch, length, WIDTH, seed=seed),), {"h": state}


def _one(name: str, factory: Callable[[], nn.Module], **more: Any) -> Stranger:
    return Stranger(name, builder(factory), more.pop("inputs", vectors), **more)


_LOOP: dict[str, Any] = {"note": "a loop over time specialises the length", "shapes": ONE_LENGTH}
_KERNEL = "torch traces its recurrent kernels at one length"

STRANGERS = [
    _one("scan_loop", SelectiveScan, **_LOOP),
    _one("scan_cumsum", CumsumScan),
    _one("time_mix", TimeMix),
    _one("gated_recurrence", GatedRecurrence, **_LOOP),
    _one("gated_recurrence_state", GatedRecurrence, inputs=_with_state, **_LOOP),
    _one("lstm_tagger", LSTMTagger, inputs=ids_only, note=_KERNEL, shapes=ONE_LENGTH),
    _one("gru_encoder", GRUEncoder, note=_KERNEL, shapes=ONE_LENGTH),
    _one("cell_loop", CellLoop, **_LOOP),
    _one("long_conv", LongConv),
    _one("linspace_conv", LinspaceConv, note="linspace takes no symbol", shapes=ONE_LENGTH),
    _one("token_mixing", TokenMixing),
]
