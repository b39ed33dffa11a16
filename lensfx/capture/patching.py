"""Attributes of classes and modules, replaced for as long as a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["patched"]


@contextlib.contextmanager
def patched(owner: Any, /, **attributes: Any) -> Iterator[None]:
    """Inside, `owner` has these attributes; behind, what it defined or inherited before."""
    kept = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in attributes:
            if name in kept:
                setattr(owner, name, kept[name])
            elif name in vars(owner):
                delattr(owner, name)
