"""A small config of a given config class, sub-configs included."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .sizes import Rules, TokenIds


def small_config(config_class: Any, rules: Rules, ids: TokenIds | None = None) -> Any:
    """A config of this class with small sizes wherever the rules know a field."""
    ids = ids or TokenIds()
    default = config_class()
    fields = field_defaults(config_class)
    layers = next((fields[n] for n in ("num_hidden_layers", "num_layers") if n in fields), None)
    hints = (
        {f.name: str(f.type) for f in dataclasses.fields(config_class)}
        if dataclasses.is_dataclass(config_class)
        else {}
    )
    given: dict[str, Any] = {}
    for name, value in vars(default).items():
        if is_config(value):
            given[name] = small_config(type(value), rules, ids)
        elif name in fields and name not in _BASE:
            plain = fields[name]
            small = rules.value(name, plain, hints.get(name, ""), ids)
            per_layer = isinstance(plain, (list, tuple)) and len(plain) == layers
            if per_layer and rules.layers is not None:
                small = spread(plain, rules.layers)
            if small != plain:
                given[name] = small
    config = config_class(**given)
    _quieten(config)
    return config


def is_config(value: Any) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_diff_dict")


def spread(values: Any, count: int) -> Any:
    """`count` of the values, with as many kinds among them as there is room for."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = [next(v for v in values if str(v) == kind) for kind in kinds[:count]]
    return type(values)([*first, *[first[-1]] * (count - len(first))])


def field_defaults(config_class: Any) -> dict[str, Any]:
    """The fields of a config class with their defaults, as its constructor declares them."""
    if dataclasses.is_dataclass(config_class):
        found = {}
        for field in dataclasses.fields(config_class):
            if field.default is not dataclasses.MISSING:
                found[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
        return found
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _quieten(config: Any) -> None:
    """No cache in the outputs: a call is a function of its inputs then."""
    config.use_cache = False
    for value in vars(config).values():
        if is_config(value):
            _quieten(value)


_BASE = frozenset(
    {"id2label", "label2id", "architectures", "dtype", "problem_type", "transformers_version"}
)
