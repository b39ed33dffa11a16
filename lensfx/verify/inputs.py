"""Inputs that are hard on a rewrite, and weights moved off the values that hide faults."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import fx

from lensfx.analysis.unembed import table_and_ids, token_tables
from lensfx.errors import GuardError
from lensfx.graph.choice import choices
from lensfx.graph.node import is_op, shape_of
from lensfx.graph.ops import CASTS, VIEWS
from lensfx.graph.program import Program

__all__ = ["Scenario", "hard_inputs", "model_dtype", "scenarios", "seeded", "wide"]

# Small on purpose: a wrong rewrite is wrong at every size, and float64 runs should stay cheap.
LARGEST = 8


@dataclass(frozen=True)
class Scenario:
    """One way to run a program: its inputs, and its weights by name in float64.

    `dtype` is the model's own, which decides the eps of a norm that names none. With `noise`, a
    seed, every result is moved by one rounding of float64.
    """

    name: str
    inputs: tuple[torch.Tensor, ...]
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype | None = None
    noise: int | None = None


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers inside each time, of torch, Python and numpy; none are used up."""
    numpy = sys.modules.get("numpy")
    kept = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            if numpy is not None:
                numpy.random.seed(0)
            yield
    finally:
        random.setstate(kept[0])
        if numpy is not None:
            numpy.random.set_state(kept[1])


def hard_inputs(
    program: Program, seed: int = 0, most: int | None = None
) -> list[tuple[torch.Tensor, ...]]:
    """Calls the program accepts: small sizes, batch 1, position 1; random and constant rows.

    Token ids are drawn over the whole table, other integers and masks from the example's own
    values, floats at the example's scale. The first `most` of them, or all.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _table_rows(program)
    drawn = (_drawn(program, sizes, rows, generator) for sizes in _sizes(program))
    accepted = [*islice((tensors for tensors in drawn if _accepted(program, tensors)), most)]
    return accepted or [tuple(t.clone() for t in program.example)]


def _sizes(program: Program) -> Iterator[dict[str, int]]:
    """Sizes by symbol: as in the example but small, and with single symbols and axes at 1."""
    base: dict[str, int] = {}
    # Inputs that belong together, ids and their mask, have symbols of their own: only all of
    # one axis can be 1.
    groups: dict[object, set[str]] = {}
    for axis in program.guards.dynamic:
        size = program.example[axis.leaf].shape[axis.axis]
        room = max(size, axis.low, 2 + axis.axis * 3)
        symbol = str(axis.symbol)
        base.setdefault(symbol, max(min(room, LARGEST, axis.high), axis.low))
        groups.setdefault(symbol, set()).add(symbol)
        groups.setdefault(axis.axis, set()).add(symbol)
    yield base
    for group in dict.fromkeys(map(frozenset, groups.values())):
        yield {**base, **dict.fromkeys(group, 1)}
    # The example's own sizes come last: relations between sizes hold there for sure.
    yield {str(a.symbol): program.example[a.leaf].shape[a.axis] for a in program.guards.dynamic}


def _drawn(
    program: Program,
    sizes: dict[str, int],
    rows: dict[fx.Node, int],
    generator: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    decided = any(True for _ in choices(program.graph))
    drawn = []
    for leaf, (node, example) in enumerate(zip(placeholders, program.example, strict=True)):
        axes = [a for a in program.guards.axes if a.leaf == leaf]
        shape = [
            sizes.get(str(a.symbol), example.shape[a.axis]) if a.symbol else example.shape[a.axis]
            for a in axes
        ]
        # Where values decide the path, others than the example's may take another one.
        holes = not decided and example.dtype in (torch.bool, torch.int64, torch.int32)
        drawn.append(_values(example, shape, rows.get(node), generator, holes))
    return tuple(drawn)


def _values(
    example: torch.Tensor,
    shape: Sequence[int],
    rows: int | None,
    generator: torch.Generator,
    holes: bool = False,
) -> torch.Tensor:
    if example.is_floating_point():
        scale = example.float().std().item() if example.numel() > 1 else 1.0
        noise = torch.randn(list(shape), generator=generator, dtype=torch.float64)
        return (noise * (scale or 1.0)).to(example.dtype)
    if rows is not None:
        ids = torch.randint(0, rows, list(shape), generator=generator).to(example.dtype)
        if ids.ndim > 1 and ids.shape[0] > 1 and ids.numel():
            ids[-1] = ids[-1, 0]
        return ids
    resized = example
    for axis, size in enumerate(shape):
        if example.shape[axis]:
            index = torch.arange(size) % example.shape[axis]
            resized = resized.index_select(axis, index)
    resized = resized.clone()
    if holes and example.numel() and bool((example == 1).all()) and resized.ndim > 1:
        # Padded at the end of every other row: all ones would hide whoever ignores the mask.
        resized[1::2, ..., resized.shape[-1] - resized.shape[-1] // 3 :] = 0
    return resized


def _table_rows(program: Program) -> dict[fx.Node, int]:
    """For each input that is a token id, how many rows the smallest table it indexes has.

    Left out is an input from which ids are computed: what else it may hold, only its example says.
    """
    rows: dict[fx.Node, int] = {}
    computed = set()
    for node in token_tables(program):
        found = table_and_ids(node)
        assert found is not None
        table, source = found
        plain = True
        while source.op == "call_function":
            plain = plain and is_op(source, *VIEWS, *CASTS)
            source = source.args[0]  # type: ignore[assignment]
        if not plain:
            computed.add(source)
        size = (shape_of(table) or (0,))[0]
        rows[source] = min(int(size), rows.get(source, int(size)))
    return {node: size for node, size in rows.items() if node not in computed}


def _accepted(program: Program, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        program.guards.check(tensors)
    except GuardError:
        return False
    return True


def scenarios(program: Program, seed: int = 0, *, few: bool = False) -> Iterator[Scenario]:
    """The program under hard inputs and hard weights.

    Weights: the model's own; moved, so that no gain is 1 and no bias 0; moved with token tables
    scaled to a thousandth, where eps shows; moved with one channel of them 500 times as large.
    `few`: its own on one call, then moved ones on a call of batch 1.
    """
    inputs = hard_inputs(program, seed, 2 if few else None)
    dtype = model_dtype(program)
    own = {name: wide(t) for name, t in program.tensors.items()}
    for i, tensors in enumerate(inputs[:1] if few else inputs):
        yield Scenario(f"own weights, call {i}", tensors, own, dtype)
    del own
    moved = _moved(program, seed)
    yield Scenario("moved weights", inputs[-1] if few else inputs[0], moved, dtype)
    if few:
        return
    tables = _table_names(program)
    if tables:
        tiny = {n: w * 1e-3 if n in tables else w for n, w in moved.items()}
        yield Scenario("tiny embeddings", inputs[0], tiny, dtype)
        outlier = {n: _with_outlier(w) if n in tables else w for n, w in moved.items()}
        yield Scenario("an outlier channel", inputs[0], outlier, dtype)


def model_dtype(program: Program) -> torch.dtype | None:
    """The dtype of the program's first floating tensor; None if it has none."""
    tensors = [*program.tensors.values(), *program.example]
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or complex128; one that is neither real nor complex as it is."""
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128)
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _moved(program: Program, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    known: dict[int, torch.Tensor] = {}
    for tensor in program.tensors.values():
        drawn = wide(tensor)
        if id(tensor) not in known and isinstance(tensor, torch.nn.Parameter):
            noise = torch.randn(drawn.shape, generator=generator, dtype=torch.float64)
            spread = 0.1 * drawn.abs().mean() + (0.1 if drawn.ndim < 2 else 0.0)
            drawn = drawn + noise.to(drawn.dtype) * spread
        known.setdefault(id(tensor), drawn)
    return {name: known[id(tensor)] for name, tensor in program.tensors.items()}


def _with_outlier(table: torch.Tensor) -> torch.Tensor:
    changed = table.clone()
    changed[:, 0] *= 500
    return changed


def _table_names(program: Program) -> set[str]:
    found = set()
    for node in token_tables(program):
        pair = table_and_ids(node)
        if pair is not None and pair[0].op == "get_attr":
            found.add(str(pair[0].target))
    return found
