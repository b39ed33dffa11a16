"""Blocks, norms and the head of a model as light objects, under the names TransformerLens gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lensfx.errors import LensError
from lensfx.run.factored import FactoredMatrix
from lensfx.run.norms import AppliedNorm
from lensfx.run.weights import ByRole, layer_weight

__all__ = ["AttentionView", "BlockView", "MLPView", "Table", "Unembed"]


@dataclass(frozen=True)
class _Part:
    model: ByRole
    layer: int

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("_") or name not in self._names():
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        found = layer_weight(self.model.program, self.model.structure, name, self.layer)
        if found is None:
            raise LensError(
                f"block {self.layer} has no {name}", hint="print(lens.structure) for what it has"
            )
        return found

    def _names(self) -> tuple[str, ...]:
        return ()

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names()]


class AttentionView(_Part):
    """The weights of one attention: W_Q, W_K, W_V, W_O, their biases, QK and OV, without layers."""

    def _names(self) -> tuple[str, ...]:
        return tuple(f"{kind}_{role}" for kind in "Wb" for role in "QKVO")

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q @ W_K^T` per head, `[head, d_model, d_model]`."""
        query: torch.Tensor = self.W_Q
        return FactoredMatrix(query, _for_all(self.W_K, query.shape[0]).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V @ W_O` per head, `[head, d_model, d_model]`."""
        out: torch.Tensor = self.W_O
        return FactoredMatrix(_for_all(self.W_V, out.shape[0]), out)


def _for_all(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.repeat_interleave(heads // weight.shape[0], dim=0)


class MLPView(_Part):
    """The weights of one MLP: W_in, W_gate, W_out and their biases."""

    def _names(self) -> tuple[str, ...]:
        return tuple(f"{kind}_{role}" for kind in "Wb" for role in ("in", "gate", "out"))


@dataclass(frozen=True)
class BlockView:
    """One block: `attn`, `mlp`, and the norms they read the stream by, None where there is none."""

    model: ByRole
    layer: int

    @property
    def attn(self) -> AttentionView:
        """The attention's weights."""
        return AttentionView(self.model, self.layer)

    @property
    def mlp(self) -> MLPView:
        """The MLP's weights."""
        return MLPView(self.model, self.layer)

    @property
    def ln1(self) -> AppliedNorm | None:
        """The norm of the attention or other mixer."""
        norm = self.model.structure.blocks[self.layer].ln1
        return None if norm is None else AppliedNorm(self.model.program, norm)

    @property
    def ln2(self) -> AppliedNorm | None:
        """The norm of the MLP, if it is one of its own."""
        norm = self.model.structure.blocks[self.layer].ln2
        return None if norm is None else AppliedNorm(self.model.program, norm)


@dataclass(frozen=True)
class Unembed:
    """The head: called on what the final norm gives, it returns the logits ahead of a soft cap."""

    model: ByRole

    @property
    def W_U(self) -> torch.Tensor:
        """`[d_model, d_vocab]`."""
        return self.model.W_U

    @property
    def b_U(self) -> torch.Tensor:
        """`[d_vocab]`."""
        return self.model.b_U

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """`value @ W_U + b_U`."""
        return value @ self.W_U + self.b_U


@dataclass(frozen=True)
class Table:
    """An embedding by its table: `W_E`, or `W_pos` where `positions`."""

    model: ByRole
    positions: bool = False

    @property
    def W_E(self) -> torch.Tensor:
        """`[d_vocab, d_model]`."""
        return self.model.W_E

    @property
    def W_pos(self) -> torch.Tensor:
        """`[n_ctx, d_model]`."""
        return self.model.W_pos

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of these tokens, before any scale; of positions, one for each of them."""
        return self.W_pos[: tokens.shape[-1]] if self.positions else self.W_E[tokens]
