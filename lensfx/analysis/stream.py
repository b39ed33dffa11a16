"""The residual stream of a plain pre-norm model: its start, the writes to it, its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lensfx.analysis.contraction import is_weight_product, keeps_positions_apart
from lensfx.analysis.norms import NORMS, WRITTEN_NORM, is_norm
from lensfx.analysis.unembed import heads, token_tables, unembedding
from lensfx.graph.node import argument, is_op, is_weight, shape_of
from lensfx.graph.ops import CASTS, VIEWS, data_inputs, is_hook, readers
from lensfx.graph.program import Program
from lensfx.graph.views import same_size
from lensfx.rewrite.match import Match, match

__all__ = ["Block", "Stream", "Unknown", "Write", "residual_stream"]

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Write:
    """One add to the stream: `add` = `carry` + `branch`; `norm` is what the branch reads it by.

    `reader` takes up the branch: `add`, or the sum with the other branch of a parallel block.
    """

    add: fx.Node
    carry: fx.Node
    branch: fx.Node
    kind: str
    norm: fx.Node
    reader: fx.Node


@dataclass(frozen=True)
class Block:
    """The writes of one block: attention, MLP, or both; `parallel` if both read the same value."""

    attn: Write | None
    mlp: Write | None
    parallel: bool = False

    @property
    def writes(self) -> tuple[Write, ...]:
        """The writes there are, in order."""
        return tuple(sorted((w for w in (self.attn, self.mlp) if w), key=lambda w: w.add))


@dataclass(frozen=True)
class Stream:
    """A plain pre-norm stream: `start`, blocks, `end`, the last norm and the head that read it."""

    embed: fx.Node
    pos_embed: fx.Node | None
    start: fx.Node
    blocks: tuple[Block, ...]
    end: fx.Node
    ln_final: fx.Node | None
    unembed: fx.Node | None


@dataclass(frozen=True)
class Unknown:
    """Why no plain stream was found, and the node where the search ended."""

    reason: str
    node: fx.Node | None = None


def residual_stream(program: Program) -> Stream | Unknown:
    """The stream of the program, found from its dataflow, or why it is no plain pre-norm one."""
    return _Search(program).run()


class _Search:
    def __init__(self, program: Program) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self.rank = {n: i for i, n in enumerate(nodes)}
        self.above: dict[fx.Node, int] = {}
        for node in nodes:
            bits = 0
            for n in data_inputs(node):
                if not is_weight(n):
                    bits |= self.above[n] | (1 << self.rank[n])
            self.above[node] = bits

    def run(self) -> Stream | Unknown:
        table = next(token_tables(self.program), None)
        if table is None:
            return Unknown("no table is indexed by token ids")
        head = unembedding(self.program)
        some = head or next((h.linear for h in heads(self.program)), None)
        last = argument(some, "input") if some is not None else self._first_output()
        if not isinstance(last, fx.Node):
            return Unknown("no output is computed from the tokens")
        final = _through_views(last)
        norm = _norm_behind(final)
        end = _through_views(self._normed(norm)) if norm is not None else final
        writes = list(self._writes(end))
        if not writes:
            return Unknown(f"no residual add leads to %{end.name}", end)
        writes.reverse()
        start = writes[0].carry if isinstance(writes[0], Write) else end
        bad = next((w for w in writes if isinstance(w, Unknown)), None)
        if bad is not None:
            return bad
        good = [w for w in writes if isinstance(w, Write)]
        if not self._reads(start, table):
            return Unknown(f"the stream starts at %{start.name}, before any token table", start)
        mixer = self._mixer_before(start)
        if mixer is not None:
            return Unknown(f"%{mixer.name} mixes positions before the stream starts", mixer)
        embed, pos = self._stem(start, table)
        blocks = tuple(_blocks(good))
        return Stream(embed, pos, start, blocks, end, norm, head)

    def _mixer_before(self, start: fx.Node) -> fx.Node | None:
        """An attention ahead of the stream: then the true start lies further back."""
        above = [n for n in self.rank if self._reads(start, n)]
        mixers = (aten.scaled_dot_product_attention.default, *_SOFTMAX)
        return next((n for n in above if is_op(n, *mixers)), None)

    def _first_output(self) -> fx.Node | None:
        flat = pytree.tree_leaves(self.program.graph.output_node().args[0])
        return next((n for n in flat if isinstance(n, fx.Node)), None)

    def _reads(self, node: fx.Node, source: fx.Node) -> bool:
        return node is source or bool(self.above[node] >> self.rank[source] & 1)

    def _normed(self, norm: fx.Node) -> fx.Node:
        """The value a norm normalises."""
        if is_op(norm, *NORMS):
            source: fx.Node = argument(norm, "input")
            return source
        found = match(WRITTEN_NORM, norm)
        assert isinstance(found, Match)
        whole: fx.Node = found.x
        return whole

    def _writes(self, end: fx.Node) -> Iterator[Write | Unknown]:
        """The adds from the end of the stream back to its start."""
        node = _through_views(end)
        while is_op(node, aten.add.Tensor):
            a, b = node.args[0], node.args[1]
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                return
            if is_weight(a) or is_weight(b):
                return
            chosen = self._carry(a, b)
            if chosen is None:
                return
            carry, branch = chosen
            if argument(node, "alpha") != 1:
                yield Unknown(f"%{node.name} scales what it adds by its alpha", node)
            else:
                yield from self._branches(node, carry, branch)
            node = _through_views(carry)

    def _branches(self, add: fx.Node, carry: fx.Node, branch: fx.Node) -> list[Write | Unknown]:
        """The one write of an add, or the two of x + (attention + MLP), from the last back."""
        both = _through_views(branch)
        sides = both.args[:2] if is_op(both, aten.add.Tensor) else ()
        if len(sides) == 2 and all(isinstance(n, fx.Node) and not is_weight(n) for n in sides):
            found = [self._write(add, carry, side, both) for side in sides]  # type: ignore[arg-type]
            kinds = {w.kind: w for w in found if isinstance(w, Write)}
            if len(kinds) == 2 and argument(both, "alpha") == 1:
                return [kinds["mlp"], kinds["attn"]]
        return [self._write(add, carry, branch, add)]

    def _carry(self, a: fx.Node, b: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        for carry, branch in ((a, b), (b, a)):
            root = _through_views(carry)
            if self._reads(branch, root):
                return carry, branch
        for carry, branch in ((a, b), (b, a)):
            root = _through_views(carry)
            if is_op(root, aten.add.Tensor):
                inner = [n for n in root.args[:2] if isinstance(n, fx.Node)]
                both = len(inner) == 2 and self._carry(*inner)
                if both and self._reads(branch, _through_views(both[0])):
                    return carry, branch
        return None

    def _write(
        self, add: fx.Node, carry: fx.Node, branch: fx.Node, reader: fx.Node
    ) -> Write | Unknown:
        region = self._region(branch, carry)
        norms = [n for n in region if is_norm(n)]
        entries = [n for n in norms if self._enters(n, carry)]
        raw = [n for n in region if self._reads_raw(n, carry, norms)]
        if not entries or raw:
            place = raw[0] if raw else branch
            return Unknown(f"%{place.name} reads the stream without a norm in front", place)
        kind = self._kind(region, (shape_of(_through_views(carry)) or ())[:-1])
        if isinstance(kind, fx.Node):
            return Unknown(f"%{kind.name} is part of neither attention nor an MLP", kind)
        return Write(add, carry, branch, kind, entries[0], reader)

    def _kind(self, region: list[fx.Node], lead: tuple[Any, ...]) -> str | fx.Node:
        """`attn`, `mlp`, or a node that says it is neither.

        Attention is a softmax of a product of two computed values that weighs a third; an MLP
        works on each position alone.
        """
        if any(is_op(n, aten.scaled_dot_product_attention.default) for n in region):
            return "attn"
        products = [n for n in region if is_op(n, *_PRODUCTS) and not is_weight_product(n)]
        patterns = {
            n
            for n in region
            if is_op(n, *_SOFTMAX) and any(self._reads(n, product) for product in products)
        }
        if any(_reaches(n, patterns) for product in products for n in data_inputs(product)):
            return "attn"
        mixing = (n for n in region if not keeps_positions_apart(n, lead, region))
        apart = any(map(is_weight_product, region))
        return next(mixing, "mlp" if apart else region[-1])

    def _region(self, branch: fx.Node, carry: fx.Node) -> list[fx.Node]:
        """The nodes between the stream value and the branch's result."""
        root = _through_views(carry)
        stop = {root, *self._same_stream(root)}
        found: set[fx.Node] = set()
        stack = [branch]
        while stack:
            node = stack.pop()
            if node in found or node in stop or node.op != "call_function" or is_weight(node):
                continue
            found.add(node)
            stack.extend(data_inputs(node))
        return sorted(n for n in found if any(self._reads(n, s) for s in stop))

    def _same_stream(self, root: fx.Node) -> set[fx.Node]:
        """The values a parallel branch may read in place of `root`: what the last add carried."""
        if not is_op(root, aten.add.Tensor):
            return set()
        inner = [n for n in root.args[:2] if isinstance(n, fx.Node)]
        chosen = self._carry(*inner) if len(inner) == 2 else None
        return {_through_views(chosen[0])} if chosen else set()

    def _enters(self, norm: fx.Node, carry: fx.Node) -> bool:
        root = _through_views(carry)
        source = _through_views(self._normed(norm))
        return source is root or source in self._same_stream(root)

    def _reads_raw(self, node: fx.Node, carry: fx.Node, norms: list[fx.Node]) -> bool:
        root = _through_views(carry)
        sources = {root, *self._same_stream(root)}
        direct = any(_through_views(n) in sources for n in data_inputs(node) if not is_weight(n))
        if not direct or is_norm(node) or is_op(node, *VIEWS, *CASTS) or is_hook(node):
            return False
        return not any(self._reads(n, node) and self._enters(n, carry) for n in norms)

    def _stem(self, start: fx.Node, table: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The token embedding with its scale, and the position embedding added to it, if any."""
        node, added = start, []
        while node is not table:
            live = [n for n in data_inputs(node) if self._reads(n, table)]
            if len(live) != 1:
                break
            if is_op(node, aten.add.Tensor):
                added += [n for n in data_inputs(node) if n is not live[0] and _has_positions(n)]
            node = live[0]
        given = [n for n in self.rank if n.op == "placeholder"]
        counted = [n for n in added if not any(self._reads(n, p) for p in given)]
        found = counted if len(counted) == 1 else added
        scaled = table
        while True:
            up = [u for u in readers(scaled) if is_op(u, aten.mul.Tensor) and _scales(u)]
            if len(readers(scaled)) != 1 or not up or not self._reads(start, up[0]):
                # Of several values added to the tokens, none is known to be the positions'.
                return scaled, found[0] if len(found) == 1 else None
            scaled = up[0]


def _norm_behind(node: fx.Node) -> fx.Node | None:
    """The norm that a value is, perhaps scaled and shifted by weights written out behind it."""
    while not is_norm(node):
        live = [n for n in data_inputs(node) if not is_weight(n)]
        affine = is_op(node, aten.mul.Tensor, aten.add.Tensor) and len(live) == 1
        if not affine or len(data_inputs(node)) != 2:
            return None
        node = _through_views(live[0])
    return node


def _scales(node: fx.Node) -> bool:
    other = node.args[1]
    return not isinstance(other, fx.Node) or (is_weight(other) and not (shape_of(other) or ()))


def _has_positions(node: fx.Node) -> bool:
    """Whether a value has an axis for the positions, or is the same at all of them."""
    shape = shape_of(node) or ()
    return len(shape) > 1 and not same_size(shape[-2], 1)


def _through_views(node: fx.Node) -> fx.Node:
    """The value behind casts, views that keep the last axis, and hook points."""
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return node
        if is_hook(node) or is_op(node, aten.detach.default):
            node = source
            continue
        if not is_op(node, *VIEWS, *CASTS):
            return node
        a, b = shape_of(source), shape_of(node)
        if not a or not b or not same_size(a[-1], b[-1]):
            return node
        node = source


def _reaches(node: fx.Node, targets: set[fx.Node]) -> bool:
    while node not in targets:
        live = [n for n in data_inputs(node) if not is_weight(n)]
        if len(live) != 1 or is_op(node, *_PRODUCTS, aten.linear.default):
            return False
        node = live[0]
    return True


def _blocks(writes: list[Write]) -> Iterator[Block]:
    pending: Write | None = None
    for write in writes:
        pair = pending and _paired(pending, write)
        if pair:
            yield pair
            pending = None
            continue
        if pending is not None:
            yield _alone(pending)
        pending = write
    if pending is not None:
        yield _alone(pending)


def _paired(first: Write, second: Write) -> Block | None:
    """The block of two writes: attention and an MLP behind it, or both on one value."""
    parallel = first.add is second.add or (
        _through_views(second.carry) is first.add and not _descends(second.norm, first.add)
    )
    if first.kind == "attn" and second.kind == "mlp":
        return Block(first, second, parallel)
    return Block(second, first, True) if parallel and first.kind != second.kind else None


def _alone(write: Write) -> Block:
    return Block(write, None) if write.kind == "attn" else Block(None, write)


def _descends(node: fx.Node, source: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n is source:
            return True
        if n not in seen and n > source:
            seen.add(n)
            stack.extend(data_inputs(n))
    return False
