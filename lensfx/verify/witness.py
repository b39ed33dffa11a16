"""A second witness of the structure: numbers from one run of the example.

The dataflow says which branches join positions, what a pattern is and what is added to the
stream. Here the graph is run once on the example with every value kept, and each branch once
more on a changed stream. Where the numbers contradict a claim, its hook names are taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from lensfx.analysis.structure import AttentionBranch, Stream, Structure, Write
from lensfx.analysis.structure.points import block_prefix
from lensfx.graph.layout import shown
from lensfx.graph.mode import plain
from lensfx.graph.ops import written_tensors
from lensfx.graph.program import Program
from lensfx.rewrite.attention import Lowering, refusal
from lensfx.verify.inputs import seeded

__all__ = ["Witness", "witnessed"]

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Witness:
    """`demoted` maps hook names that the numbers contradict to the reason, `checked` counts claims.

    `causal` says of each attention, by the start of its names, whether no position reads later
    ones on the example.
    """

    demoted: Mapping[str, str]
    causal: Mapping[str, bool]
    checked: int


def witnessed(program: Program, found: Structure) -> Witness:
    """The claims of a structure held against numbers; programs without weights are not run.

    One run of the graph and about one more of its branches, on the example of the capture.
    """
    if not found.points or program.mode.training or any(t.is_meta for t in _tensors(program)):
        return Witness(MappingProxyType({}), MappingProxyType({}), 0)
    with torch.no_grad(), plain(), seeded():
        return _Witness(program, found).run()


def _tensors(program: Program) -> list[Tensor]:
    return [*program.tensors.values(), *program.example]


class _Witness:
    def __init__(self, program: Program, found: Structure) -> None:
        self.program, self.found = program, found
        self.names = {p.name for p in found.points}
        self.demoted: dict[str, str] = {}
        self.causal: dict[str, bool] = {}
        self.checked = 0
        self.values = self._everything()

    def run(self) -> Witness:
        for at, stream in enumerate(self.found.streams):
            prefix = block_prefix(self.found.streams, at)
            for block in stream.blocks:
                for write in block.writes:
                    self._write(stream, write, f"{prefix}.{block.index}", block.label(write) or "")
        demoted = {n: r for n, r in self.demoted.items() if n in self.names}
        return Witness(MappingProxyType(demoted), MappingProxyType(self.causal), self.checked)

    def _everything(self) -> Values:
        """Every value of one run on the example."""
        values: Values = {}
        changed = written_tensors(self.program.graph)
        given = iter(self.program.example)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                held = self.program.tensors[str(node.target)]
                values[node] = held.clone() if node.target in changed else held
            elif node.op == "call_function":
                values[node] = _called(node, values)
        return values

    def _write(self, stream: Stream, write: Write, at: str, label: str) -> None:
        self._identity(write, at, label)
        self._mixing(stream, write, at, label)
        if len(write.attention) == 1:
            folder = "cross_attn" if label == "cross_attn" else "attn"
            self._pattern(write, write.attention[0], f"{at}.{folder}")

    def _identity(self, write: Write, at: str, label: str) -> None:
        """What is carried and what is written make what the add gives."""
        if write.fused:
            return
        parts = list(self._writes_of(write.add))
        whole = self.values[write.add]
        total = self.values[write.carry] + sum(w.sign * self.values[w.value] for w in parts)
        self.checked += 1
        if whole.shape != total.shape or _differs(whole, total, whole):
            self._demote(at, (f"hook_{label}_out",), f"%{write.add.name} is not carry and write")

    def _writes_of(self, add: fx.Node) -> Iterator[Write]:
        for stream in self.found.streams:
            yield from (w for w in stream.writes if w.add is add)

    def _mixing(self, stream: Stream, write: Write, at: str, label: str) -> None:
        """A branch changes elsewhere with the stream at one position exactly if it mixes."""
        axis = _position_axis(stream)
        if axis is None or label in ("cross_attn", "") or not write.branch.entries:
            return
        entries = {entry for entry, _ in write.branch.entries}
        before = self.values[write.value]
        length = before.shape[axis]
        if length < 2 or any(self.values[e].shape[axis : axis + 1] != (length,) for e in entries):
            return
        place = length // 2
        moved = {e: _nudged(self.values[e], axis, place) for e in entries}
        after = self._again(write.value, moved, stream.values - entries)
        change = (after - before).abs().transpose(0, axis).flatten(1).amax(1)
        told = [i for i in range(length) if change[i] > _tolerance(before)]
        self.checked += 1
        if any(i != place for i in told) and not write.branch.mixes:
            reason = "its result at one position changes with the stream at another"
            inside = ("mlp.hook_pre", "mlp.hook_post", "mlp.hook_pre_linear")
            self._demote(at, (f"hook_{label}_out", *(inside if label == "mlp" else ())), reason)
        if write.attention and told:
            self.causal[f"{at}.{label}"] = min(told) >= place

    def _pattern(self, write: Write, found: AttentionBranch, at: str) -> None:
        """The rows of a pattern sum to one, and another pattern gives another result."""
        names = ("hook_pattern", "hook_attn_scores")
        got = self._weights(found)
        if got is None:
            return
        pattern, replace, native = got
        sums = pattern.float().sum(-1)
        bound = 1e-3 if pattern.dtype in (torch.float32, torch.float64) else 3e-2
        # A row without a key is 0, and a sink takes a part of every row.
        allowed = ((sums - 1).abs() < bound) | (sums.abs() < bound)
        if found.sinks is not None:
            allowed |= sums < 1
        self.checked += 1
        if not bool(allowed.all()):
            worst = float(sums.flatten()[(sums - 1).abs().argmax()])
            self._demote(at, names, f"a row of its pattern sums to {worst:.3g}")
            return
        if native.shape[-1] < 2 or not bool((pattern - pattern.roll(1, -1)).abs().max() > bound):
            return
        after = self._again(write.value, replace(native.roll(1, -1)), frozenset())
        self.checked += 1
        before = self.values[write.value]
        if not _differs(after, before, before):
            self._demote(at, names, "another pattern in its place changes nothing")

    def _weights(self, found: AttentionBranch) -> Any:
        """The pattern as hooks see it, what puts another one in its place, and it as it stands."""
        if found.core is not None and refusal(found.core) is None:
            core = found.core
            steps: Any = Lowering(core, _now, self.values.__getitem__)  # type: ignore[arg-type]
            pattern = steps.pattern(steps.scores())
            return pattern, lambda p: {core: steps.weighed(p)}, pattern
        if found.pattern is None or found.pattern.layout.splits:
            return None
        place = found.pattern
        order = place.layout.order
        if order and order[-1] != len(order) - 1:
            return None
        value = self.values[place.node]
        return shown(value, place.layout), lambda p: {place.node: p}, value

    def _again(self, value: fx.Node, moved: Values, fixed: frozenset[fx.Node]) -> Tensor:
        """A value with some of those it is computed from replaced; `fixed` ones stay."""
        needed, stack = set(), [value]
        while stack:
            node = stack.pop()
            if node not in needed and node not in moved:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        env = dict(moved)
        for node in sorted(needed):
            stale = node.op == "call_function" and any(n in env for n in node.all_input_nodes)
            copies = node in fixed and not any(n in moved for n in node.all_input_nodes)
            if stale and not copies:
                env[node] = _called(node, _Over(env, self.values))
        found: Tensor = env[value] if value in env else self.values[value]
        return found

    def _demote(self, at: str, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            self.demoted.setdefault(f"{at}.{name}", reason)


class _Over(dict[fx.Node, Any]):
    """Values of a second run, and those of the first where it did not get to."""

    def __init__(self, new: Values, old: Values) -> None:
        super().__init__()
        self.new, self.old = new, old

    def __getitem__(self, node: fx.Node) -> Any:
        return self.new[node] if node in self.new else self.old[node]


def _now(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _position_axis(stream: Stream) -> int | None:
    """Which axis of the stream runs along positions; None if no single one does."""
    order = stream.layout.order
    return order[1] if len(order) == 3 and not stream.layout.splits else None


def _nudged(value: Tensor, axis: int, place: int) -> Tensor:
    """The value with noise of its own size at one position."""
    noise = torch.zeros_like(value)
    at = noise.select(axis, place)
    at.copy_(torch.randn_like(at) * (value.std() + 1e-3))
    return value + noise


def _tolerance(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return 100 * eps * max(float(value.abs().max()), 1e-6)


def _differs(a: Tensor, b: Tensor, like: Tensor) -> bool:
    return bool((a - b).abs().nan_to_num().max() > _tolerance(like))
