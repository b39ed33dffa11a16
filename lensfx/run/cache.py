"""The values of one run by hook name, with the shorthand users know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lensfx.errors import UnknownNameError
from lensfx.run.names import nearest

__all__ = ["ActivationCache"]


class ActivationCache(Mapping[str, torch.Tensor]):
    """Cached values by name: `cache["blocks.0.hook_resid_pre"]` or `cache["resid_pre", 0]`.

    Layers may be negative; `cache["normalized", 0, "ln1"]` names the part. Values are what the
    readers read, after every hook.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self._values = dict(values)
        self._names = tuple(names)
        layers = [int(n.split(".")[1]) for n in self._names if n.startswith("blocks.")]
        self.n_layers = max(layers, default=-1) + 1

    def __getitem__(self, key: str | tuple[Any, ...]) -> torch.Tensor:
        """The value of a full name or a shorthand.

        Raises: UnknownNameError naming the nearest names.
        """
        candidates = [key] if isinstance(key, str) else list(self._spelled(key))
        if isinstance(key, str):
            candidates.append(f"hook_{key}")
        for name in candidates:
            if name in self._values:
                return self._values[name]
        shown = candidates[0]
        if shown in self._names:
            raise UnknownNameError(
                f"{shown} was not kept in this run", hint=f"add {shown!r} to names_filter"
            )
        near = nearest(shown, self._values)
        hint = f"the nearest are {', '.join(near)}" if near else "list(cache) names them all"
        raise UnknownNameError(f"there is no value {key!r} in this cache", hint=hint)

    def _spelled(self, key: tuple[Any, ...]) -> Iterator[str]:
        name, layer, *part = key
        at = f"blocks.{layer % self.n_layers if self.n_layers else layer}"
        if part:
            yield f"{at}.{part[0]}.hook_{name}"
        else:
            yield f"{at}.hook_{name}"
            yield f"{at}.attn.hook_{name}"
            yield f"{at}.mlp.hook_{name}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same cache with every value on `device`."""
        return ActivationCache({k: v.to(device) for k, v in self._values.items()}, self._names)

    def __repr__(self) -> str:
        return f"ActivationCache with {len(self)} values: {', '.join(list(self)[:6])} ..."
