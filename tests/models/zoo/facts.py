"""What a tiny model is by its config and its modules: what a structure found in its graph must say.

Nothing of this is read by lensfx, which sees the graph alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .builder import LENGTH, Built
from .configs import is_config

_HEADS = re.compile(r"(^|_)(n_heads?|num_heads|num_attention_heads|attention_heads|attn_heads)$")
_ANY_HEADS = re.compile(r"(?<!experts_)heads?$")
_KV_HEADS = re.compile(r"(kv|key_value)_heads$|num_kv$|n_kv_heads?$|query_groups|_n_group")
_EXPERTS = re.compile(r"experts|expert_num$")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers")
_ATTENTION = re.compile(r"Attention|Attn|MultiHead|MLA\b", re.IGNORECASE)
# Mixers that are called attention and have no softmax along the keys, and what is no mixer.
_TOWER = re.compile(r"vision|image|audio|visual")
_MIXER = re.compile(r"Lightning|Delta|Rwkv|Retention|Mamba|KDA|Mixer|Conv|Recurrent|LSTM")
_OTHER = re.compile(r"Linear|Lightning|Delta|Rwkv|Retention|Mamba|KDA|Norm$", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """Numbers of a model; a set holds what any of its layers may have.

    `layers` and `attentions` count runs of layers in one call, so a layer that runs twice counts
    twice; `norms` are the kinds of its norm modules.
    """

    layers: int
    attentions: int
    heads: frozenset[int]
    kv_heads: frozenset[int]
    norms: frozenset[str]
    experts: frozenset[int]
    table: torch.Tensor | None
    head: torch.Tensor | None

    @property
    def tied(self) -> bool:
        """Whether the token table is the unembedding too."""
        return self.table is not None and self.table is self.head


def facts(built: Built) -> Facts:
    """The facts of a built model; runs it once to count layers."""
    model: Any = built.model
    config = model.config.get_text_config(decoder=True)
    stack = _stack(model)
    entries = _entries(stack)
    attentions = _outermost(stack, _is_attention)
    calls = _calls(model, [*entries, *attentions], built.inputs(2, LENGTH))
    runs = sum(calls[: len(entries)])
    parts = [config, *(v for v in vars(config).values() if is_config(v))]
    inner = [m for a in attentions for m in a.modules()]
    heads = _numbers([config, *inner], _HEADS) or _numbers(parts, _ANY_HEADS)
    shared = getattr(config, "multi_query", False)
    plain = shared and not getattr(config, "new_decoder_architecture", False)
    known = _numbers([config, *inner], _KV_HEADS) | _grouped(inner, heads)
    return Facts(
        runs or _first(config, _LAYERS),
        sum(calls[len(entries) :]),
        frozenset(heads),
        frozenset({1} if plain else known or heads),
        frozenset(_norms(model, _first(config, ("hidden_size", "d_model")))),
        frozenset(_experts(config)),
        _end(model.get_input_embeddings, nn.Embedding),
        _end(model.get_output_embeddings, nn.Linear),
    )


def _end(get: Callable[[], Any], kind: type[nn.Module]) -> torch.Tensor | None:
    """The weight of the token table or of the unembedding, where the model has one."""
    try:
        found = get()
    except NotImplementedError:
        return None
    weight = found.weight if isinstance(found, kind) else None
    return weight if isinstance(weight, torch.Tensor) else None


def _stack(model: Any) -> nn.Module:
    """The part of a model that holds the layers of its main stream."""
    try:
        found = model.get_decoder()
    except Exception:
        return cast(nn.Module, model)
    whole = isinstance(found, nn.Module) and any(map(_is_list, found.modules()))
    return cast(nn.Module, found if whole else model)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _experts(config: Any) -> set[int]:
    """The numbers that a router may have rows for: shared or empty experts are rows of some."""
    found = _numbers([config], _EXPERTS)
    return found | {a + b for a in found for b in found}


def _grouped(attentions: list[nn.Module], heads: set[int]) -> set[int]:
    groups = _numbers(attentions, re.compile(r"key_value_groups$"))
    return {h // g for h in heads for g in groups if h % g == 0}


def _first(config: Any, names: tuple[str, ...]) -> int:
    found = (getattr(config, n, None) for n in names)
    return next((n for n in found if isinstance(n, int)), 0)


def _numbers(holders: Sequence[Any], wanted: re.Pattern[str]) -> set[int]:
    """The values of the fields with such a name, entries of a list each."""
    found: set[int] = set()
    for holder in holders:
        names = {*vars(holder), *getattr(holder, "attribute_map", ())}
        for value in (getattr(holder, n, None) for n in names if wanted.search(n)):
            inner = list(value.values()) if isinstance(value, dict) else value
            many = list(inner) if isinstance(inner, (list, tuple)) else [inner]
            found.update(v for v in many if type(v) is int and v > 0)
    return found


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(_ATTENTION.search(name) and not _OTHER.search(name)) and any(module.children())


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules of a kind that lie in no other one of it."""
    if wanted(model):
        return [model]
    children = [m for n, m in model.named_children() if not _TOWER.search(n)]
    return [m for child in children for m in _outermost(child, wanted)]


def _entries(stack: nn.Module) -> list[nn.Module]:
    """The layers: the entries of the outermost lists of modules that hold attention or a mixer."""
    lists = _outermost(stack, lambda m: _is_list(m) and _mixes(m))
    return [entry for found in lists for entry in found.children()]


def _mixes(entries: nn.Module) -> bool:
    names = [type(m).__name__ for e in entries.children() for m in e.modules() if m is not e]
    deep = [n for n in names if "Norm" not in n and n != "Linear"]
    plain = [type(e).__name__ for e in entries.children()]
    mixed = any((_ATTENTION.search(n) or _MIXER.search(n)) for n in deep)
    return mixed or any(_ATTENTION.search(n) for n in plain)


def _calls(model: nn.Module, modules: list[nn.Module], given: dict[str, Any]) -> list[int]:
    """How often each module runs in one call."""
    found = [0] * len(modules)

    def note(at: int) -> None:
        found[at] += 1

    hooks = [
        module.register_forward_pre_hook(lambda *_, at=i: note(at))
        for i, module in enumerate(modules)
    ]
    try:
        with torch.no_grad():
            model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _norms(model: nn.Module, width: int) -> set[str]:
    """The kinds of norm modules by what they do: a layer norm does not see a common shift."""
    found = set()
    for module in model.modules():
        if "norm" not in type(module).__name__.lower() or list(module.children()):
            continue
        weight = getattr(module, "weight", None)
        size = weight.numel() if isinstance(weight, torch.Tensor) else width
        x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                same = torch.allclose(module(x), module(x + 2), atol=1e-3)
        except Exception:
            continue
        found.add("layer" if same else "rms")
    return found
