"""Make of linear ops that read one value a single linear op, and its pieces.

    linear(x; W1, b1), linear(x; W2, b2)  =  split(linear(x; [W1; W2], [b1; b2]))       W: [out, d]

Merged are all linear ops with one input value and weights of one dtype: q, k and v, gate and up,
and in a parallel block all of these. Where some have a bias, the others get zeros. `at` names
modules, such as `h.0.attn`: then only linear ops inside one of them are merged, apart for each.
Exact, and no number is computed in another way. SplitFused is the inverse.

Leaves alone: a linear op that is alone with its input, and weights of another dtype.

Source: the fused projections of Radford et al. (2019) and Shoeybi et al., Megatron-LM (2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.analysis import LINEARS
from lensfx.graph import (
    Program,
    argument,
    dtype_of,
    is_op,
    is_weight,
    module_path,
    readers,
    shape_of,
)
from lensfx.rewrite import At, Edit, Match, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def found_by(at: tuple[str, ...]) -> Rule:
    """The rule for linear ops in the named modules, or in all."""

    def find(program: Program) -> Iterator[Match]:
        groups: dict[Any, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if not is_op(node, *LINEARS) or is_weight(node) or not readers(node):
                continue
            W, path = argument(node, "weight"), f"{module_path(node)}."
            inside = [name for name in at if path.startswith(f"{name}.")]
            if is_weight(W) and len(shape_of(W) or ()) == 2 and (inside or not at):
                key = (argument(node, "input"), dtype_of(W), max(inside, default=""))
                groups.setdefault(key, []).append(node)
        for group in (g for g in groups.values() if len(g) > 1):
            yield Match(
                {"root": group[0], "linears": group, "tensors": program.tensors}, (), program
            )

    return Rule(Sites(find), lambda m: None, replace)


def merged(
    at: At, weights: list[fx.Node], biases: list[fx.Node | None]
) -> tuple[fx.Node, fx.Node | None]:
    """One weight and one bias for all; a missing bias is zeros, unless all of them are missing."""
    W = at.call(aten.cat.default, weights)  # [sum of out, d]
    if not any(biases):
        return W, None
    sizes = [(shape_of(w) or ())[:1] for w in weights]
    given = [
        at.call(aten.new_zeros.default, W, size) if b is None else b
        for b, size in zip(biases, sizes, strict=True)
    ]
    return W, at.call(aten.cat.default, given)  # [sum of out]


def replace(m: Match, edit: Edit) -> None:
    first, at = m.root, edit.before(m.root)
    early: dict[fx.Node, fx.Node] = {}

    def moved(node: fx.Node) -> fx.Node:
        """A weight where the first of the linear ops stands; it may be computed only later."""
        if node < first:
            return node
        if node not in early and node.op == "get_attr":
            name = str(node.target)
            early[node] = edit.constant(name, m.tensors[name])
        elif node not in early:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), moved)
            early[node] = at.call(node.target, *args, **kwargs)
        return early[node]

    weights = [moved(argument(n, "weight")) for n in m.linears]
    biases = [b if (b := argument(n, "bias")) is None else moved(b) for n in m.linears]
    y = at.call(aten.linear.default, argument(first, "input"), *merged(at, weights, biases))
    last, start = len(shape_of(y) or ()) - 1, 0
    for node in m.linears:
        size = int((shape_of(node) or ())[-1])
        at.replace(node, at.call(aten.slice.Tensor, y, last, start, start + size))
        start += size


@dataclass(frozen=True)
class MergeFused(Pass):
    """Merge linear ops with one input; `at` names the modules it is done in, all if it is empty."""

    at: tuple[str, ...] = ()

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear", "fold-norm", "center-writers", "center-unembed"),
        *("fold-value-bias", "fold-key-bias", "refactor-attention", "rotate-stream"),
        "split-heads",
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by(self.at),)
