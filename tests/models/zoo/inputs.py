"""Inputs for a model, from the signature of its forward and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .configs import is_config
from .sizes import FIRST_FREE_ID, HIDDEN, VOCAB

_MODALITIES = ("pixel_values", "input_features", "input_values", "image_grid_thw")
# What some models want beside an image; others derive it.
_COMPANIONS = (
    "spatial_shapes",
    "pixel_attention_mask",
    "image_sizes",
    "token_type_ids",
    "position_ids",
    "pixel_position_ids",
    "image_position_ids",
)


@dataclass(frozen=True)
class Plan:
    """What to pass: argument names, the kind of image and sound, how many image tokens a row."""

    names: tuple[str, ...]
    image: str = "plain"
    sound: str = "bins first"
    image_tokens: int = 0
    length: int = 0
    rows: int = 1
    choices: int = 0
    sees: bool = False

    def __str__(self) -> str:
        return ", ".join(self.names)


def plans(model: Any) -> Iterator[Plan]:
    """Ways to call a model, those that use more of it first."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    main = model.main_input_name
    main = [main] if isinstance(main, str) else list(main)
    main = [n for n in main if n in parameters or open_ended]
    text = [n for n in ("input_ids", "attention_mask") if n in parameters]
    more = [n for n in _MODALITIES if n in parameters]
    decoder = [n for n in ("decoder_input_ids",) if n in parameters]
    extra = [n for n in ("bbox",) if n in parameters]
    minimal = _unique(main, required, decoder)
    choices = [
        _unique(main, text, required, more, decoder, extra),
        _unique(main, text, required, decoder, extra),
        _unique(main, required, more, decoder),
        _unique(main, text, required, more, [n for n in ("mm_token_type_ids",) if n in parameters]),
        minimal,
        _unique(main, required),
        _unique(main, text, required, more, decoder, [n for n in _COMPANIONS if n in parameters]),
    ]
    for names in dict.fromkeys(choices):
        images = ("plain", "video", "tiles", "patches") if _seen(names) else ("plain",)
        if "image_grid_thw" in names or "grid_thw" in names:
            images = ("grid",)
        sounds = ("bins first", "bins last", "long", "wave") if _heard(names) else ("bins first",)
        for image in images:
            for sound in sounds:
                yield Plan(names, image, sound, sees="pixel_values" in parameters)


def _unique(*names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for group in names for n in group))


def _seen(names: tuple[str, ...]) -> bool:
    return any("pixel_values" in n or n == "inputs" for n in names)


def _heard(names: tuple[str, ...]) -> bool:
    return any(n in ("input_features", "input_values") for n in names)


def arguments(model: Any, plan: Plan, batch: int, length: int) -> dict[str, Any]:
    """The keyword arguments of one call, the same for the same arguments.

    Raises: KeyError naming an argument that nothing is known about.
    """
    maker = _Maker(model, plan, batch, plan.length or length)
    made = {name: maker.make(name) for name in plan.names}
    if plan.choices:
        made = {n: v.unsqueeze(1).repeat_interleave(plan.choices, 1) for n, v in made.items()}
    return made


class _Maker:
    def __init__(self, model: Any, plan: Plan, batch: int, length: int) -> None:
        self.config, self.plan = model.config, plan
        self.batch, self.length = batch, length
        self._generator = torch.Generator().manual_seed(batch)

    def make(self, name: str) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "input_ids": self._ids,
            "decoder_input_ids": self._plain_ids,
            "attention_mask": self._mask,
            "bbox": self._boxes,
            "pixel_values": self._image,
            "pixel_values_videos": lambda: self._video(),
            "image_grid_thw": self._grid,
            "grid_thw": self._grid,
            "hidden_states": self._patches_or_states,
            "input_features": self._features,
            "input_values": self._sound,
            "input_features_mask": lambda: torch.ones(self.batch, self._frames(), dtype=torch.bool),
            "past_values": lambda: self._noise(self.batch, *self._series()),
            "past_observed_mask": lambda: torch.ones(self.batch, *self._series()),
            "past_time_features": lambda: self._noise(
                self.batch, self._series()[0], self.size("num_time_features", 1)
            ),
            "qformer_input_ids": self._plain_ids,
            "inputs_embeds": lambda: self._noise(self.batch, self.length, self._hidden()),
            "query_embeds": lambda: self._noise(self.batch, 4, self._hidden()),
            "state": lambda: None,
            "inputs": lambda: self._image() if self.plan.sees else self._ids(),
            "mm_token_type_ids": lambda: (self._ids() == self._image_token()).long(),
            "image_sizes": lambda: torch.tensor([self._image_size()] * self.batch),
            "token_type_ids": lambda: torch.zeros(self.batch, self.length, dtype=torch.int64),
            "position_ids": lambda: torch.arange(self.length).expand(self.batch, self.length),
            "spatial_shapes": lambda: torch.tensor([[4, 4]] * self.batch),
            "pixel_attention_mask": self._pixel_mask,
            "pixel_mask": self._pixel_mask,
            "bool_masked_pos": lambda: torch.zeros(self.batch, self._patch_count()).bool(),
            "flattened_patches": lambda: self._flattened(),
        }
        if name in makers:
            return makers[name]()
        if name.endswith("ids"):
            return self._plain_ids()
        raise KeyError(name)

    def size(self, name: str, default: Any) -> Any:
        """The value of a field, looked for in the config and in the configs inside it."""
        for config in walk(self.config):
            if (value := getattr(config, name, None)) is not None:
                return value
        return default

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _hidden(self) -> int:
        return int(self.size("hidden_size", HIDDEN))

    def _plain_ids(self) -> Tensor:
        high = min(int(self.size("vocab_size", VOCAB)), VOCAB - 24)
        return torch.randint(
            FIRST_FREE_ID,
            high,
            (self.batch * self.plan.rows, self.length),
            generator=self._generator,
        )

    def _ids(self) -> Tensor:
        ids = self._plain_ids()
        count = self.plan.image_tokens
        if count:
            token = self._image_token()
            ids = torch.cat([ids[:, :1], torch.full((self.batch, count), token), ids[:, 1:]], 1)
        return ids

    def _image_token(self) -> int:
        for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
            if (value := self.size(name, None)) is not None:
                return int(value)
        raise KeyError("image_token_id")

    def _mask(self) -> Tensor:
        length = self.length + self.plan.image_tokens
        mask = torch.ones(self.batch, length, dtype=torch.int64)
        if length > 3:
            mask[1::2, length - 2 :] = 0
        return mask

    def _boxes(self) -> Tensor:
        corner = torch.randint(0, 8, (self.batch, self.length, 2), generator=self._generator)
        return torch.cat([corner, corner + 5], -1)

    def _image_size(self) -> tuple[int, int]:
        size = self.size("image_size", self.size("img_size", 32))
        if isinstance(size, dict):
            size = (size.get("height", 32), size.get("width", 32))
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return int(height), int(width)

    def _channels(self) -> int:
        return int(self.size("num_channels", self.size("in_channels", self.size("in_chans", 3))))

    def _image(self) -> Tensor:
        kind = self.plan.image
        if kind == "video":
            return self._video()
        if kind == "tiles":
            return self._noise(self.batch, 1, self._channels(), *self._image_size())
        patch = self._patch()
        if kind == "grid":
            frames = int(self.size("temporal_patch_size", 1))
            return self._noise(self.batch * 16, self._channels() * frames * patch * patch)
        if kind == "patches":
            return self._noise(self.batch, 16, self._channels() * patch * patch)
        return self._noise(self.batch, self._channels(), *self._image_size())

    def _pixel_mask(self) -> Tensor:
        if self.plan.image == "patches":
            return torch.ones(self.batch, 16, dtype=torch.int64)
        return torch.ones(self.batch, *self._image_size(), dtype=torch.int64)

    def _patch_count(self) -> int:
        height, width = self._image_size()
        return (height // self._patch()) * (width // self._patch())

    def _flattened(self) -> Tensor:
        where = torch.tensor([[i // 4 + 1, i % 4 + 1] for i in range(16)]).expand(self.batch, 16, 2)
        pixels = self._noise(self.batch, 16, self._channels() * self._patch() ** 2)
        return torch.cat([where.float(), pixels], -1)

    def _patch(self) -> int:
        patch = self.size("patch_size", 8)
        return int(patch[0] if isinstance(patch, (list, tuple)) else patch)

    def _video(self) -> Tensor:
        frames = int(self.size("num_frames", self.size("frames_per_clip", 4)))
        return self._noise(self.batch, frames, self._channels(), *self._image_size())

    def _grid(self) -> Tensor:
        return torch.tensor([[1, 4, 4]] * self.batch)

    def _patches_or_states(self) -> Tensor:
        if "grid_thw" in self.plan.names:
            return replaced(self, "grid")._image()
        return self._noise(self.batch, self.length, self._hidden())

    def _bins(self) -> int:
        names = (
            "feature_projection_input_dim",
            "num_mel_bins",
            "input_feat_per_channel",
            "feature_size",
            "n_mels",
            "input_dim",
        )
        return next((int(v) for n in names if (v := self.size(n, None)) is not None), 80)

    def _frames(self) -> int:
        if (positions := self.size("max_source_positions", None)) is not None:
            return 2 * int(positions)
        return 32

    def _features(self) -> Tensor:
        shapes = {
            "bins first": (self._bins(), self._frames()),
            "bins last": (self._frames(), self._bins()),
            "long": (int(self.size("max_length", 1024)), self._bins()),
            "wave": (8000,),
        }
        return self._noise(self.batch, *shapes[self.plan.sound])

    def _sound(self) -> Tensor:
        shapes = {
            "bins first": (8000,),
            "bins last": (1, 8000),
            "long": (int(self.size("max_length", 1024)), self._bins()),
            "wave": (self.length, self._bins()),
        }
        return self._noise(self.batch, *shapes[self.plan.sound])

    def _series(self) -> tuple[int, ...]:
        length = int(self.size("context_length", 32))
        lags = self.size("lags_sequence", None)
        if isinstance(lags, (list, tuple)) and lags:
            return (length + max(lags),)
        if (channels := self.size("num_input_channels", None)) is not None:
            return (length, int(channels))
        return (length,)


def replaced(maker: _Maker, image: str) -> _Maker:
    maker.plan = replace(maker.plan, image=image)
    return maker


def walk(config: Any) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for value in vars(config).values():
        if is_config(value):
            yield from walk(value)
