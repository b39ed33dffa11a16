"""Can a row of an attention mask forbid every key? Fused attention gives 0 there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lensfx.analysis.transfer import FILLED
from lensfx.graph.node import argument, dtype_of, is_op, op_name, schema_names
from lensfx.graph.ops import CASTS, VIEWS, data_inputs, is_hook, is_impure

__all__ = ["bounds", "may_forbid_all"]

aten = torch.ops.aten

# Sizes given to the symbols, in turn: equal, growing and falling, with 1 among them.
_SIZES = ((1, 0), (2, 0), (7, 0), (16, 0), (2, 3), (5, 1), (19, -2))
# A mask of more positions than that is not computed. How a slice says that it goes to the end.
_MOST, _END = 1500, 2**31


def may_forbid_all(mask: fx.Node) -> str:
    """Why a row of the mask may allow no key; empty if every row allows one, for all inputs.

    A mask that depends on sizes alone is computed at several of them, beyond every number that is
    written in it: between those nothing changes.
    """
    if dtype_of(mask) != torch.bool and bounds(mask) is not None:
        return ""
    source = _input_of(mask)
    if source is not None:
        decides = f"%{source.name} decides"
        return f"a row of %{mask.name} may allow no key ({decides}): attention gives 0 there"
    largest = _largest(mask)
    if largest > _MOST:
        decides = f"{largest:g}, which is too large to be tried"
        return f"whether a row of %{mask.name} allows a key hangs on the number {decides}"
    tried = 0
    for sizes in (*_SIZES, *_beyond(largest)):
        value = _computed(mask, sizes)
        if value is None:
            continue
        tried += 1
        allowed = value if value.dtype == torch.bool else value > -math.inf
        if not bool(allowed.any(-1).all()):
            return f"a row of %{mask.name} allows no key at some sizes: attention gives 0 there"
    return "" if tried > 2 else f"%{mask.name} cannot be computed from the sizes alone"


def _largest(mask: fx.Node) -> float:
    """The largest number written in what a mask is computed from, but for what masks entries."""
    seen, stack = {mask}, [mask]
    numbers = [0.0]
    while stack:
        node = stack.pop()
        given: list[Any] = []
        fx.node.map_aggregate((node.args, dict(node.kwargs)), given.append)
        plain = [abs(g) for g in given if isinstance(g, int | float) and not isinstance(g, bool)]
        # What a float is filled with is no position.
        kind = dtype_of(node)
        filled = node.target in FILLED or op_name(node) in ("masked_fill", "where")
        if not (filled and kind is not None and kind.is_floating_point):
            numbers += [g for g in plain if g < _END]
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        stack.extend(new)
    return max(numbers)


def _beyond(largest: float) -> tuple[tuple[int, int], ...]:
    """Sizes behind which no number of a mask makes a difference any more."""
    if largest < _SIZES[-1][0]:
        return ()
    size = int(largest)
    return ((size, 0), (size + 1, 0), (2 * size + 3, 0), (size + 1, size), (2 * size + 3, -size))


def _input_of(mask: fx.Node) -> fx.Node | None:
    """An input whose data, or a stored tensor whose numbers, the mask is made of."""
    seen, stack = {mask}, [mask]
    while stack:
        node = stack.pop()
        if node.op in ("placeholder", "get_attr") or is_impure(node):
            return node
        new = [n for n in data_inputs(node) if n not in seen]
        seen.update(new)
        stack.extend(new)
    return None


def _computed(mask: fx.Node, sizes: tuple[int, int]) -> torch.Tensor | None:
    """The mask where the symbols of the graph have these sizes; None if it does not run."""
    symbols: dict[Any, int] = {}
    known: dict[fx.Node, Any] = {}

    def size(value: Any) -> int:
        expr = value.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            symbols.setdefault(symbol, max(1, sizes[0] + sizes[1] * len(symbols)))
        return int(expr.subs(symbols))

    def run(node: fx.Node) -> Any:
        if node not in known:
            held = node.meta.get("val")
            if isinstance(held, torch.SymInt):
                known[node] = size(held)
            elif isinstance(held, int | float | bool):
                known[node] = held
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), run)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    try:
        with torch.no_grad():
            found = run(mask)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return found if isinstance(found, torch.Tensor) else None


def bounds(node: Any) -> tuple[float, float] | None:
    """Finite bounds of every entry of a value, whatever the inputs are; None if none are known."""
    if isinstance(node, bool | int | float):
        return (float(node), float(node)) if math.isfinite(node) else None
    if not isinstance(node, fx.Node):
        return None
    if dtype_of(node) == torch.bool:
        return (0.0, 1.0)
    found = _bounds(node)
    kind = dtype_of(node)
    if found is None or kind is None or not kind.is_floating_point:
        return found
    limit = torch.finfo(kind).max
    return found if -limit <= found[0] and found[1] <= limit else None


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    if is_op(node, *FILLED):
        names = [n for n in ("fill_value", "s") if n in schema_names(node.target)]
        word = "zeros" if "zeros" in str(node.target) else "ones"
        return bounds(argument(node, names[0])) if names else bounds(int(word == "ones"))
    if is_op(node, *CASTS, *VIEWS) or is_hook(node):
        return bounds(node.args[0])
    if is_op(node, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther):
        return _either(bounds(argument(node, "self")), bounds(argument(node, "other")))
    if is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _either(bounds(argument(node, "self")), bounds(argument(node, "value")))
    return _arithmetic(node)


def _either(
    a: tuple[float, float] | None, b: tuple[float, float] | None
) -> tuple[float, float] | None:
    return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))


_SUMS: Mapping[Any, tuple[int, int]] = {
    aten.add.Tensor: (1, 1),
    aten.add.Scalar: (1, 1),
    aten.sub.Tensor: (1, -1),
    aten.sub.Scalar: (1, -1),
    aten.rsub.Tensor: (-1, 1),
    aten.rsub.Scalar: (-1, 1),
}


def _arithmetic(node: fx.Node) -> tuple[float, float] | None:
    signs = _SUMS.get(node.target)
    if signs is None and not is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        return None
    a, b = bounds(argument(node, "self")), bounds(argument(node, "other"))
    if a is None or b is None:
        return None
    if signs is None:
        ends = [x * y for x in a for y in b]
    elif argument(node, "alpha") == 1:
        ends = [signs[0] * x + signs[1] * y for x in a for y in b]
    else:
        return None
    return min(ends), max(ends)
