"""Images, spectrograms and waveforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Inputs, builder
from .stranger import WIDTH, Stranger, floats


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 10, WIDTH) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        B, N, C = x.shape
        h = self.norm1(x)
        q, k, v = self.qkv(h).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        attn = (q @ k.transpose(-2, -1) * (C // 2) ** -0.5).softmax(dim=-1)
        x = x + self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class InterpolatingViT(ViT):
    """Stretches its table of positions over images of any size."""

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        B, _, gh, gw = x.shape
        grid = self.pos_embed[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(gh, gw), mode="bicubic", align_corners=False)
        x = (x + grid).flatten(2).transpose(1, 2)
        h = self.norm1(torch.cat([self.cls_token.repeat(B, 1, 1) + self.pos_embed[:, :1], x], 1))
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.head(self.norm2(self.proj(F.scaled_dot_product_attention(q, k, v)))[:, 0])


class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.tokens = nn.Sequential(nn.Linear(9, 18), nn.GELU(), nn.Linear(18, 9))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).mT
        x = x + self.tokens(self.n1(x).mT).mT
        x = x + self.channels(self.n2(x))
        return x.mean(dim=1)


class ResNet(nn.Module):
    """Two residual stages with batch norm, the second with a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.downsample = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        out = self.relu(out)
        return self.fc(self.pool(out).flatten(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(3, 3, kernel_size=7, padding=3, groups=3)
        self.norm = nn.LayerNorm(3, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(3, 12), nn.Linear(12, 3)
        self.gamma = nn.Parameter(1e-6 * torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        input = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        return input + (self.gamma * x).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(WIDTH, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(4, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.downs = nn.ModuleList([ResBlock(8, 8), ResBlock(8, 12)])
        self.mid_attn = nn.MultiheadAttention(12, 2, batch_first=True)
        self.mid = ResBlock(12, 12)
        self.ups = nn.ModuleList([ResBlock(24, 8), ResBlock(16, 8)])
        self.conv_out = nn.Conv2d(8, 3, 1)

    def timestep_embedding(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10000) * torch.arange(4, device=t.device) / 4)
        args = t[:, None].float() * freqs[None]
        return torch.cat([args.cos(), args.sin()], dim=-1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        emb = self.time_mlp(self.timestep_embedding(timestep))
        x, skips = self.conv_in(sample), []
        for down in self.downs:
            x = down(x, emb)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        b, c, h, w = x.shape
        seq = x.view(b, c, h * w).transpose(1, 2)
        x = x + self.mid_attn(seq, seq, seq, need_weights=False)[0].transpose(1, 2).view(b, c, h, w)
        x = self.mid(x, emb)
        for up in self.ups:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = up(torch.cat([x, skips.pop()], dim=1), emb)
        return self.conv_out(x)


class WaveNet(nn.Module):
    """Dilated causal convolutions over a waveform, gated, skip outputs summed."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv1d(1, 8, 1)
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(8, 16, 1) for _ in range(3))

    def forward(self, wav: Tensor) -> Tensor:
        x, total = self.lift(wav.unsqueeze(1)), 0
        for i, (gate, mix) in enumerate(zip(self.gates, self.mixes, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            res, skip = mix(a.tanh() * b.sigmoid()).chunk(2, 1)
            x, total = x + res, total + skip
        return total.relu().mean(1)


class AudioEncoder(nn.Module):
    """A strided stack with a normalised spectrogram in front."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16), persistent=False)
        self.conv = nn.Sequential(
            nn.Conv1d(9, 12, 3, padding=1), nn.BatchNorm1d(12), nn.LeakyReLU(0.1, inplace=True)
        )
        self.out = nn.Linear(12, 6)

    def forward(self, audio: Tensor) -> Tensor:
        spec = torch.stft(audio, 16, 8, window=self.window, center=True, return_complex=True)
        mel = torch.log(spec.abs().square() + 1e-5)
        mel = (mel - mel.mean((1, 2), keepdim=True)) / mel.std((1, 2), keepdim=True)
        return self.out(self.conv(mel).transpose(1, 2))


def _images(size: Callable[[int], int]) -> Callable[[int, int, int], Inputs]:
    def inputs(batch: int, length: int, seed: int) -> Inputs:
        return (floats(batch, 3, size(length), size(length) + 4, seed=seed),), {}

    return inputs


def _squares(batch: int, length: int, seed: int) -> Inputs:
    return (floats(batch, 3, 12, 12, seed=seed),), {}


def _noisy(batch: int, length: int, seed: int) -> Inputs:
    image = floats(batch, 3, 4 * length, 8, seed=seed)
    steps = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(seed))
    return (image,), {"timestep": steps}


def _wave(batch: int, length: int, seed: int) -> Inputs:
    return (floats(batch, 16 * length, seed=seed),), {}


def _one(name: str, factory: Callable[[], nn.Module], inputs: Any, **more: Any) -> Stranger:
    return Stranger(name, builder(factory), inputs, **more)


_FIXED: dict[str, Any] = {"note": "one image size", "shapes": ((2, 3), (3, 3), (1, 3))}
_FROM_TWO = ((2, 7), (3, 11), (2, 2))

STRANGERS = [
    _one("vit", ViT, _squares, **_FIXED),
    _one("vit_interpolating", InterpolatingViT, _images(lambda n: 4 * n), shapes=_FROM_TWO),
    _one("mlp_mixer", MLPMixer, _squares, **_FIXED),
    _one("resnet", ResNet, _images(lambda n: n + 8)),
    _one("convnext", ConvNeXtBlock, _images(lambda n: n + 8)),
    _one("diffusion_unet", DiffusionUNet, _noisy, shapes=_FROM_TWO),
    _one("wavenet", WaveNet, _wave),
    _one("audio_encoder", AudioEncoder, _wave, shapes=((2, 7), (3, 11), (1, 4))),
]
