"""Checkpoint: weights by name, in a dict, a module, an open file, or files that are read lazily."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lensfx.errors import RewriteError

__all__ = ["Checkpoint"]

_PREFIXES = ("_orig_mod.", "module.")
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_HINT = "give a .safetensors file, its index, or a directory of shards"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model by name.

    `stored` maps each name, as the model has it, to the one it is kept under. `module` is the
    module that holds them, if one does; `held` is whether they are in memory whether read or not,
    `mapped` whether what is read may be a file's memory. `states` are the names a state dict has.
    """

    stored: Mapping[str, str]
    states: frozenset[str]
    read_stored: Callable[[str], Any]
    kind_stored: Callable[[str], tuple[tuple[int, ...] | None, torch.dtype | None]]
    module: nn.Module | None = None
    held: bool = False
    mapped: bool = False

    @classmethod
    def of(cls, weights: Any, known: Collection[str]) -> Checkpoint:
        """The checkpoint that was meant, by the names of a model that has the names `known`.

        A prefix that a wrapper of the model put before every name is left out.
        Raises: RewriteError if it is none, or cannot be read.
        """
        if isinstance(weights, (str, os.PathLike)):
            return _files(Path(weights), known)
        if isinstance(weights, nn.Module):
            return _of_module(weights, known)
        if not callable(getattr(weights, "keys", None)):
            raise RewriteError(
                f"weights are given as {type(weights).__name__}",
                hint="pass a state dict, a safetensors file, or the module that holds them",
            )
        odd = [n for n in weights.keys() if not isinstance(n, str)]
        if odd:
            raise RewriteError(
                f"the weights have the name {odd[0]!r}, which is no text",
                hint="name the weights as the model's state_dict does",
            )
        names = [n for n in weights.keys() if not n.endswith("_extra_state")]
        stored, _ = _without_prefix(names, known)
        lazily = getattr(weights, "get_tensor", None)
        held = isinstance(weights, dict)
        return cls(
            stored,
            frozenset(stored),
            lazily or weights.__getitem__,
            _kind_in_memory(weights) if held else _kind_in_file(weights),
            held=held,
            mapped=lazily is not None,
        )

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> Any:
        """The tensor of a name, read now if it is not in memory."""
        return self.read_stored(self.stored[name])

    def kind(self, name: str) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
        """Shape and dtype of a tensor; None for what is not known before it is read."""
        return self.kind_stored(self.stored[name])

    def as_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.stored}


def _without_prefix(names: Collection[str], known: Collection[str]) -> tuple[dict[str, str], str]:
    prefix = ""
    while True:
        found = (prefix + p for p in _PREFIXES)
        longer = next((p for p in found if names and all(n.startswith(p) for n in names)), None)
        if longer is None or any(n.startswith(longer) for n in known):
            return {n[len(prefix) :]: n for n in names}, prefix
        prefix = longer


def _of_module(module: nn.Module, known: Collection[str]) -> Checkpoint:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    tensors: dict[str, torch.Tensor] = {**parameters, **buffers}
    stored, prefix = _without_prefix(tensors, known)
    passing = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    states = frozenset(name for name, full in stored.items() if full not in passing)
    inner = module.get_submodule(prefix[:-1]) if prefix else module
    kind = _kind_in_memory(tensors)
    return Checkpoint(stored, states, tensors.__getitem__, kind, inner, held=True)


def _kind_in_memory(weights: Mapping[str, Any]) -> Callable[[str], Any]:
    def kind(name: str) -> tuple[Any, Any]:
        value = weights[name]
        is_tensor = isinstance(value, torch.Tensor)
        return (tuple(value.shape), value.dtype) if is_tensor else (None, None)

    return kind


def _kind_in_file(opened: Any) -> Callable[[str], Any]:
    def kind(name: str) -> tuple[Any, Any]:
        if not hasattr(opened, "get_slice"):
            return None, None
        part = opened.get_slice(name)
        return tuple(part.get_shape()), _dtype(str(part.get_dtype()))

    return kind


def _dtype(code: str) -> torch.dtype | None:
    """The dtype of a safetensors code such as BF16; None for one that is not seen as such."""
    if code == "BOOL":
        return torch.bool
    found = re.fullmatch(r"([A-Z]+)(\d+)", code)
    name = f"{_KINDS.get(found[1], '')}{found[2]}" if found else ""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _files(path: Path, known: Collection[str]) -> Checkpoint:
    at: dict[str, Path] = {}
    kinds: dict[str, Any] = {}
    for shard, wanted in _shards(path).items():
        with _opened(shard) as opened:
            kind = _kind_in_file(opened)
            names = list(opened.keys())
            lost = [n for n in wanted or () if n not in names]
            if lost:
                raise RewriteError(
                    f"{shard.name} does not hold {', '.join(lost[:3])}, which its index says",
                    at=str(shard),
                    hint="load the shards again",
                )
            kinds |= {name: kind(name) for name in names}
            at |= dict.fromkeys(names if wanted is None else wanted, shard)
    stored, _ = _without_prefix(at, known)

    def read(name: str) -> torch.Tensor:
        # Opened anew for each: what has been read of a file stays resident while it is open.
        with _opened(at[name]) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    return Checkpoint(stored, frozenset(stored), read, kinds.__getitem__, mapped=True)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise RewriteError(
            f"{path} cannot be read as safetensors: {error}",
            hint="torch.load(path, weights_only=True, mmap=True) reads other files as a dict",
        ) from error


def _shards(path: Path) -> dict[Path, list[str] | None]:
    """The files of a checkpoint, each with the names that an index gives it."""
    if path.is_dir():
        if (path / _INDEX).is_file():
            return _shards(path / _INDEX)
        found = sorted(path.glob("*.safetensors"))
        whole = [f for f in found if f.name == _WHOLE]
        if not found:
            raise RewriteError(f"{path} holds no .safetensors file", hint=_HINT)
        return dict.fromkeys(whole or found)
    if not path.is_file():
        raise RewriteError(f"there is no file {path}", hint=_HINT)
    if path.suffix != ".json":
        return {path: None}
    shards: dict[Path, list[str] | None] = {}
    for name, file in _weight_map(path).items():
        names = shards.setdefault(path.parent / file, [])
        assert names is not None
        names.append(name)
    absent = [s.name for s in shards if not s.is_file()]
    if absent:
        raise RewriteError(f"the index names {', '.join(absent)}, not there", at=str(path))
    return shards


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(k): str(v) for k, v in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewriteError(f"{path} is no index of safetensors shards", hint=_HINT) from error
