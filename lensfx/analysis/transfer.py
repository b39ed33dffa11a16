"""How a shift passes one operator: the table of transfer functions behind the gauge query.

A shift of a value is a perturbation that is constant along some of its axes and arbitrary along
the others. Each rule holds for every value of the reader's other operands, so rules compose along
a graph; a rule that needs two operands to move together does not belong in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lensfx.analysis import axes as ax
from lensfx.analysis.axes import Axes, Carry, Kill, Outcome, Read, See, along, renumbered
from lensfx.analysis.products import FACTORS, Labels, product
from lensfx.graph.node import argument, is_weight, op_name, schema_names
from lensfx.graph.ops import CASTS, DROPOUTS, hook_point

__all__ = ["FILLED", "TABLE", "Family", "number", "transfer"]

aten = torch.ops.aten

# Scores at or below this have a softmax weight of 0 beside any score of a real model.
MASKED_OUT = -1e4


def _ops(names: str) -> tuple[Any, ...]:
    """Overloads by name, `add.Tensor`; the default one where no overload is named."""
    pairs = (name.partition(".") for name in names.split())
    return tuple(getattr(getattr(aten, op), overload or "default") for op, _, overload in pairs)


FILLED = frozenset(
    _ops("full full_like new_full scalar_tensor zeros zeros_like new_zeros ones ones_like new_ones")
)


@dataclass(frozen=True)
class Family:
    """Operators with one rule, the arguments the rule is for, and what else is true of them.

    `soft`: right after a masked fill as well. `moves`: each entry of the result is a sum of entries
    of the first slot. `pointwise`: each entry of the result depends on the aligned entries only.
    """

    name: str
    rule: Callable[[Read], Outcome]
    ops: tuple[Any, ...] = field(repr=False)
    slots: tuple[str, ...] = ("self",)
    soft: bool = False
    moves: bool = False
    pointwise: bool = False


def transfer(read: Read) -> Outcome:
    """What a shift of one argument does to the reader's result."""
    family = TABLE.get(read.node.target)
    name, op = f"%{read.node.name}", op_name(read.node)
    if family is None:
        if torch.Tag.pointwise in getattr(read.node.target, "tags", ()):
            kept = along(read.axes, read.shape)
            shift = "any shift" if kept == along((), ()) else f"a shift along {kept}"
            return See(f"{name} reads it non-linearly ({op}): {shift} would be seen")
        return See(f"no rule for {op} at {name}; nothing is assumed")
    if read.slot not in family.slots:
        return See(f"{name} ({op}) reads it as its {read.slot}: a shift would be seen")
    if read.soft and not family.soft:
        return See(f"{name} ({op}) sees that masked entries do not move with the others")
    return family.rule(read)


def _killed(read: Read, dims: Axes, verb: str) -> Outcome:
    if dims <= read.axes:
        return Kill()
    missing = along(dims - read.axes, read.shape)
    words = f"{verb} {along(dims, read.shape)}, but the shift varies along {missing}"
    return See(f"%{read.node.name} ({op_name(read.node)}) {words}")


def _added(read: Read) -> Outcome:
    return Carry(read.moved())


def _product(read: Read) -> Outcome:
    other = read.arg("other" if read.slot == "self" else "self")
    moved, fixed = read.moved(), read.fixed(other)
    return Carry(moved & fixed, _scaled(read, other, moved - fixed))


def _scaled(read: Read, other: Any, lost: Axes) -> str:
    if not isinstance(other, fx.Node):
        return ""
    name, axis = f"%{read.node.name}", along(lost, read.out)
    if is_weight(other):
        vector = str(other.target) if other.op == "get_attr" else f"%{other.name}"
        return f"{name} multiplies it by {vector}, which varies along {axis}; fold the scale first"
    gate = f"%{other.name}, which is computed and varies along {axis}"
    return f"{name} multiplies it by {gate}: the shift would follow the gate"


def _quotient(read: Read) -> Outcome:
    if read.slot == "other":
        return See(f"%{read.node.name} divides by it: a shift would be seen")
    if read.arg("rounding_mode") is not None:
        return See(f"%{read.node.name} rounds it: a shift would be seen")
    return _product(read)


def number(value: Any) -> float | None:
    """The one number that a scalar, or a value made by filling, holds everywhere; or None."""
    while isinstance(value, fx.Node):
        if value.target in FILLED and value.meta["val"].is_floating_point():
            names = [n for n in ("fill_value", "s") if n in schema_names(value.target)]
            value = argument(value, names[0]) if names else None
        elif value.target in CASTS and value.meta["val"].is_floating_point():
            value = value.args[0]
        else:
            return None
    return float(value) if isinstance(value, int | float) else None


def _masked(read: Read) -> Outcome:
    if read.slot == "value":
        return Carry(read.moved() & read.fixed(read.arg("mask")))
    mask = read.arg("mask", read.arg("condition"))
    held = number(read.arg("value", read.arg("other" if read.slot == "self" else "self")))
    if held is not None and held <= MASKED_OUT:
        # An entry at -inf has moved as far as one likes; one at -1e4 has visibly stayed.
        return Carry(read.moved(), soft=held != -torch.inf)
    lost = f"%{read.node.name} keeps it only where %{mask.name} says so"
    return Carry(read.moved() & read.fixed(mask), lost)


def _joined(read: Read) -> Outcome:
    gone = read.dims()
    lost = f"%{read.node.name} joins it with other values along {along(gone, read.shape)}"
    return Carry(read.axes - gone, lost)


def _placed(read: Read) -> Outcome:
    """One slice or one place of the result is the value, the rest does not move with it."""
    place, rank = read.arg("dim") % len(read.out), range(len(read.shape))
    lost = f"%{read.node.name} puts it beside other values along axis {place}"
    if len(rank) == len(read.out):
        return Carry(read.axes - {place}, lost)
    return Carry(renumbered(read.axes, [*rank[:place], None, *rank[place:]]), lost)


def _padded(read: Read) -> Outcome:
    if read.arg("mode", "constant") != "constant":
        return Carry(read.axes)
    last = len(read.shape) - 1
    gone = {last - i // 2 for i, n in enumerate(read.arg("pad")) if not (type(n) is int and n == 0)}
    return Carry(read.axes - gone, f"%{read.node.name} pads it with entries that do not move")


def _reduced(read: Read) -> Axes:
    dims, rank = read.dims(), len(read.shape)
    if len(read.out) == rank:
        return read.axes | dims
    return renumbered(read.axes, [a for a in range(rank) if a not in dims])


def _total(read: Read) -> Outcome:
    return Carry(_reduced(read))


def _chosen(read: Read) -> Outcome:
    dead = _killed(read, read.dims(), "compares entries along")
    is_index = read.part == 1 or op_name(read.node).startswith("arg")
    return dead if is_index or isinstance(dead, See) else Carry(_reduced(read))


def _spread(read: Read) -> Outcome:
    return _total(read) if read.part == 1 else _killed(read, read.dims(), "measures the spread of")


def _softmax(read: Read) -> Outcome:
    return _killed(read, read.dims(), "normalises over")


def _layer_norm(read: Read) -> Outcome:
    if read.slot == "bias":
        return Carry(read.moved())
    rank = len(read.shape)
    dims = frozenset(range(rank - len(read.arg("normalized_shape")), rank))
    return _killed(read, dims, "removes the mean of")


def _group_norm(read: Read) -> Outcome:
    return _killed(read, frozenset(range(1, len(read.shape))), "removes means over")


def _rms_norm(read: Read) -> Outcome:
    rank = len(read.shape)
    dims = range(rank - len(read.arg("normalized_shape")), rank)
    kept = along(dims, read.shape)
    return See(f"%{read.node.name} is a root-mean-square norm: it keeps the mean of {kept}")


def _cross_entropy(read: Read) -> Outcome:
    return _killed(read, frozenset({min(1, len(read.shape) - 1)}), "is a softmax over")


def _attention(read: Read) -> Outcome:
    last = len(read.shape) - 1
    if read.slot == "value":
        lost = f"%{read.node.name} mixes it along axis {last - 1} with weights that vary"
        return Carry(frozenset({len(read.out) - 1}) if last in read.axes else frozenset(), lost)
    if read.slot == "attn_mask" and not read.value.meta["val"].is_floating_point():
        return See(f"%{read.node.name} attends where it is true: a shift would be seen")
    # A key moves all scores of a row alike; a mask is added to them as it is.
    keys = last - 1 if read.slot == "key" else last
    return _killed(read, frozenset({keys}), "compares the keys along")


def _product_of(read: Read) -> Outcome:
    found = product(read.node)
    if found is None:
        return See(f"%{read.node.name} (einsum) has an ellipsis; nothing is assumed")
    if read.slot == "tensors":
        return _multilinear(read, read.item, found.terms, found.out)
    names = FACTORS[read.node.target]
    if read.slot not in names:
        return Carry(read.moved())
    return _multilinear(read, names.index(read.slot), found.terms, found.out)


def _multilinear(
    read: Read, moving: int, terms: tuple[tuple[Any, Labels], ...], out: Labels
) -> Outcome:
    """A sum of products stays constant along an axis along which every factor that has it is."""
    varied: set[Any] = set()
    for i, (operand, labels) in enumerate(terms):
        fixed = read.axes if i == moving else read.const(operand)
        varied.update(label for axis, label in enumerate(labels) if axis not in fixed)
    gone = [axis for axis, label in enumerate(terms[moving][1]) if label not in out]
    lost = f"%{read.node.name} ({op_name(read.node)}) mixes it along {along(gone, read.shape)}"
    return Carry(frozenset(i for i, label in enumerate(out) if label not in varied), lost)


_KEEPING = tuple(sorted(CASTS | DROPOUTS, key=str))
_BOTH = ("self", "other")

FAMILIES = (
    Family(
        "identity",
        ax.carry_identity,
        (*_KEEPING, *_ops("contiguous clone alias detach lift_fresh_copy"), hook_point),
        ("self", "input", "value"),
        soft=True,
        pointwise=True,
    ),
    Family(
        "reshape",
        ax.carry_reshape,
        _ops(
            "reshape view _unsafe_view view_as reshape_as flatten.using_ints unflatten.int "
            "unsqueeze squeeze squeeze.dim squeeze.dims"
        ),
        soft=True,
        moves=True,
    ),
    Family(
        "permute",
        ax.carry_permute,
        _ops("transpose.int permute t mT numpy_T swapaxes swapdims movedim.int movedim.intlist"),
        soft=True,
        moves=True,
    ),
    Family("select", ax.carry_select, _ops("select.int unbind.int"), soft=True, moves=True),
    Family(
        "same axes",
        ax.carry_same_axes,
        _ops(
            "slice.Tensor narrow split.Tensor split.sizes split_with_sizes chunk flip roll "
            "tensor_split.sections tensor_split.indices index_select "
            "repeat_interleave.self_int repeat_interleave.self_Tensor"
        ),
        soft=True,
        moves=True,
    ),
    Family(
        "expand",
        ax.carry_expand,
        _ops("expand expand_as broadcast_to repeat tile"),
        soft=True,
        moves=True,
    ),
    Family("index", ax.carry_index, _ops("index.Tensor"), moves=True),
    Family("gather", ax.carry_gather, _ops("gather"), moves=True),
    Family("embedding", ax.carry_embedding, _ops("embedding"), ("weight",), moves=True),
    Family(
        "add",
        _added,
        _ops("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar neg"),
        _BOTH,
        pointwise=True,
    ),
    Family("mul", _product, _ops("mul.Tensor mul.Scalar"), _BOTH, pointwise=True),
    Family(
        "div",
        _quotient,
        _ops(
            "div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode "
            "true_divide.Tensor true_divide.Scalar"
        ),
        _BOTH,
        pointwise=True,
    ),
    Family(
        "mask",
        _masked,
        _ops("masked_fill.Scalar masked_fill.Tensor where.self where.ScalarSelf where.ScalarOther"),
        ("self", "other", "value"),
        soft=True,
        pointwise=True,
    ),
    Family("cat", _joined, _ops("cat concat"), ("tensors",)),
    Family("stack", _placed, _ops("stack"), ("tensors",)),
    Family("pad", _padded, _ops("pad constant_pad_nd")),
    Family("scatter", _placed, _ops("slice_scatter select_scatter"), ("self", "src")),
    Family("sum", _total, _ops("sum sum.dim_IntList mean mean.dim"), moves=True),
    Family(
        "choice",
        _chosen,
        _ops(
            "amax amin max min max.dim min.dim logsumexp argmax argmin argsort argsort.stable "
            "sort sort.stable topk"
        ),
    ),
    Family(
        "spread",
        _spread,
        _ops(
            "var var.dim var.correction std std.dim std.correction var_mean var_mean.dim "
            "var_mean.correction std_mean std_mean.dim std_mean.correction"
        ),
    ),
    Family("softmax", _softmax, _ops("softmax.int _softmax _safe_softmax"), soft=True),
    # Not `soft`: the logarithm of a masked weight is a number, and it moves.
    Family("log softmax", _softmax, _ops("log_softmax.int _log_softmax")),
    Family("layer norm", _layer_norm, _ops("layer_norm"), ("input", "bias")),
    Family("group norm", _group_norm, _ops("group_norm"), ("input",)),
    Family("rms norm", _rms_norm, _ops("rms_norm"), ("input",)),
    Family("cross entropy", _cross_entropy, _ops("cross_entropy_loss")),
    Family(
        "attention",
        _attention,
        _ops("scaled_dot_product_attention"),
        ("key", "value", "attn_mask"),
    ),
    Family("linear", _product_of, _ops("linear"), ("input", "weight", "bias")),
    Family("matmul", _product_of, _ops("matmul mm bmm mv dot"), (*_BOTH, "mat2", "vec", "tensor")),
    Family("addmm", _product_of, _ops("addmm"), ("self", "mat1", "mat2")),
    Family("baddbmm", _product_of, _ops("baddbmm"), ("self", "batch1", "batch2")),
    Family("einsum", _product_of, _ops("einsum"), ("tensors",)),
)

TABLE: dict[Any, Family] = {op: family for family in FAMILIES for op in family.ops}
