"""What TransformerLens computes from a cache: the stream taken apart, and what is in the logits.

Everything is exact for the model at hand, or refused with a reason. A norm that a stack goes
through takes its divisor from the run, and its gain where that was not folded; its bias belongs to
no part of the stream. So, without a soft cap,

    logit_attrs(decompose_resid(), t).sum(0) + (ln_final.b @ W_U + b_U)[t] = logits[t]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lensfx.errors import LensError
from lensfx.run.ends import is_capped, reads_stream
from lensfx.run.norms import AppliedNorm
from lensfx.run.stream import Addend, Out, Summed, norm_name
from lensfx.run.weights import ByRole

__all__ = ["Analyses", "Rows", "SliceInput", "Through", "Wanted", "sliced", "stacked"]

SliceInput = int | slice | tuple[int | None, ...] | list[int] | torch.Tensor | None
Rows = list[tuple[str, torch.Tensor]]


def sliced(value: torch.Tensor, wanted: SliceInput, axis: int) -> torch.Tensor:
    """A value at some places of an axis; a number drops it, None leaves it whole."""
    if wanted is None:
        return value
    index: list[Any] = [slice(None)] * value.ndim
    index[axis] = slice(*wanted) if isinstance(wanted, tuple) else wanted
    return value[tuple(index)]


def stacked(rows: Rows, labels: bool) -> Any:
    """Rows as one tensor, `[row, ...]`, with the list of their labels if wanted."""
    if not rows:
        raise LensError("there is nothing to stack ahead of this layer", hint="take a later layer")
    stack = torch.stack([value for _, value in rows])
    return (stack, [label for label, _ in rows]) if labels else stack


@dataclass(frozen=True)
class Through:
    """The norm that a stack goes through, with the divisor of the run; None: nothing is done."""

    norm: AppliedNorm | None = None
    scale: torch.Tensor | None = None

    def stack(self, value: torch.Tensor) -> torch.Tensor:
        """What each row of a stack is of the norm's result."""
        if self.norm is None or self.scale is None:
            return value
        return self.norm.linear(value) / self.scale

    def divided(self, value: torch.Tensor) -> torch.Tensor:
        """A product with `direction`, divided."""
        return value if self.scale is None else value / self.scale

    def parts(self, positions: SliceInput, projection: torch.Tensor | None) -> Wanted:
        """Which parts to make so that `finished` can put them through the norm."""
        if projection is None:
            return Wanted(positions)
        wide = projection if projection.ndim > 1 else projection.unsqueeze(-1)
        return Wanted(positions, self.direction(wide), projection.ndim == 1)

    def finished(self, rows: Rows, parts: Wanted, labels: bool) -> Any:
        """The rows behind the norm, stacked."""
        done = self.stack if parts.projection is None else self.divided
        return stacked([(label, parts.shown(done(value))) for label, value in rows], labels)

    def direction(self, value: torch.Tensor) -> torch.Tensor:
        """The direction ahead of the norm for one behind it; the product is still to be divided."""
        return value if self.norm is None else self.norm.backward(value)


@dataclass(frozen=True)
class Wanted:
    """At which positions parts are wanted, and onto which directions they are projected."""

    positions: SliceInput = None
    projection: torch.Tensor | None = None
    flat: bool = False

    def shown(self, value: torch.Tensor) -> torch.Tensor:
        """A part as it is asked for: without its last axis where that is one direction."""
        return value.squeeze(-1) if self.flat else value

    def onto(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix to the stream, as one to the projection."""
        return matrix if self.projection is None else matrix @ self.projection


class Analyses:
    """The analyses of one cache of one model, up to a layer: -1 or None is behind the last."""

    def __init__(self, values: Mapping[Any, torch.Tensor], model: ByRole, has_batch: bool) -> None:
        self.values, self.model, self.has_batch = values, model, has_batch
        self.sum = Summed(model)
        self.blocks = model.structure.blocks

    def layer(self, layer: int | None) -> int:
        """A layer as a number from 0 to n_layers.

        Raises: LensError if there is no such layer.
        """
        count = len(self.blocks)
        index = count if layer is None or layer == -1 else layer
        if not 0 <= index <= count:
            raise LensError(
                f"layer={layer}, but there are {count} blocks", hint="print(lens.structure)"
            )
        return index

    def stream(self, layer: int, mlp_input: bool = False) -> torch.Tensor:
        """The stream ahead of a layer, or of its MLP."""
        if layer == len(self.blocks):
            return self.values[self.sum.name(self.blocks[-1], "hook_resid_post")]
        block = self.blocks[layer]
        middle = mlp_input and not block.parallel and not self._starts(layer)
        return self.values[self.sum.name(block, f"hook_resid_{'mid' if middle else 'pre'}")]

    def accumulated(
        self, layer: int | None, incl_mid: bool, mlp_input: bool, pos_slice: SliceInput
    ) -> Rows:
        """The stream ahead of every layer up to one, by labels `0_pre`, `0_mid`, `final_post`."""
        last = self.layer(layer)
        rows: Rows = []
        for i in range(last + 1):
            if i == len(self.blocks):
                rows.append(("final_post", self.stream(i)))
                continue
            rows.append((f"{i}_pre", self.stream(i)))
            middle = (incl_mid and i < last) or (mlp_input and i == last and not self._starts(i))
            if middle and self._has_middle(i):
                name = self.sum.name(self.blocks[i], "hook_resid_mid")
                rows.append((f"{i}_mid", self.values[name]))
        return [(label, sliced(v, pos_slice, -2)) for label, v in rows]

    def _starts(self, layer: int) -> bool:
        """Whether the MLP is what a block begins with."""
        block = self.blocks[layer]
        return not block.parallel and block.writes[0] is block.mlp_write

    def _has_middle(self, layer: int) -> bool:
        block = self.blocks[layer]
        return not block.parallel and len(block.writes) > 1

    def decomposed(
        self, layer: int | None, mlp_input: bool, mode: str, embeds: bool, pos_slice: SliceInput
    ) -> Rows:
        """Embeddings and what every layer ahead wrote, one row each."""
        if mode not in ("all", "mlp", "attn"):
            raise LensError(f"mode={mode!r} is unknown", hint="mode='all', 'mlp' or 'attn'")
        last = self.layer(layer)
        self.sum.check(last)
        rows = self.starts(pos_slice) if embeds else []
        for addend in self.sum.addends(last, mlp_input):
            wanted = {"mlp": ("mlp",), "attn": ("attn", "cross_attn")}.get(mode)
            if wanted is None or addend.short in wanted:
                rows.append((addend.label, self.written(addend, pos_slice)))
        return rows

    def starts(self, pos_slice: SliceInput) -> Rows:
        """What the stream starts from; `start` is the part of it that no hook shows."""
        names = self.sum.starts()
        rows = [(n, self.values[f"hook_{n}"]) for n in names if n != "start"]
        if "start" in names:
            rest = self.stream(0) - sum(v for _, v in rows)
            rows.append(("start", rest))
        whole = self.stream(0).shape
        return [(n, sliced(v.expand(whole), pos_slice, -2)) for n, v in rows]

    def written(self, addend: Addend, pos_slice: SliceInput) -> torch.Tensor:
        """What one branch adds to the stream."""
        name = self.sum.name(addend.block, f"hook_{addend.short}_out")
        value = sliced(self._apart(self.values[name]), pos_slice, -2)
        return value if addend.write.sign == 1 else value * addend.write.sign

    def _apart(self, value: torch.Tensor) -> torch.Tensor:
        """A value with batch and positions in two axes, which are one inside some branches."""
        lead = self.stream(0).shape[:-1]
        flat = value.ndim == len(lead) and value.shape[0] == lead.numel() != lead[0]
        return value.reshape(*lead, value.shape[-1]) if flat else value

    def heads(self, layer: int, mlp_input: bool, parts: Wanted) -> Rows:
        """What every head ahead of a layer adds to the stream, `L0H0` first."""
        rows: Rows = []
        for addend in self.sum.addends(layer, mlp_input):
            if addend.short != "attn":
                continue
            found = self.per_head(addend, parts)
            label = f"L{addend.block.index}H"
            rows += [(f"{label}{h}", found[..., h, :]) for h in range(found.shape[-2])]
        return rows

    def neurons(self, layer: int, neuron_slice: SliceInput, parts: Wanted) -> Rows:
        """What every neuron ahead of a layer adds to the stream, `L0N0` first."""
        rows: Rows = []
        for addend in self.sum.addends(layer):
            if self._is_apart(addend, True) and addend.short == "mlp":
                found = self.per_neuron(addend, neuron_slice, parts)
                count = self.values[self._post(addend)].shape[-1]
                kept = sliced(torch.arange(count), neuron_slice, 0).reshape(-1).tolist()
                if isinstance(neuron_slice, int):
                    found = found.unsqueeze(-2)
                label = f"L{addend.block.index}N"
                rows += [(f"{label}{n}", found[..., i, :]) for i, n in enumerate(kept)]
        return rows

    def per_head(self, addend: Addend, parts: Wanted) -> torch.Tensor:
        """`[..., head, d_model]`: what each head of one attention adds to the stream."""
        out = self.sum.out(addend)
        z = self.values[self.sum.name(addend.block, "attn.hook_z")]
        scale = self._divisor(addend, out, z)
        z = sliced(z, parts.positions, -3)
        found = torch.einsum("...hk,hkd->...hd", z, parts.onto(out.matrix))
        return found if scale is None else found / sliced(scale, parts.positions, -2).unsqueeze(-2)

    def per_neuron(self, addend: Addend, wanted: SliceInput, parts: Wanted) -> torch.Tensor:
        """`[..., neuron, d_model]`: what each neuron of one MLP adds to the stream."""
        out = self.sum.out(addend)
        post = self._apart(self.values[self._post(addend)])
        scale = self._divisor(addend, out, post)
        post = sliced(sliced(post, parts.positions, -2), wanted, -1)
        matrix = sliced(parts.onto(out.matrix), wanted, 0)
        found = post.unsqueeze(-1) * matrix
        if scale is None:
            return found
        scale = sliced(scale, parts.positions, -2)
        extra = found.ndim - scale.ndim
        return found / scale.reshape(*scale.shape, *(1,) * extra)

    def _post(self, addend: Addend) -> str:
        return self.sum.name(addend.block, "mlp.hook_post")

    def _divisor(self, addend: Addend, out: Out, inner: torch.Tensor) -> torch.Tensor | None:
        """The divisor of the norm behind a branch: as cached, or from what the branch computed."""
        if out.norm is None:
            return None
        name = self.sum.divided_by(addend)
        if name in self.values:
            return self.values[name]
        places = out.first.matrix.ndim - 1
        flat = inner.flatten(-places) @ out.first.matrix.flatten(0, places - 1) + out.first.bias
        return out.norm.divisor(flat)

    def rest(self, layer: int, rows: Rows, parts: Wanted) -> torch.Tensor:
        """The stream ahead of a layer less the rows."""
        whole = parts.onto(sliced(self.stream(layer), parts.positions, -2))
        return whole - sum(value for _, value in rows)

    def full(self, layer: int, mlp_input: bool, neurons: bool, parts: Wanted) -> Rows:
        """Every head, every neuron or MLP, the embeddings, and the biases, in this order.

        What has no heads or neurons that are known is one row, whole.
        """
        self.sum.check(layer)
        rows = self.heads(layer, mlp_input, parts)
        if neurons:
            rows += self.neurons(layer, None, parts)
        whole = [a for a in self.sum.addends(layer, mlp_input) if not self._is_apart(a, neurons)]
        rows += [(a.label, parts.onto(self.written(a, parts.positions))) for a in whole]
        rows += [(n, parts.onto(v)) for n, v in self.starts(parts.positions)]
        bias = self.biases(layer, mlp_input, neurons, parts.positions)
        return [*rows, ("bias", parts.onto(bias))]

    def _is_apart(self, addend: Addend, neurons: bool) -> bool:
        """Whether a write is shown by its heads or neurons; a mixture of experts has none."""
        mlp = addend.block.mlp if addend.short == "mlp" else None
        return addend.short == "attn" or (neurons and mlp is not None and mlp.post is not None)

    def biases(
        self, layer: int, mlp_input: bool, neurons: bool, pos_slice: SliceInput
    ) -> torch.Tensor:
        """What the branches that are taken apart add for no head or neuron: their biases."""
        total = torch.zeros_like(sliced(self.stream(0), pos_slice, -2))
        shown = {"attn": "attn.hook_z", "mlp": "mlp.hook_post"}
        for addend in self.sum.addends(layer, mlp_input):
            if self._is_apart(addend, neurons):
                out = self.sum.out(addend)
                inner = self.values[self.sum.name(addend.block, shown[addend.short])]
                scale = self._divisor(addend, out, inner)
                bias = out.bias if scale is None else out.bias / sliced(scale, pos_slice, -2)
                total = total + bias + out.after
        return total

    def through(
        self, layer: int | None, mlp_input: bool, pos_slice: SliceInput, batch_slice: SliceInput
    ) -> Through:
        """The norm by which a layer, its MLP, or the unembedding reads the stream."""
        at = self.layer(layer)
        norm, name = self._norm(at, mlp_input)
        if norm is None:
            return Through()
        scale = sliced(self.values[name], pos_slice, -2)
        if self.has_batch:
            scale = sliced(scale, batch_slice, 0)
        return Through(AppliedNorm(self.model.program, norm), scale)

    def final_norm(self) -> AppliedNorm | None:
        """The norm ahead of the unembedding."""
        norm = self.sum.stream.final_norm
        return None if norm is None else AppliedNorm(self.model.program, norm)

    def is_last(self, layer: int | None) -> bool:
        """Whether a layer is the unembedding."""
        return self.layer(layer) == len(self.blocks)

    def mlp(self, layer: int) -> Addend:
        """The MLP's write of one layer.

        Raises: LensError if it has none.
        """
        found = [a for a in self.sum.addends(layer + 1) if a.block.index == layer]
        for addend in found:
            if addend.short == "mlp":
                return addend
        raise LensError(f"block {layer} has no MLP", hint="print(lens.structure)")

    def _norm(self, layer: int, mlp_input: bool) -> tuple[Any, str]:
        stream = self.sum.stream
        if layer == len(self.blocks):
            return stream.final_norm, "ln_final.hook_scale"
        block = self.blocks[layer]
        mixer = block.attn_write or block.mixer_write
        write = block.mlp_write if mlp_input or self._starts(layer) else mixer
        if write is None or write.norm is None:
            return None, ""
        shared = mixer is not None and mixer.norm is write.norm
        label = "ln1" if shared else norm_name(block, write)
        return write.norm, self.sum.name(block, f"{label}.hook_scale")

    def directions(self, tokens: Any, others: Any, to_token: Callable[[str], int]) -> torch.Tensor:
        """The direction in the final norm's result for each token, less that of another one."""
        found = [self._direction(t, to_token) for t in (tokens, others) if t is not None]
        if len(found) == 2 and found[0].shape != found[1].shape:
            raise LensError(
                f"tokens have shape {tuple(found[0].shape[:-1])}, incorrect_tokens "
                f"{tuple(found[1].shape[:-1])}",
                hint="give one incorrect token for each token",
            )
        return found[0] - found[1] if len(found) == 2 else found[0]

    def _direction(self, tokens: Any, to_token: Callable[[str], int]) -> torch.Tensor:
        if isinstance(tokens, str):
            tokens = to_token(tokens)
        table = self.model.W_U.transpose(0, 1)
        return table[torch.as_tensor(tokens, device=table.device)]

    def attributed(
        self, stack: torch.Tensor, directions: torch.Tensor, before_cap: bool
    ) -> torch.Tensor:
        """The product of a normed stack with directions, `[component, ...]`.

        Raises: LensError where a cap on the logits makes them no sum, or shapes are ambiguous.
        """
        if not reads_stream(self.model.program, self.model.structure):
            raise LensError(
                "the unembedding reads more than the final norm of the stream",
                hint="print(lens.structure); cache['resid_post', -1] is the stream",
            )
        if not before_cap and is_capped(self.model.program, self.model.structure):
            raise LensError(
                "what follows the unembedding is not linear, so no logit is a sum over components",
                hint="logit_attrs(..., before_cap=True) attributes what the cap is applied to",
            )
        if directions.ndim == 2 and stack.ndim == 4:
            batch, positions = stack.shape[1:3]
            given = directions.shape[0]
            if batch == positions != 1 and given == batch:
                raise LensError(
                    f"{given} tokens may be one for each row or one for each position",
                    hint="tokens[:, None] is one for each row, tokens[None] one for each position",
                )
            if given == batch:
                directions = directions.unsqueeze(1)
        return (stack * directions).sum(-1)
