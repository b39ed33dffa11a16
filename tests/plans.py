"""Decoders written as graphs, one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graphs import Sketch
from torch import fx

from lensfx import Program

aten = torch.ops.aten
WIDTH, HEADS, VOCAB = 8, 2, 11
Part = Callable[["Plan", fx.Node], fx.Node]


class Plan(Sketch):
    """A decoder written by its parts; weights are numbered as they come."""

    def __init__(self, *lead: int | str) -> None:
        super().__init__()
        self.ids = self.input("ids", *(lead or ("B", "T")), dtype=torch.int64)
        self.count = 0

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        packet, _, overload = name.partition(".")
        return self.call(getattr(getattr(aten, packet), overload or "default"), *args, **kwargs)

    def fresh(self, *sizes: int) -> fx.Node:
        self.count += 1
        return self.weight(f"w{self.count}", *sizes)

    def size(self, axis: int) -> Any:
        n = self.ids.meta["val"].shape[axis]
        return n if isinstance(n, int) else self("sym_size.int", self.ids, axis)

    def embed(self) -> fx.Node:
        return self("embedding", self.fresh(VOCAB, WIDTH), self.ids)

    def places(self) -> fx.Node:
        return self("slice.Tensor", self.fresh(16, WIDTH), 0, 0, self.size(1))

    def norm(self, x: fx.Node) -> fx.Node:
        return self("layer_norm", x, [WIDTH])

    def linear(self, x: fx.Node, out: int = WIDTH) -> fx.Node:
        return self("linear", x, self.fresh(out, int(x.meta["val"].shape[-1])))

    def heads(self, x: fx.Node) -> fx.Node:
        apart = self("unflatten.int", self.linear(x), -1, [HEADS, WIDTH // HEADS])
        return self("transpose.int", apart, 1, 2)

    def joined(self, z: fx.Node) -> fx.Node:
        return self.linear(self("flatten.using_ints", self("transpose.int", z, 1, 2), 2))

    def attend(self, h: fx.Node) -> fx.Node:
        q, k, v = self.heads(h), self.heads(h), self.heads(h)
        return self.joined(self("scaled_dot_product_attention", q, k, v, None, 0.0, True))

    def attn(self, x: fx.Node) -> fx.Node:
        return self.attend(self.norm(x))

    def mlp(self, x: fx.Node) -> fx.Node:
        return self.linear(self("relu", self.linear(self.norm(x), 12)))

    def add(self, a: fx.Node, b: fx.Node, **alpha: int) -> fx.Node:
        return self("add.Tensor", a, b, **alpha)

    def finish(self, x: fx.Node) -> Program:
        return self.done(self.linear(self.norm(x), VOCAB))


def plain(p: Plan, x: fx.Node) -> fx.Node:
    x = p.add(x, p.attn(x))
    return p.add(x, p.mlp(x))


def stack(block: Part, depth: int = 2, start: Part = lambda p, x: x, *lead: int | str) -> Program:
    p = Plan(*lead)
    x = start(p, p.add(p.embed(), p.places()))
    for _ in range(depth):
        x = block(p, x)
    return p.finish(x)
