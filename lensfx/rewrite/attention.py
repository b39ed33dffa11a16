"""Fused attention written out: scores, pattern and values, as operators that others can read.

    scores  = (q * scale) @ k.T, masked     [..., q, k]     scale: 1 / sqrt(head width) if not given
    pattern = softmax(scores)               [..., q, k]     a row with no key at all is 0
    z       = pattern @ v                   [..., q, d]

Only where the nodes are put depends on who asks: a pass writes them into the graph that the
attention is in, a run into a graph of its own, with hooks between the steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lensfx.graph.node import argument, dtype_of, shape_of, value_of

__all__ = ["Lowered", "Lowering", "lowered", "refusal", "settle"]

aten = torch.ops.aten

Call = Callable[..., fx.Node]
Env = Callable[[fx.Node], fx.Node]


@dataclass(frozen=True)
class Lowered:
    """The nodes that one attention became."""

    scores: fx.Node
    pattern: fx.Node
    z: fx.Node


@dataclass(frozen=True)
class Lowering:
    """The steps of one attention, to be written one after another.

    `node` is the fused call, which only gives facts: its arguments, their shapes and dtypes.
    `call(target, *args, **kwargs)` makes one operator node; `env` gives the node that stands for
    an operand of `node` where the steps are written. `node` must have no `refusal`.

    The steps of a float16 or bfloat16 attention are in float32, as they are in torch's kernels.
    Only z is rounded: scores that were would be several times further off than the fused result.
    """

    node: fx.Node
    call: Call
    env: Env = lambda node: node

    def scores(self) -> fx.Node:
        """The scaled scores, masked entries at -inf, a mask of numbers added: [..., q, k]."""
        q, k = self._operand("query"), self._operand("key")  # [..., q, d], [..., k, d]
        scale = self._scale()
        if scale != 1:
            q = self.call(aten.mul.Tensor, q, scale)
        k = self.call(aten.transpose.int, k, -2, -1)
        scores = self.call(aten.matmul.default, q, k)
        mask = argument(self.node, "attn_mask")
        if mask is not None and dtype_of(mask) != torch.bool:
            scores = self.call(aten.add.Tensor, scores, self.env(mask))
        elif mask is not None:
            scores = self.call(aten.where.ScalarOther, self.env(mask), scores, -math.inf)
        if argument(self.node, "is_causal"):
            scores = self.call(aten.where.ScalarOther, self._causal(scores), scores, -math.inf)
        return scores

    def pattern(self, scores: fx.Node) -> fx.Node:
        """The rows of weights that `scores` give: [..., q, k]."""
        if argument(self.node, "attn_mask") is None:
            return self.call(aten.softmax.int, scores, -1)
        # Only a mask can leave a row without a key, which softmax would make nan.
        return self.call(aten._safe_softmax.default, scores, -1)

    def weighed(self, pattern: fx.Node) -> fx.Node:
        """The values weighed by `pattern`, what the fused call returns: [..., q, d]."""
        z = self.call(aten.matmul.default, pattern, self._operand("value"))
        dtype = dtype_of(self.node)
        return z if dtype is _wide(dtype) else self.call(aten.to.dtype, z, dtype)

    def _operand(self, name: str) -> fx.Node:
        given = argument(self.node, name)
        value, dtype = self.env(given), dtype_of(given)
        if dtype is not _wide(dtype):
            value = self.call(aten.to.dtype, value, _wide(dtype))
        group = _group(self.node, name)
        return value if group == 1 else self.call(_REPEAT, value, group, -3)

    def _scale(self) -> Any:
        given = argument(self.node, "scale")
        if isinstance(given, fx.Node):
            return self.env(given)
        return 1 / math.sqrt(_sizes(self.node, "query")[-1] or 1) if given is None else given

    def _causal(self, scores: fx.Node) -> fx.Node:
        """Where a query may see a key, made from the scores so that it has their sizes."""
        heads = _sizes(self.node, "query")[-3:-2]
        if len(_sizes(self.node, "query")) > 3 and isinstance(heads[0], int) and heads[0] > 1:
            scores = self.call(aten.slice.Tensor, scores, -3, 0, 1)  # one mask for all heads
        ones = self.call(aten.ones_like.default, scores, dtype=torch.bool)
        return self.call(aten.tril.default, ones)


def lowered(call: Call, node: fx.Node, env: Env = lambda node: node) -> Lowered:
    """All steps of the fused attention `node`, written by `call` over the operands `env` gives."""
    steps = Lowering(node, call, env)
    scores = steps.scores()
    pattern = steps.pattern(scores)
    return Lowered(scores, pattern, steps.weighed(pattern))


def refusal(node: fx.Node) -> str | None:
    """Why the fused attention `node` cannot be written out, or None."""
    drops, value = argument(node, "dropout_p"), value_of(node)
    if drops != 0:
        return f"it drops out entries of the pattern (dropout_p={drops}), drawn inside the kernel"
    if not isinstance(value, torch.Tensor) or value.is_nested or not value.is_floating_point():
        return "its result is not a plain tensor of floating numbers"
    query = _sizes(node, "query")
    if argument(node, "scale") is None and not isinstance(query[-1], int):
        return "its scale follows from a head width that is not fixed"
    heads = [_sizes(node, name)[-3:-2] for name in ("query", "key", "value")]
    if argument(node, "enable_gqa") and not all(isinstance(n, int) for h in heads for n in h):
        return "its groups follow from numbers of heads that are not fixed"
    return None


def settle(node: fx.Node) -> None:
    """Let the sizes be known as equal that the steps take for equal.

    Torch compares fewer sizes for the fused call than for its steps, so that two symbols may stand
    for the one length of keys and values. No call is lost by it: where the steps fail, the fused
    call fails too, or reads memory that is not its own.
    """

    def run(target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    mode = getattr(value_of(node), "fake_mode", None)
    with mode or contextlib.nullcontext(), torch.no_grad():
        lowered(run, node, value_of)


_REPEAT = aten.repeat_interleave.self_int


def _sizes(node: fx.Node, name: str) -> tuple[Any, ...]:
    return shape_of(argument(node, name)) or ()


def _group(node: fx.Node, name: str) -> int:
    """How many query heads share each head of an operand."""
    if name == "query" or not argument(node, "enable_gqa"):
        return 1
    return int(_sizes(node, "query")[-3] // _sizes(node, name)[-3])


def _wide(dtype: torch.dtype | None) -> torch.dtype | None:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
