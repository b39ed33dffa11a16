"""The values of one run by hook name, with the shorthand users know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from lensfx.errors import UnknownNameError
from lensfx.run.names import nearest

__all__ = ["ActivationCache"]


_LAYER = re.compile(r"blocks\.(\d+)\.(?:\w+\.)?hook_\w+$")
_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "mlp_mid": "mid",
    "mlp_post": "post",
    "mlp_pre": "pre",
    "query": "q",
    "value": "v",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


class ActivationCache(Mapping[str, torch.Tensor]):
    """Cached values by name: `cache["blocks.0.hook_resid_pre"]` or `cache["resid_pre", 0]`.

    Layers may be negative; `cache["normalized", 0, "ln1"]` names the part, and TransformerLens'
    other short names, as in `cache["attn", 0]` for the pattern, are understood. Values are what
    the readers read, after every hook.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        self._values = dict(values)
        self._names = tuple(names)

    @cached_property
    def n_layers(self) -> int:
        """How many blocks the names speak of, kept or not."""
        layers = [int(found[1]) for n in self._names if (found := _LAYER.match(n))]
        return max(layers, default=-1) + 1

    def __getitem__(self, key: str | tuple[Any, ...]) -> torch.Tensor:
        """The value of a full name or a shorthand.

        Raises: UnknownNameError naming the nearest names.
        """
        spelled = list(self._spelled(*(key if isinstance(key, tuple) else (key,))))
        if isinstance(key, str):
            spelled.insert(0, key)
        for name in spelled:
            if name in self._values:
                return self._values[name]
        for name in spelled:
            if name in self._names:
                raise UnknownNameError(
                    f"{name} was not kept in this run", hint=f"add {name!r} to names_filter"
                )
        near = nearest(spelled[0] if spelled else str(key), self._values)
        hint = f"the nearest are {', '.join(near)}" if near else "list(cache) names them all"
        raise UnknownNameError(f"there is no value {key!r} in this cache", hint=hint)

    def _spelled(
        self, name: Any = "", layer: Any = None, part: Any = None, *rest: Any
    ) -> Iterator[str]:
        """The full names a shorthand may stand for; none for a layer that does not exist."""
        if rest or not isinstance(name, str):
            return
        name = _ALIASES.get(name, name)
        if layer is None:
            yield from (f"hook_{name}", f"ln_final.hook_{name}")
        elif isinstance(layer, int) and -self.n_layers <= layer < self.n_layers:
            at = f"blocks.{layer % self.n_layers}"
            given = ("", "attn", "mlp") if part is None else (_PARTS.get(part, part),)
            for place in given:
                yield f"{at}.{place}.hook_{name}" if place else f"{at}.hook_{name}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same cache with every value on `device`."""
        return ActivationCache({k: v.to(device) for k, v in self._values.items()}, self._names)

    def __repr__(self) -> str:
        shown = ", ".join([*list(self)[:6], *(["..."] if len(self) > 6 else [])])
        return f"ActivationCache with {len(self)} values: {shown}" if shown else "an empty cache"
