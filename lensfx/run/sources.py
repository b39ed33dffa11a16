"""Folded weights are copies: say so when the parameters they came from change."""

from __future__ import annotations

import warnings

from lensfx.graph.program import Program

__all__ = ["FoldedSources"]


class FoldedSources:
    """The parameters that folded weights were computed from, as they were then."""

    def __init__(self, program: Program) -> None:
        base = program.unfolded or program
        names = {s for f in program.formulas.values() for s in f.sources if s in base.tensors}
        self._seen = {name: (base.tensors[name], base.tensors[name]._version) for name in names}

    def warn_if_changed(self) -> None:
        """Warn once if a source was written to in place since: the model is then another one."""
        changed = [name for name, (t, version) in self._seen.items() if t._version != version]
        if not changed:
            return
        self._seen = {name: entry for name, entry in self._seen.items() if name not in changed}
        warnings.warn(
            f"{changed[0]} was changed in place after it was folded: the lens keeps the folded "
            "value, so it is no longer this model. Wrap the model again, or use passes=None, "
            "which shares every parameter",
            stacklevel=4,
        )
