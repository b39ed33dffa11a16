"""What a captured graph assumes of its inputs' sizes, kept as data and checked before a run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

from lensfx.errors import GuardError

__all__ = ["Axis", "Guards", "Limit", "LimitError", "SharedMemoryError"]

_ATOM = re.compile(r"\d+|t\[\d+\]\.shape\[\d+\]")
_SIZE = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_SYMBOL = re.compile(r"\bs\d+\b")
_INFINITE = 2**40


@dataclass(frozen=True)
class Axis:
    """One axis of one input: its symbol if it is dynamic, else the size it was specialised to."""

    leaf: int
    axis: int
    label: str
    symbol: str | None
    size: int | None
    low: int = 0
    high: int = _INFINITE


class SharedMemoryError(GuardError):
    """Two inputs overlap, and a write into one would reach the other in a way no graph shows."""


class LimitError(GuardError):
    """An input is larger than a table of the model has rows: the model would fail as well."""


@dataclass(frozen=True)
class Limit:
    """A count, as code over `t[leaf].shape[axis]`, and the rows of the table that it indexes."""

    code: str
    rows: int
    table: str
    line: str = ""

    def check(self, tensors: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        """Pass if the table has rows enough. Raises: LimitError."""
        count = eval(self.code, _NAMESPACE, {"t": tensors})
        if count > self.rows:
            raise LimitError(
                f"{_readable(self.code, names)} is {count}, and {self.table} has {self.rows} rows",
                at=self.line,
                hint=f"cut the input, so that {_readable(self.code, names)} is at most {self.rows}",
            )


@dataclass(frozen=True)
class Guards:
    """The sizes and relations between sizes under which a graph is the model.

    `axes` has one entry per axis of every tensor input, `relations` the conditions that the
    model's own code put on them, as text over names such as `idx.size(1)`. `contiguous` is empty
    unless the model's code asks how a tensor lies in memory.
    """

    axes: tuple[Axis, ...]
    relations: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    names: tuple[str, ...]
    contiguous: tuple[bool, ...] = ()
    limits: tuple[Limit, ...] = ()
    writes_inputs: bool = False
    _code: tuple[Any, ...] = ()
    _passed: set[Any] = field(default_factory=set, compare=False, repr=False)

    @property
    def dynamic(self) -> tuple[Axis, ...]:
        """The axes whose size may differ from the example's."""
        return tuple(a for a in self.axes if a.symbol is not None)

    @property
    def specialised(self) -> tuple[Axis, ...]:
        """The axes that the model's code tied to one size."""
        return tuple(a for a in self.axes if a.symbol is None)

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Pass if the graph is the model on these inputs.

        Raises: GuardError naming the first size, relation or dtype that does not hold.
        """
        layouts = tuple(t.is_contiguous() for t in tensors) if self.contiguous else ()
        key = (tuple((t.shape, t.dtype) for t in tensors), layouts)
        if key in self._passed and not self.writes_inputs:
            return
        self._check_kinds(tensors)
        self._check_memory(tensors)
        for limit in self.limits:
            limit.check(tensors, self.names)
        for axis in self.axes:
            self._check_axis(axis, tensors[axis.leaf].shape[axis.axis])
        for text, code in zip(self.relations, self._code, strict=True):
            if not _holds(code, tensors):
                raise GuardError(
                    f"the captured graph assumes {text}, which this call does not satisfy",
                    hint="capture again with an example of these sizes",
                )
        for name, now, then in zip(self.names, layouts, self.contiguous, strict=False):
            if now != then:
                raise GuardError(
                    f"{name} is {'' if now else 'not '}contiguous, other than at capture, and the "
                    "model's code looks at how tensors lie in memory",
                    hint=f"pass {name}.contiguous()" if then else "capture again with this input",
                )
        if len(self._passed) < 4096:
            self._passed.add(key)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether every relation holds between the sizes of these tensors."""
        return all(_holds(code, tensors) for code in self._code)

    def _check_kinds(self, tensors: Sequence[torch.Tensor]) -> None:
        ranks = {leaf: 0 for leaf in range(len(self.names))}
        for axis in self.axes:
            ranks[axis.leaf] += 1
        for i, (tensor, dtype, name) in enumerate(
            zip(tensors, self.dtypes, self.names, strict=True)
        ):
            if tensor.ndim != ranks[i]:
                raise GuardError(
                    f"{name} has {tensor.ndim} axes, {ranks[i]} at capture",
                    hint="capture again with an example of this rank",
                )
            if tensor.dtype != dtype:
                raise GuardError(
                    f"{name} is {tensor.dtype}, {dtype} at capture",
                    hint=f"pass {name}.to({dtype}), or capture again",
                )

    def _check_memory(self, tensors: Sequence[torch.Tensor]) -> None:
        if not self.writes_inputs:
            return
        owners: dict[int, str] = {}
        for name, tensor in zip(self.names, tensors, strict=True):
            other = owners.setdefault(tensor.untyped_storage()._cdata, name)
            if other != name:
                raise SharedMemoryError(
                    f"{other} and {name} share memory, and the model writes into its inputs",
                    hint=f"pass {name}.clone()",
                )

    @staticmethod
    def _check_axis(axis: Axis, size: int) -> None:
        if axis.size is not None and size != axis.size:
            raise GuardError(
                f"{axis.label} is {size}; the model's code ties it to {axis.size}, the example's",
                hint=f"capture again with an example where {axis.label} is {size}",
            )
        if not axis.low <= size <= axis.high:
            bound = f"at least {axis.low}" if size < axis.low else f"at most {axis.high}"
            raise GuardError(
                f"{axis.label} is {size}; the captured graph is the model only for {bound}",
                hint=f"capture again with an example where {axis.label} is {size}",
            )

    def with_limits(self, limits: Sequence[Limit]) -> Guards:
        """These guards and limits; one on a size alone also bounds the axis."""
        bounds = {limit.code: limit.rows for limit in limits}
        axes = []
        for axis in self.axes:
            named = f"t[{axis.leaf}].shape[{axis.axis}]"
            same = [a for a in self.axes if a.symbol == axis.symbol]
            if axis.symbol is not None:
                named = f"t[{same[0].leaf}].shape[{same[0].axis}]"
            axes.append(replace(axis, high=min(axis.high, bounds.get(named, axis.high))))
        return replace(self, axes=tuple(axes), limits=tuple(limits), _passed=set())

    def with_relations(self, codes: Sequence[str]) -> Guards:
        """These guards and more relations, given as code over `t[leaf].shape[axis]`."""
        compiled = tuple(compile(c, "<guard>", "eval") for c in codes)
        texts = tuple(_readable(c, self.names) for c in codes)
        return replace(
            self,
            relations=self.relations + texts,
            _code=self._code + compiled,
            _passed=set(),
        )

    @classmethod
    def build(
        cls,
        placeholders: Sequence[fx.Node],
        names: Sequence[str],
        ranges: dict[str, tuple[int, int]],
        conditions: Sequence[str],
    ) -> Guards:
        """Guards from the symbolic sizes of the placeholders and conditions on them.

        The conditions are torch's own guard expressions, or code over the symbols of sizes.
        """
        axes: list[Axis] = []
        derived: list[str] = []
        first: dict[str, str] = {}
        for leaf, node in enumerate(placeholders):
            for d, size in enumerate(node.meta["val"].shape):
                label, here = f"{names[leaf]}.size({d})", f"t[{leaf}].shape[{d}]"
                expr = size.node.expr if isinstance(size, torch.SymInt) else None
                if expr is None or expr.is_number:
                    axes.append(Axis(leaf, d, label, None, int(size)))
                    continue
                if expr.is_Symbol:
                    low, high = ranges.get(str(expr), (0, _INFINITE))
                    axes.append(Axis(leaf, d, label, str(expr), None, low, high))
                    first.setdefault(str(expr), here)
                    derived.append(f"{here} == {first[str(expr)]}")
                else:
                    axes.append(Axis(leaf, d, label, str(expr), None))
        codes = [c for c in derived if len(set(c.split(" == "))) == 2]
        codes += [_SIZE.sub(r"t[\1].shape[\2]", c).replace("\n", " ") for c in conditions]
        codes = [_SYMBOL.sub(lambda m: first.get(m[0], m[0]), c) for c in codes]
        codes = list(dict.fromkeys(_sorted_equality(c) for c in codes))
        # Axes of one size are checked as such.
        fixed = {f"{a.size} == t[{a.leaf}].shape[{a.axis}]" for a in axes}
        codes = [c for c in codes if c not in fixed]
        return cls(
            tuple(axes),
            tuple(_readable(c, names) for c in codes),
            tuple(p.meta["val"].dtype for p in placeholders),
            tuple(names),
            _code=tuple(compile(c, "<guard>", "eval") for c in codes),
        )


def _holds(code: Any, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        return bool(eval(code, _NAMESPACE, {"t": tensors}))
    except ZeroDivisionError:
        # A quotient of sizes that comes to nothing here: at the example it was a number.
        return False


def _sorted_equality(code: str) -> str:
    sides = code.split(" == ")
    plain = len(sides) == 2 and all(_ATOM.fullmatch(side) for side in sides)
    return " == ".join(sorted(sides)) if plain else code


def _readable(code: str, names: Sequence[str]) -> str:
    return re.sub(r"t\[(\d+)\]\.shape\[(\d+)\]", lambda m: f"{names[int(m[1])]}.size({m[2]})", code)


_NAMESPACE: dict[str, Any] = {**SYMPY_INTERP, "math": math, "inf": math.inf}
