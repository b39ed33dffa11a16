"""Norms, as one operator or written out in any way: what they normalise and what they divide by.

A statistic of x is what pointwise operators make of reductions of x over its features; x, or x
less its own mean, times or over such a statistic is a norm. A reduction along positions is none,
and neither is a share x / x.sum().
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from lensfx.analysis.axes import is_one
from lensfx.analysis.structure.flow import Flow
from lensfx.analysis.structure.labels import Labels
from lensfx.graph.node import argument, is_op, op_name, schema_names, shape_of

__all__ = ["Norm", "find_norms"]

aten = torch.ops.aten

_WHOLE = (aten.layer_norm.default, aten.rms_norm.default)
_SPREADS = ("var", "std", "norm", "linalg_vector_norm")
_BOTH = ("var_mean", "std_mean")
_AXIS_KEPT = ("expand", "unsqueeze", "expand_as")


@dataclass(frozen=True)
class Norm:
    """A norm of `value`: `bare` is the value divided, `node` the same with gain and bias.

    `kind` is `layer` if the value is centred by its own mean, else `rms`; `scale` is the node of
    what it divides by or multiplies with, None inside a single operator.
    """

    kind: str
    value: fx.Node
    bare: fx.Node
    node: fx.Node
    scale: fx.Node | None = None
    gain: fx.Node | None = None
    bias: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _About:
    """What a value is to another one: `x` itself, centred, its square, its mean or a statistic."""

    form: str
    x: fx.Node
    centred: bool = False


def find_norms(flow: Flow, labels: Labels) -> dict[fx.Node, Norm]:
    """Every norm by the node that ends it, and by the bare node before its gain and bias."""
    return _Norms(flow, labels).run()


def _per_row(x: fx.Node, statistic: fx.Node) -> bool:
    """Whether a statistic stands against the rows it is of, not against other axes."""
    a, b = shape_of(x) or (), shape_of(statistic) or ()
    whole = len(a) == len(b) and bool(a)
    return whole and (is_one(b[-1]) or op_name(statistic) in _AXIS_KEPT)


class _Norms:
    def __init__(self, flow: Flow, labels: Labels) -> None:
        self.flow, self.labels = flow, labels
        self.about: dict[fx.Node, _About] = {}
        self.found: dict[fx.Node, Norm] = {}

    def run(self) -> dict[fx.Node, Norm]:
        for node in self.flow.nodes:
            if node not in self.flow.live or node.op != "call_function":
                continue
            if self.flow.rep(node) is not node:
                continue
            if is_op(node, *_WHOLE):
                self._whole(node)
            else:
                self._written(node)
        return self.found

    def _whole(self, node: fx.Node) -> None:
        x = self.flow.rep(node.args[0])  # type: ignore[arg-type]
        if self.labels.position_mixes(node):
            return
        kind = "layer" if is_op(node, aten.layer_norm.default) else "rms"
        names = schema_names(node.target)
        bias = argument(node, "bias") if "bias" in names else None
        gain = argument(node, "weight")
        norm = Norm(kind, x, node, node, None, gain, bias, (node,))
        self.found[node] = norm

    def _written(self, node: fx.Node) -> None:
        deps = self.flow.deps[node]
        name = op_name(node)
        if name in ("mean", "sum", *_SPREADS):
            self._reduction(node, name)
        elif name == "getitem" and op_name(deps[0]) in _BOTH:
            self._reduction(node, "mean" if node.args[1] else "var", deps[0])
        elif len(deps) == 1:
            self._unary(node, name, deps[0])
        elif len(deps) == 2 and name in ("mul", "div", "sub"):
            self._pair(node, name, *[self.flow.rep(n) for n in node.args[:2]])  # type: ignore[arg-type]

    def _self(self, node: fx.Node) -> _About:
        return self.about.get(node) or _About("x", node)

    def _reduction(self, node: fx.Node, name: str, at: fx.Node | None = None) -> None:
        """A mean, or another statistic, over the features: the last axis and no other."""
        at = at or node
        if self.labels.position_mixes(at) or len(self.flow.deps[at]) != 1:
            return
        x = self.flow.deps[at][0]
        rank = len(shape_of(x) or ())
        given = argument(at, "dim") if "dim" in schema_names(at.target) else None
        over = given if isinstance(given, (list, tuple)) else [given]
        if (
            not rank
            or any(not isinstance(d, int) or d % rank != rank - 1 for d in over)
            or not over
        ):
            return
        about = self._self(x)
        if name in _SPREADS and about.form == "x":
            centred = about.centred or name in ("var", "std")
            self.about[node] = _About("statistic", about.x, centred)
        elif about.form == "square":
            self.about[node] = _About("statistic", about.x, about.centred)
        elif name == "mean" and about.form == "x" and not about.centred:
            self.about[node] = _About("mean", about.x)

    def _unary(self, node: fx.Node, name: str, dep: fx.Node) -> None:
        about = self._self(dep)
        squares = name == "square" or (name == "pow" and node.args[1] in (2, 2.0))
        squares |= name == "mul" and node.args[0] is node.args[1]
        if about.form == "x" and squares:
            self.about[node] = _About("square", about.x, about.centred)
        elif about.form == "mean" and squares:
            self.about[node] = _About("mean_square", about.x)
        elif name in ("mul", "div", "add", "sub") and dep in self.found:
            self._affine(node, name, dep)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            pointwise = name not in ("masked_fill", "where")
            scaled = name in ("mul", "div", "neg") and about.form == "x" and about.centred
            if scaled or (pointwise and about.form == "statistic"):
                self.about[node] = about
        elif name in _AXIS_KEPT and about.form in ("statistic", "mean"):
            self.about[node] = about

    def _pair(self, node: fx.Node, name: str, a: fx.Node, b: fx.Node) -> None:
        left, right = self._self(a), self._self(b)
        mean = right.form == "mean" and right.x is left.x and _per_row(a, b)
        if name == "sub" and left.form == "x" and mean:
            self.about[node] = _About("x", left.x, True)
        elif name == "sub" and left.form == "statistic" and right.form == "mean_square":
            self.about[node] = _About("statistic", left.x, True)
        elif name in ("mul", "div"):
            if name == "mul" and a is b and left.form == "x":
                self.about[node] = _About("square", left.x, left.centred)
            if name == "mul" and left.form == "statistic" and right.form == "x":
                left, right, a, b = right, left, b, a
            same = left.x is right.x and left.centred == right.centred
            if left.form == "x" and right.form == "statistic" and same and _per_row(a, b):
                kind = "layer" if left.centred else "rms"
                between = self._between(node, left.x)
                self.found[node] = Norm(kind, left.x, node, node, b, None, None, between)

    def _between(self, node: fx.Node, x: fx.Node) -> tuple[fx.Node, ...]:
        found, stack = {node}, [node]
        while stack:
            for dep in self.flow.deps[stack.pop()]:
                if dep is not x and dep not in found:
                    found.add(dep)
                    stack.append(dep)
        return tuple(sorted(found))

    def _affine(self, node: fx.Node, name: str, dep: fx.Node) -> None:
        """A gain or bias behind a norm: one number per feature, and nobody else reads the norm."""
        norm = self.found[dep]
        others = [
            n for n in node.args[:2] if isinstance(n, fx.Node) and self.flow.rep(n) is not dep
        ]
        if len(others) != 1 or sum(not is_one(s) for s in shape_of(others[0]) or ()) > 1:
            return
        if len(self.flow.readers[dep]) != 1 or self.labels.has_positions(
            a for axis in self.labels.axes(others[0]) for a in axis
        ):
            return
        if name == "mul" and norm.gain is None and norm.bias is None:
            norm = replace(norm, gain=others[0])
        elif name == "add" and norm.bias is None:
            norm = replace(norm, bias=others[0])
        else:
            return
        norm = replace(norm, node=node, nodes=(*norm.nodes, node))
        for place in (node, norm.bare, *norm.nodes[norm.nodes.index(norm.bare) :]):
            if place in self.found or place is node:
                self.found[place] = norm
