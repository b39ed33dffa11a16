"""Where axes go: equal sizes without a guard, the groups of a reshape, what a view does to axes.

The rules here are those of operators that keep, move or copy entries; `transfer.py` has the rest
and the table. A rule gets a `Read` and must hold for every value of the reader's other operands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, schema_names, shape_of
from lensfx.graph.ops import DROPOUTS

__all__ = [
    "Axes",
    "Carry",
    "Kill",
    "Outcome",
    "Read",
    "See",
    "Shape",
    "all_axes",
    "along",
    "fingerprint",
    "groups",
    "indexed",
    "is_one",
    "lifted",
    "order_of",
    "renumbered",
    "same_size",
]

Axes = frozenset[int]
Shape = Sequence[int | torch.SymInt]

_Print = tuple[int, int]


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is 1 for every input; a symbolic size is not asked, which would guard it."""
    return isinstance(size, int) and size == 1


def all_axes(shape: Shape) -> Axes:
    """Every axis number of a shape."""
    return frozenset(range(len(shape)))


def along(axes: Iterable[int], shape: Shape) -> str:
    """The axes in words, those of size 1 left out."""
    kept = sorted(a for a in axes if not is_one(shape[a]))
    if not kept:
        return "no axis"
    return ("axis " if len(kept) == 1 else "axes ") + ", ".join(map(str, kept))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every input; False where that cannot be shown."""
    return fingerprint(a) == fingerprint(b)


def groups(before: Shape, after: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest runs of axes that a reshape maps onto each other, as (in axes, out axes).

    Axes of size 1 are left out. Both shapes describe one row-major buffer, so the pairing is
    forced; sizes whose products cannot be shown equal end in one last group.
    """
    ins = [(i, fingerprint(size)) for i, size in enumerate(before) if not is_one(size)][::-1]
    outs = [(i, fingerprint(size)) for i, size in enumerate(after) if not is_one(size)][::-1]
    if any(size[0] == 0 for _, size in (*ins, *outs)):
        return [(tuple(i for i, _ in ins[::-1]), tuple(i for i, _ in outs[::-1]))]
    found = []
    while ins or outs:
        found.append(_group(ins, outs))
    return found


def _group(
    ins: list[tuple[int, _Print]], outs: list[tuple[int, _Print]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Take from the ends of both lists until the products are equal or nothing is left."""
    a = b = (1, 1)
    left: list[int] = []
    right: list[int] = []
    while ins or outs:
        if ins and (a[0] <= b[0] or not outs):
            axis, size = ins.pop()
            left.append(axis)
            a = (a[0] * size[0], a[1] * size[1])
        else:
            axis, size = outs.pop()
            right.append(axis)
            b = (b[0] * size[0], b[1] * size[1])
        if a == b:
            break
    return tuple(left), tuple(right)


def fingerprint(size: int | torch.SymInt) -> _Print:
    """The size at two assignments of large numbers to its symbols."""
    if isinstance(size, int):
        return size, size
    expr = getattr(getattr(size, "node", None), "expr", None)
    return _opaque(size) if expr is None else _evaluated(expr)


def value_print(expr: Any) -> _Print:
    """The same for an expression that is a factor of a size."""
    return _evaluated(expr)


@cache
def _evaluated(expr: Any) -> _Print:
    """A polynomial's value; any other expression is one symbol of its own, named by its text."""
    if expr.is_Integer:
        return int(expr), int(expr)
    if expr.is_Add or expr.is_Mul:
        total, *rest = (_evaluated(part) for part in expr.args)
        for a, b in rest:
            both = (total[0] + a, total[1] + b)
            total = both if expr.is_Add else (total[0] * a, total[1] * b)
        return total
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        a, b = _evaluated(expr.base)
        return a ** int(expr.exp), b ** int(expr.exp)
    return _opaque(expr)


def _opaque(text: Any) -> _Print:
    # Far above any size in a model, and each symbol its own: small primes, chosen by the number
    # of the symbol, would let two symbols share one.
    digest = hashlib.sha256(str(text).encode()).digest()
    return int.from_bytes(digest[:8]) | 1 << 63, int.from_bytes(digest[8:16]) | 1 << 63


def lifted(axes: Iterable[int], shape: Shape, out: Shape) -> Axes:
    """Axes of an operand as axes of the result it is broadcast to; those it lacks join for free."""
    offset = len(out) - len(shape)
    free = [offset + i for i, size in enumerate(shape) if is_one(size)]
    return frozenset((*range(offset), *free, *(offset + a for a in axes)))


def renumbered(axes: Iterable[int], order: Sequence[int | None]) -> Axes:
    """The places in `order` that hold one of `axes`: order[new axis] is the old axis, or None."""
    kept = frozenset(axes)
    return frozenset(i for i, old in enumerate(order) if old in kept)


@dataclass(frozen=True)
class Kill:
    """The result does not move."""


@dataclass(frozen=True)
class Carry:
    """The result moves by something constant along `axes`; axes of size 1 need not be in them.

    `lost`: why, where `axes` says nothing. `soft`: but for entries that stay hugely negative.
    """

    axes: Axes
    lost: str = ""
    soft: bool = False


@dataclass(frozen=True)
class See:
    """The result moves in a way no rule describes; `words` say why."""

    words: str


Outcome = Kill | Carry | See


@dataclass(frozen=True)
class Read:
    """One argument of one reader, and the axes along which the shift of that argument is constant.

    `const(other)` are the axes along which another value does not vary, `item` the place in a list
    argument, `part` the output asked about where the reader has several. `soft` as in `Carry`.
    """

    node: fx.Node
    slot: str
    value: fx.Node
    axes: Axes
    const: Callable[[fx.Node], Axes]
    item: int = 0
    part: int | None = None
    soft: bool = False

    @property
    def shape(self) -> Shape:
        """The shape of the argument."""
        return tuple(self.value.meta["val"].shape)

    @property
    def result(self) -> torch.Tensor:
        """The fake value of the result, or of the part of it that is asked about."""
        val = self.node.meta["val"]
        found: torch.Tensor = val if self.part is None else val[self.part]
        return found

    @property
    def out(self) -> Shape:
        """The shape of the result."""
        return tuple(self.result.shape)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument of the reader by schema name, `default` if it has no such argument."""
        return argument(self.node, name) if name in schema_names(self.node.target) else default

    def dims(self) -> Axes:
        """The axes of the argument that the reader's `dim` names; all of them if it names none."""
        dim, rank = self.arg("dim"), len(self.shape)
        if dim is None or dim == []:
            return all_axes(self.shape)
        many = (dim,) if isinstance(dim, int) else dim
        return frozenset(d % rank for d in many) if rank else frozenset()

    def moved(self) -> Axes:
        """The axes of the shift once the argument is broadcast to the result."""
        return lifted(self.axes, self.shape, self.out)

    def fixed(self, other: Any) -> Axes:
        """The axes of the result along which another operand does not vary."""
        shape = shape_of(other) if isinstance(other, fx.Node) else None
        if shape is None:
            return all_axes(self.out)
        return lifted(self.const(other), shape, self.out)


def carry_identity(read: Read) -> Outcome:
    """Casts, copies, dropout: every entry stays itself."""
    before, after = read.value.meta["val"].dtype, read.result.dtype
    if read.node.target in DROPOUTS and read.arg("train"):
        return See(f"%{read.node.name} drops entries at random: the shift would be dropped as well")
    if before != after and not (after.is_floating_point or after.is_complex):
        return See(f"%{read.node.name} turns it into {after}: a shift would be seen")
    return Carry(read.axes)


def carry_reshape(read: Read) -> Outcome:
    """Views of one row-major buffer: a group stays constant if all of its axes are."""
    pairs = groups(read.shape, read.out)
    kept = frozenset(a for ins, outs in pairs if read.axes.issuperset(ins) for a in outs)
    return Carry(kept, f"%{read.node.name} merges the axes it is constant along with others")


@cache
def _permutation(target: Any, rank: int, args: tuple[Any, ...]) -> tuple[int, ...]:
    if target is torch.ops.aten.numpy_T.default:
        return tuple(range(rank))[::-1]
    told_apart = torch.empty(tuple(range(2, rank + 2)), device="meta")
    return tuple(size - 2 for size in target(told_apart, *args).shape)


def order_of(view: fx.Node, rank: int) -> tuple[int, ...]:
    """Which axis of its input each axis of a transpose or permute is, tried on one tensor."""
    given = [argument(view, name) for name in schema_names(view.target)[1:]]
    args = tuple(tuple(a) if isinstance(a, list | tuple) else a for a in given)
    return _permutation(view.target, rank, args)


def carry_permute(read: Read) -> Outcome:
    """Transposes and permutes: the sizes of the tried tensor tell its axes apart."""
    return Carry(renumbered(read.axes, order_of(read.node, len(read.shape))))


def carry_select(read: Read) -> Outcome:
    """One place along an axis: the axis is gone."""
    gone = read.dims()
    lost = f"%{read.node.name} takes one place along {along(gone, read.shape)}"
    return Carry(renumbered(read.axes, [a for a in range(len(read.shape)) if a not in gone]), lost)


def carry_same_axes(read: Read) -> Outcome:
    """Slices, flips, repeats of entries: some or more of them along the same axes."""
    by = "dims" if "dims" in schema_names(read.node.target) else "dim"
    if read.arg(by) is None or read.arg(by) == []:
        # Without an axis these work on the flattened value.
        return Carry(all_axes(read.out) if read.axes == all_axes(read.shape) else frozenset())
    return Carry(read.axes)


def carry_expand(read: Read) -> Outcome:
    """Copies along axes: the new ones are constant."""
    return Carry(read.moved())


@dataclass(frozen=True)
class Indexed:
    """What `index` does: `order[new axis]` is the old axis or None, `taken` are the axes indexed.

    The axes of the indices stand at `at` and the `new - 1` axes behind it.
    """

    order: list[int | None]
    taken: Axes
    at: int
    new: int


def indexed(indices: Sequence[Any], rank: int, out: int) -> Indexed:
    """Where `index` puts the axes of a value of that many axes, `out` in the result."""
    kept: list[int | None] = []
    places: set[int] = set()
    taken: set[int] = set()
    axis = 0
    for index in indices:
        if index is None:
            kept.append(axis)
            axis += 1
            continue
        width = len(shape_of(index) or ()) if _is_mask(index) else 1
        places.add(len(kept))
        taken.update(range(axis, axis + width))
        axis += width
    kept.extend(range(axis, rank))
    new = out - len(kept)
    # Indices that are not adjacent put their axes first.
    at = min(places) if len(places) == 1 else 0
    return Indexed([*kept[:at], *([None] * new), *kept[at:]], frozenset(taken), at, new)


def carry_index(read: Read) -> Outcome:
    """Tensor indices: their own axes stand in for the axes they index."""
    indices = read.arg("indices")
    to = indexed(indices, len(read.shape), len(read.out))
    block = frozenset(range(to.at, to.at + to.new))
    if not read.axes.issuperset(to.taken):
        block &= _alike(read, [i for i in indices if i is not None], to.at, to.new)
    found = block | renumbered(read.axes, to.order)
    return Carry(found, f"%{read.node.name} picks entries along the axes it is constant along")


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def _alike(read: Read, indices: Sequence[fx.Node], at: int, new: int) -> Axes:
    """The axes that the indices put into the result along which all of them are the same."""
    found, block = frozenset(range(new)), read.out[at : at + new]
    for index in indices:
        same = () if _is_mask(index) else lifted(read.const(index), shape_of(index) or (), block)
        found &= frozenset(same)
    return frozenset(at + i for i in found)


def carry_gather(read: Read) -> Outcome:
    """One index per entry: where it varies along the axes the shift keeps, so does the result."""
    if read.dims() <= read.axes:
        return Carry(read.axes)
    found = (read.axes | read.dims()) & read.const(read.arg("index"))
    return Carry(found, f"%{read.node.name} gathers from other places for each entry")


def carry_embedding(read: Read) -> Outcome:
    """Rows of a table."""
    last = len(read.out) - 1
    rows = frozenset(range(last)) if 0 in read.axes else read.const(read.arg("indices"))
    return Carry(rows | ({last} if 1 in read.axes else set()))
