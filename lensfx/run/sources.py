"""Folded weights follow the parameters they came from when those change."""

from __future__ import annotations

import sys
import warnings

import torch

from lensfx.graph.blocks import evaluate
from lensfx.graph.node import outputs_of
from lensfx.graph.program import Program

__all__ = ["FoldedSources", "callers_level"]


def callers_level() -> int:
    """The `stacklevel` with which a warning points at the line that called lensfx."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("lensfx", "contextlib", "torch")


def _state(tensor: torch.Tensor) -> object:
    if isinstance(tensor, torch.nn.Parameter) or tensor.ndim > 1 or tensor.is_meta:
        return tensor._version
    return tensor._version, tuple(tensor.tolist() if tensor.ndim else [tensor.item()])


class FoldedSources:
    """The parameters that folded weights were computed from, as they were then.

    `own` are the versions of folded tensors as lensfx left them, by their ids: programs share them.
    """

    def __init__(self, program: Program, own: dict[int, int] | None = None) -> None:
        self._program = program
        self._base = program.unfolded or program
        known = self._base.tensors
        self._sources = {
            name: [s for s in formula.sources if s in known]
            for name, formula in program.formulas.items()
        }
        self._seen = {name: self._versions(name) for name in self._sources}
        self._own = {} if own is None else own
        for name in self._sources:
            tensor = program.tensors[name]
            self._own.setdefault(id(tensor), tensor._version)

    def _versions(self, name: str) -> list[object]:
        """What tells that a source was written to; torch does not count writes of statistics."""
        return [_state(self._base.tensors[s]) for s in self._sources[name]]

    def written(self) -> dict[str, torch.Tensor]:
        """The folded parameters that somebody has written to since they were computed."""
        folded = {name: self._program.tensors[name] for name in self._sources}
        return {n: t for n, t in folded.items() if t._version != self._own[id(t)]}

    def follow(self) -> None:
        """Compute again what was folded from a parameter that has been written to since.

        Warns where the folded parameter has been written to as well: it is left as it is, and the
        lens is then another model.
        """
        for name in [n for n, seen in self._seen.items() if self._versions(n) != seen]:
            pairs = zip(self._sources[name], self._seen[name], self._versions(name), strict=True)
            changed = next(source for source, then, now in pairs if then != now)
            self._seen[name] = self._versions(name)
            if name in self.written():
                warnings.warn(
                    f"{changed} was changed in place, and so was {name}, which was "
                    "folded from it: the lens keeps the folded value, so it is no longer this "
                    "model. Train the parameters of the lens or those of the model, not both",
                    stacklevel=callers_level(),
                )
                continue
            tensor, formula = self._program.tensors[name], self._program.formulas[name]
            (root,) = outputs_of(formula.graph)
            value = evaluate(root, lambda n: self._base.tensors[str(n.target)], tensor.dtype)
            with torch.no_grad():
                tensor.copy_(value)
            self._own[id(tensor)] = tensor._version
