"""A long chain of norm, linear, relu and add as a program, to time matching and editing alone."""

from __future__ import annotations

import inspect

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lensfx.graph.guards import Guards
from lensfx.graph.program import Program, Source
from lensfx.graph.signature import Leaf, Signature

aten = torch.ops.aten
WIDTH = 8


def synthetic_program(size: int) -> Program:
    """A program of about `size` operator nodes: x = x + relu(linear(layer_norm(x)))."""
    graph, tensors = fx.Graph(), {}
    mode = FakeTensorMode()
    fake = {s: mode.from_tensor(torch.empty(s)) for s in ((2, 3, WIDTH), (WIDTH, WIDTH), (WIDTH,))}
    x = graph.placeholder("x")
    x.meta = {"val": fake[2, 3, WIDTH]}
    weights = {"g": (WIDTH,), "s": (WIDTH,), "W": (WIDTH, WIDTH), "b": (WIDTH,)}
    reads = {}
    for name, shape in weights.items():
        tensors[name] = torch.nn.Parameter(torch.randn(shape))
        reads[name] = graph.get_attr(name)
        reads[name].meta = {"val": fake[shape], "weight": True}

    def call(target: object, *args: object) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"val": fake[2, 3, WIDTH], "weight": False, "native": node.name}
        return node

    for _ in range(size // 4):
        n = call(aten.layer_norm.default, x, [WIDTH], reads["g"], reads["s"])
        y = call(aten.linear.default, n, reads["W"], reads["b"])
        x = call(aten.add.Tensor, x, call(aten.relu.default, y))
    graph.output((x,))
    spec = pytree.tree_flatten(((0,), {}))[1]
    out = pytree.tree_flatten(0)[1]
    forward = inspect.signature(lambda x: x)
    signature = Signature(forward, ("x",), (), spec, (Leaf("x", True),), out, ("output",))
    guards = Guards.build([next(iter(graph.nodes))], ["x"], {}, [])
    example = (torch.randn(2, 3, WIDTH),)
    return Program(graph, tensors, signature, guards, example, Source("synthetic"))
