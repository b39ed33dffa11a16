"""Writes grouped into blocks: a convention, by the period in which mixers and MLPs follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from torch import fx

from lensfx.analysis.structure.facts import Block, Write
from lensfx.graph.ops import data_inputs

__all__ = ["grouped"]

_LOCAL = frozenset({"conv", "pad", "shift", "cat", "slice"})


def grouped(
    writes: tuple[Write, ...],
    root: Callable[[fx.Node], fx.Node],
    passed: Callable[[fx.Node], list[fx.Node]],
) -> tuple[Block, ...]:
    """The blocks of a stream; `root` gives the stream value behind an alias of it."""
    sets = _parallel(writes, root)
    words = [_word(group) for group in sets]
    found = []
    for index, group in enumerate(_cut(sets, _starts(words))):
        inside = tuple(w for s in group for w in s)
        found.append(_block(index, inside, sets, passed))
    return tuple(_with_shared(found))


def _parallel(writes: tuple[Write, ...], root: Callable[[fx.Node], fx.Node]) -> list[list[Write]]:
    """Runs of writes none of which reads the result of another one of the run."""
    found: list[list[Write]] = []
    for write in writes:
        last = found[-1] if found else []
        read = {root(entry) for entry, _ in write.branch.entries}
        # Values of a stream stand in the graph in the order in which they are made.
        after = any(r >= w.add for r in read for w in last)
        alone = any(w.kind == "inject" for w in [write, *last])
        if last and read and not after and not alone:
            last.append(write)
        else:
            found.append([write])
    return found


def _word(group: list[Write]) -> str:
    """The letters of one run: M mixes positions, C reads another stream, L nearby ones only."""
    letters = set()
    for write in group:
        if write.kind == "cross_attention":
            letters.add("C")
        elif write.kind == "inject":
            continue
        elif write.branch.mixes:
            letters.add("L" if set(write.branch.mixes) <= _LOCAL else "M")
        else:
            letters.add("N")
    return "".join(sorted(letters))


def _starts(words: list[str]) -> list[int]:
    """The runs that begin a block: by the smallest period, or at each new mixer."""
    known = [i for i, w in enumerate(words) if w]
    told = [words[i] for i in known]
    flat = "".join(told)
    local = "N" if "M" in flat and "N" not in flat else "M"
    told = ["".join(sorted({local if c == "L" else c for c in w})) for w in told]
    period = next(p for p in range(1, len(told) + 1) if _repeats(told, p)) if told else 1
    single = period == len(told) and sum("M" in w for w in told) > 1
    if not single:
        firsts = known[::period]
    else:
        firsts = [
            i for k, i in enumerate(known) if not k or ("M" in told[k] and "C" not in told[k - 1])
        ]
    # What is injected ahead of a block belongs to it.
    return [_first_of(words, i, known) for i in firsts]


def _repeats(words: list[str], period: int) -> bool:
    return len(words) % period == 0 and all(
        word == words[i % period] for i, word in enumerate(words)
    )


def _first_of(words: list[str], at: int, known: list[int]) -> int:
    while at > 0 and at - 1 not in known:
        at -= 1
    return at


def _cut(sets: list[list[Write]], starts: list[int]) -> list[list[list[Write]]]:
    edges = [*starts, len(sets)]
    return [sets[a:b] for a, b in pairwise(edges) if sets[a:b]]


def _block(
    index: int,
    inside: tuple[Write, ...],
    sets: list[list[Write]],
    passed: Callable[[fx.Node], list[fx.Node]],
) -> Block:
    def first(*kinds: str) -> Write | None:
        return next((w for w in inside if w.kind in kinds), None)

    attn, mlp = first("attention"), first("mlp", "gated_mlp", "moe")
    together = any(attn in s and mlp in s for s in sets if attn is not None and mlp is not None)
    pre = _before(inside, passed)
    return Block(
        index,
        inside,
        pre,
        attn,
        first("cross_attention"),
        first("mixer"),
        mlp,
        together,
    )


def _before(inside: tuple[Write, ...], passed: Callable[[fx.Node], list[fx.Node]]) -> fx.Node:
    """The stream before a block: the latest value through which all that it reads there comes."""
    aliases = passed(inside[0].carry)
    at = {node: i for i, node in enumerate(aliases)}
    deepest = 0
    for write in inside:
        for entry, _ in write.branch.entries:
            if entry in at:
                deepest = max(deepest, at[entry])
            elif passed(entry)[-1] is aliases[-1]:
                deepest = len(aliases) - 1
    return aliases[deepest]


def _with_shared(blocks: list[Block]) -> list[Block]:
    """Blocks that run the same weights again point at the first one that does."""
    seen: dict[frozenset[str], int] = {}
    found = []
    for block in blocks:
        weights = frozenset(
            str(n.target) for w in block.writes for node in w.branch.nodes for n in _weights(node)
        )
        first = seen.setdefault(weights, block.index) if weights else block.index
        found.append(replace(block, shared_with=first if first != block.index else None))
    return found


def _weights(node: fx.Node) -> list[fx.Node]:
    return [n for n in data_inputs(node) if n.op == "get_attr"]
