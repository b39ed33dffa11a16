"""Values that are no node of the graph as it stands, computed where a run asks for them.

A part that is only read is computed beside the graph, which goes on as it was; one that is edited
takes the place of what it is a part of, if a hook changes it: what only looks changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lensfx.graph.layout import Layout, as_stored, show, shown, store
from lensfx.graph.node import argument, is_op, schema_names
from lensfx.graph.ops import is_hook
from lensfx.rewrite.attention import Lowering
from lensfx.run.names import Place

__all__ = ["Parts", "divisor", "rescaled"]

aten = torch.ops.aten

Visit = Callable[[fx.Node, str], fx.Node]


class Parts:
    """Writes the parts of one node into a run's graph.

    `env` maps the program's nodes to those of the run; `visit` puts a value before the hooks of a
    name and returns what they make of it; `edited` are the names that have any, `changed` tells
    whether a value of the program is at one of them.
    """

    def __init__(
        self,
        graph: fx.Graph,
        env: dict[fx.Node, fx.Node],
        edited: frozenset[str],
        changed: Callable[[fx.Node], bool],
        visit: Visit,
    ) -> None:
        self.graph, self.env, self.edited, self.visit = graph, env, edited, visit
        self.changed = changed
        self.inputs: dict[str, tuple[fx.Node, fx.Node]] = {}
        self.met: list[tuple[fx.Node, fx.Node]] = []

    def write(self, node: fx.Node, value: fx.Node, named: Sequence[tuple[str, Place]]) -> fx.Node:
        """What the node's readers read, once the named parts of it were visited."""
        for name, place in named:
            if place.part == "rows":
                value = self._rows(value, name, place)
        by_part = {place.part: (name, place) for name, place in named}
        for part, write in _WRITERS.items():
            if part in by_part:
                self.met = []
                made = write(self, node, value, by_part)
                if made is not value:
                    pairs = [n for pair in self.met for n in pair]
                    value = self.call(settled, value, made, *pairs)
        return value

    def _rows(self, value: fx.Node, name: str, place: Place) -> fx.Node:
        """Rows of batch and positions in one axis, shown with the two apart."""
        like = place.point.rows_of if place.point is not None else None
        assert like is not None
        lead = [self.call(aten.sym_size.int, self.env[like], axis) for axis in (0, 1)]
        apart = self.call(aten.unflatten.int, value, 0, lead)
        after = self.visit(apart, name)
        return value if after is apart else self.call(aten.flatten.using_ints, after, 0, 1)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node of the run's graph."""
        return self.graph.call_function(target, args, kwargs)

    def _shown(self, value: fx.Node, place: Place) -> fx.Node:
        return show(self.call, value, place.layout)

    def _stored(self, value: fx.Node, place: Place) -> fx.Node:
        return store(self.call, value, place.layout)

    def _through(self, value: fx.Node, name: str, place: Place) -> fx.Node:
        """A value after the hooks of a name, with the axes the graph goes on with."""
        seen = self._shown(value, place)
        after = self._met(seen, name)
        return value if after is seen else self._stored(after, place)

    def _met(self, value: fx.Node, name: str) -> fx.Node:
        """A value after the hooks of a name, which it is compared with where they may change it."""
        after = self.visit(value, name)
        if after is not value:
            self.met.append((value, after))
        return after

    def norm(self, node: fx.Node, value: fx.Node, named: dict[str, tuple[str, Place]]) -> fx.Node:
        """A norm as one operator: its divisor, and what it is before gain and bias."""
        names = [named[p] for p in ("scale", "normalized") if p in named]
        touched = any(name in self.edited for name, _ in names)
        bare = self._bare(node) if touched or "normalized" in named else value
        start = bare
        if "scale" in named:
            bare = self._scale(node, bare, *named["scale"])
        if "normalized" in named:
            bare = self._through(bare, *named["normalized"])
        if bare is start or not touched:
            return value
        for slot, target in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
            affine = argument(node, slot) if slot in schema_names(node.target) else None
            if isinstance(affine, fx.Node):
                bare = self.call(target, bare, self.env[affine])
        return bare

    def _bare(self, node: fx.Node) -> fx.Node:
        source, shape = self.env[argument(node, "input")], argument(node, "normalized_shape")
        eps = argument(node, "eps")
        if is_op(node, aten.layer_norm.default):
            return self.call(node.target, source, shape, None, None, eps)
        return self.call(node.target, source, shape, None, eps)

    def _scale(self, node: fx.Node, bare: fx.Node, name: str, place: Place) -> fx.Node:
        source = self.env[argument(node, "input")]
        centred = is_op(node, aten.layer_norm.default)
        axes = len(argument(node, "normalized_shape"))
        scale = self.call(divisor, source, axes, argument(node, "eps"), centred)
        after = self._through(scale, name, place)
        return bare if after is scale else self.call(rescaled, bare, scale, after)

    def reciprocal(
        self, node: fx.Node, value: fx.Node, named: dict[str, tuple[str, Place]]
    ) -> fx.Node:
        """A value that is multiplied by, shown as the divisor that it is one over."""
        name, place = named["reciprocal"]
        below = self.call(aten.reciprocal.default, value)
        after = self._through(below, name, place)
        return value if after is below else self.call(redivided, value, below, after)

    def attention(
        self, node: fx.Node, value: fx.Node, named: dict[str, tuple[str, Place]]
    ) -> fx.Node:
        """The scores and the pattern inside a fused attention."""
        steps = Lowering(node, self.call, self.env.__getitem__)
        touched = any(named[p][0] in self.edited for p in ("scores", "pattern") if p in named)
        scores = steps.scores()
        if "scores" in named:
            scores = self._through(scores, *named["scores"])
        if "pattern" not in named and not touched:
            return value
        pattern = steps.pattern(scores)
        if "pattern" in named:
            pattern = self._through(pattern, *named["pattern"])
        return steps.weighed(pattern) if touched else value

    def result(self, node: fx.Node, value: fx.Node, named: dict[str, tuple[str, Place]]) -> fx.Node:
        """What each head adds: the output projection of each head alone, without its bias."""
        name, place = named["result"]
        point = place.point
        z = point.within.z if point is not None and point.within is not None else None
        assert z is not None
        path = _Path(z.node, node)
        given = [self.env[path.first], *(self.env[n] for n in path.operands)]
        alone = self.call(path.per_head(z.layout, place.layout), *given)
        after = self._met(alone, name)
        if after is alone:
            return value
        before, together = (
            self._stored(self.call(aten.sum.dim_IntList, heads, [-2]), place)
            for heads in (alone, after)
        )
        if self._touched(path):
            return self.call(moved, value, before, together)
        return self.call(aten.add.Tensor, together, self.call(path.without, *given))

    def copied(self, node: fx.Node, value: fx.Node, named: dict[str, tuple[str, Place]]) -> fx.Node:
        """The stream as each head reads it: a copy for each, from which its q, k or v is made."""
        copies, touched = None, False
        for part in ("shared", "input"):
            if part in named:
                name, place = named[part]
                copies = self._copies(part, name, place, node, copies)
                touched |= name in self.edited
        if not touched:
            return value
        name, place = named.get("input") or named["shared"]
        point = place.point
        assert point is not None
        assert point.source is not None
        # The copies may be shared with another place, whose axes are in another order.
        layout = next((p.layout for p in point.also if p.node is node), place.layout)
        path = _Path(point.source, node)
        operands = [self.env[n] for n in path.operands]
        made = self.call(path.from_copies(point.rows, layout), copies, *operands)
        if not self._touched(path):
            return made
        before = self.call(path.run, self.env[path.first], *operands)
        return self.call(moved, value, before, made)

    def _touched(self, path: _Path) -> bool:
        """Whether hooks may change a value on the way, which must not be lost."""
        return any(self.changed(n) for n in path.nodes if n is not path.last)

    def _copies(
        self, part: str, name: str, place: Place, node: fx.Node, given: fx.Node | None
    ) -> fx.Node:
        """The copies after the hooks of a name, which sees them once for all that are made."""
        point = place.point
        assert point is not None
        assert point.source is not None
        if part == "shared" and name in self.inputs:
            before, after = self.inputs[name]
            if after is not before:
                self.met.append((before, after))
            return after
        if given is None:
            first = _Path(point.source, node).first
            whole = self._shown(self.env[first], Place(first, layout=point.rows))
            given = self.call(spread, whole, point.heads)
        after = self._met(given, name)
        if part == "shared":
            self.inputs[name] = given, after
        return after


def settled(value: torch.Tensor, made: torch.Tensor, *met: torch.Tensor) -> torch.Tensor:
    """`made`, or the very bits of `value` where hooks gave back what they met; `made`'s gradient.

    `met` holds what the hooks of each name were given, and what they made of it.
    """
    same = torch.stack([(a == b).all() for a, b in zip(met[::2], met[1::2], strict=True)]).all()
    if not made.requires_grad:
        return torch.where(same, value, made)
    # x - x is 0, and has the gradient of x.
    return torch.where(same, value.detach() + (made - made.detach()), made)


def moved(value: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """A value with the change of something that it was made from, on top of other changes."""
    return value + (after - before)


def divisor(x: torch.Tensor, axes: int, eps: float | None, centred: bool) -> torch.Tensor:
    """What a norm over the last `axes` axes divides by, [batch, pos, 1]."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    over = tuple(range(-axes, 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    # `var` is several times slower than this on a CPU.
    centre = wide - wide.mean(over, True) if centred else wide
    return (centre.pow(2).mean(over, True) + eps).sqrt().to(x.dtype)


def rescaled(normed: torch.Tensor, scale: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A bare norm's output as if it had divided by `seen`; its very bits where that is `scale`."""
    # As a correction, because x / x is exactly 1, and the gradient of `seen` is still right there.
    return normed + normed * (scale / seen - 1)


def redivided(value: torch.Tensor, below: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """One over `seen`, where `value` is one over `below`; its very bits where both are one."""
    return value * (below / seen)


def spread(value: torch.Tensor, heads: int) -> torch.Tensor:
    """A copy of the stream for each head: [batch, pos, d_model] -> [batch, pos, head, d_model]."""
    return value.unsqueeze(-2).expand(*value.shape[:-1], heads, value.shape[-1])


class _Path:
    """The nodes between two values, as a function that can be run on other values of the first.

    The first value is taken behind the hook points that all of the path goes through.
    """

    def __init__(self, first: fx.Node, last: fx.Node) -> None:
        self.nodes = list(_between(first, last))
        while len(on := [n for n in self.nodes if first in n.all_input_nodes]) == 1:
            if on[0] is last or not is_hook(on[0]):
                break
            first = on[0]
            self.nodes.remove(first)
        self.first, self.last = first, last
        inside = {first, *self.nodes}
        reads = dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes)
        self.operands = [n for n in reads if n not in inside]

    def run(self, value: torch.Tensor, *operands: Any) -> torch.Tensor:
        """What the path gives of a value in place of its first one."""
        env: dict[fx.Node, Any] = dict(zip(self.operands, operands, strict=True))
        env[self.first] = value
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found: torch.Tensor = env[self.last]
        return found

    def per_head(self, heads: Layout, out: Layout) -> Callable[..., torch.Tensor]:
        """What the path makes of each head of the first value with the others at zero."""

        def results(z: torch.Tensor, *operands: Any) -> torch.Tensor:
            apart = shown(z, heads)
            number = apart.shape[-2]
            only = torch.eye(number, dtype=z.dtype, device=z.device).unsqueeze(-1)  # [h, h, 1]
            nothing = self.run(torch.zeros_like(z), *operands)

            def one(mask: torch.Tensor) -> torch.Tensor:
                kept = self.run(as_stored(apart * mask, heads), *operands)
                return shown(kept - nothing, out)

            return torch.vmap(one, out_dims=-2)(only)

        return results

    def without(self, value: torch.Tensor, *operands: Any) -> torch.Tensor:
        """What the path gives if its first value is zero: biases."""
        return self.run(torch.zeros_like(value), *operands)

    def from_copies(self, rows: Layout, heads: Layout) -> Callable[..., torch.Tensor]:
        """The last value, each head of it from its own copy of the first."""

        def made(copies: torch.Tensor, *operands: Any) -> torch.Tensor:
            def one(copy: torch.Tensor) -> torch.Tensor:
                return shown(self.run(as_stored(copy, rows), *operands), heads)

            every = torch.vmap(one, in_dims=-2, out_dims=0)(copies)  # [h, batch, pos, h, d]
            own = torch.diagonal(every, dim1=0, dim2=-2)  # [batch, pos, d, h]
            return as_stored(own.transpose(-1, -2), heads)

        return made


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes that depend on the first value and that the last one depends on, in order."""
    above, stack = set(), [last]
    while stack:
        node = stack.pop()
        if node not in above and node > first:
            above.add(node)
            stack.extend(node.all_input_nodes)
    reached = {first}
    for node in sorted(above):
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            yield node


_WRITERS: dict[str, Callable[..., fx.Node]] = {
    "shared": Parts.copied,
    "input": lambda self, node, value, named: (
        value if "shared" in named else self.copied(node, value, named)
    ),
    "scale": Parts.norm,
    "normalized": lambda self, node, value, named: (
        value if "scale" in named else self.norm(node, value, named)
    ),
    "reciprocal": Parts.reciprocal,
    "pattern": Parts.attention,
    "scores": lambda self, node, value, named: (
        value if "pattern" in named else self.attention(node, value, named)
    ),
    "result": Parts.result,
}
