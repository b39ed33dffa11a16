"""A norm of the graph as a function: applied, its divisor, and its linear part for one divisor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lensfx.analysis.structure.normalise import Norm
from lensfx.errors import LensError
from lensfx.graph.node import argument, is_op, value_of, where
from lensfx.graph.ops import data_inputs
from lensfx.graph.program import Program
from lensfx.run.affine import Maps

__all__ = ["AppliedNorm"]

aten = torch.ops.aten


class AppliedNorm:
    """A norm that can be called on any `[..., d_model]`, with the gain and bias it has now.

    `w` and `b` are None where it has none, as after they were folded.
    """

    def __init__(self, program: Program, norm: Norm) -> None:
        self.norm = norm
        self._maps = Maps(program)

    @property
    def centred(self) -> bool:
        """Whether it takes the mean away first."""
        return self.norm.kind == "layer"

    @property
    def w(self) -> torch.Tensor | None:
        """The gain, `[d_model]`."""
        return self._vector(self.norm.gain)

    @property
    def b(self) -> torch.Tensor | None:
        """The bias, `[d_model]`."""
        return self._vector(self.norm.bias)

    def _vector(self, node: fx.Node | None) -> torch.Tensor | None:
        return None if node is None else self._maps.weight(node).flatten()

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """The norm of a value, by its own mean and size."""
        return self._affine(self.bare(value))

    def _affine(self, value: torch.Tensor) -> torch.Tensor:
        w, b = self.w, self.b
        value = value if w is None else value * w
        return value if b is None else value + b

    def bare(self, value: torch.Tensor) -> torch.Tensor:
        """The value centred and divided, without gain and bias."""
        node = self.norm.bare
        if is_op(node, aten.layer_norm.default, aten.rms_norm.default):
            shape = list(argument(node, "normalized_shape"))
            none = (None, None) if is_op(node, aten.layer_norm.default) else (None,)
            target: Any = node.target
            found: torch.Tensor = target(value, shape, *none, argument(node, "eps"))
            return found
        # Written out, it may count axes from the front: as many as the model's own value has.
        rank = len(value_of(self.norm.value).shape)
        flat = value.reshape(*(1,) * (rank - value.ndim), *value.shape)
        flat = flat.flatten(0, flat.ndim - rank)
        return self._replayed(flat).reshape(value.shape).to(value.dtype)

    def _replayed(self, value: torch.Tensor) -> torch.Tensor:
        env: dict[fx.Node, Any] = {self.norm.value: value}

        def known(node: fx.Node) -> Any:
            while node not in env and _is_copy(node):
                node = data_inputs(node)[0]
            return env[node] if node in env else self._maps.operand(node)

        for node in self.norm.nodes:
            target: Any = node.target
            if node.op != "call_function":
                raise LensError("this norm cannot be run by itself", at=where(node))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
            env[node] = target(*args, **kwargs)
            if node is self.norm.bare:
                break
        found: torch.Tensor = env[self.norm.bare]
        return found

    def divisor(self, value: torch.Tensor) -> torch.Tensor:
        """What a value is divided by, `[..., 1]`."""
        value = self._centre(value)
        # Whatever the norm's spelling: a vector and the vector divided differ by the divisor.
        return value.norm(dim=-1, keepdim=True) / self.bare(value).norm(dim=-1, keepdim=True)

    def linear(self, value: torch.Tensor) -> torch.Tensor:
        """A part of what is normalised, centred and with the gain; still to be divided."""
        w = self.w
        return self._centre(value) if w is None else self._centre(value) * w

    def backward(self, direction: torch.Tensor) -> torch.Tensor:
        """The transpose of `linear`, over axis 0: it takes directions back to ahead of the norm."""
        w = self.w
        found = direction if w is None else direction * w.reshape(-1, *(1,) * (direction.ndim - 1))
        return found - found.mean(0, keepdim=True) if self.centred else found

    def _centre(self, value: torch.Tensor) -> torch.Tensor:
        return value - value.mean(-1, keepdim=True) if self.centred else value


def _is_copy(node: fx.Node) -> bool:
    """Whether a node of a norm's input is another name for it: a cast, a hook, a copy."""
    return node.op == "call_function" and len(data_inputs(node)) == 1
