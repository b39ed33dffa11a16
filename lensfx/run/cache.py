"""The values of one run by hook name, with the shorthand users know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from lensfx.errors import LensError, UnknownNameError
from lensfx.run.analyses import Analyses, Rows, SliceInput, Through, Wanted, sliced, stacked
from lensfx.run.names import nearest
from lensfx.run.raw import Call
from lensfx.run.weights import ByRole

__all__ = ["ActivationCache"]


_LAYER = re.compile(r"(?:decoder_)?blocks\.(\d+)\.(?:\w+\.)?hook_\w+$")
_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "mlp_mid": "mid",
    "mlp_post": "post",
    "mlp_pre": "pre",
    "query": "q",
    "value": "v",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


class ActivationCache(Mapping[str, torch.Tensor]):
    """Cached values by name: `cache["blocks.0.hook_resid_pre"]` or `cache["resid_pre", 0]`.

    Layers may be negative; `cache["normalized", 0, "ln1"]` names the part, and TransformerLens'
    other short names, as in `cache["attn", 0]` for the pattern, are understood. Values are what
    the readers read, after every hook.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        names: Sequence[str],
        lens: ByRole | None = None,
        has_batch_dim: bool = True,
        call: Call | None = None,
    ) -> None:
        self._values = dict(values)
        self._call = call
        self._names = tuple(names)
        self._lens = lens
        self.has_batch_dim = has_batch_dim

    @cached_property
    def n_layers(self) -> int:
        """How many blocks the names speak of, kept or not."""
        layers = [int(found[1]) for n in self._names if (found := _LAYER.match(n))]
        return max(layers, default=-1) + 1

    def __getitem__(self, key: str | tuple[Any, ...]) -> torch.Tensor:
        """The value of a full name or a shorthand.

        Raises: UnknownNameError naming the nearest names.
        """
        return self._values[self._known(key)]

    def raw(self, *key: Any) -> torch.Tensor:
        """The value of a name as it is in the model before any pass, named as in `cache[...]`.

        Mapped back where the passes say how (`lens.to_raw`); what they took off for good, as the
        mean that centring takes off the stream, is computed again from the call.

        Raises: UnknownNameError, and LensError where neither can be done.
        """
        name = self._known(key[0] if len(key) == 1 else key)
        if self._call is None:
            raise LensError(
                "this cache knows no model, so it has no raw values",
                hint="take the cache that lens.run_with_cache returns",
            )
        return self._call.raw(name, self._values[name])

    def _known(self, key: str | tuple[Any, ...]) -> str:
        spelled = list(self._spelled(*(key if isinstance(key, tuple) else (key,))))
        if isinstance(key, str):
            spelled.insert(0, key)
        for name in spelled:
            if name in self._values:
                return name
        for name in spelled:
            if name in self._names:
                raise UnknownNameError(
                    f"{name} was not kept in this run", hint=f"add {name!r} to names_filter"
                )
        near = nearest(spelled[0] if spelled else str(key), self._values)
        hint = f"the nearest are {', '.join(near)}" if near else "list(cache) names them all"
        raise UnknownNameError(f"there is no value {key!r} in this cache", hint=hint)

    def _spelled(
        self, name: Any = "", layer: Any = None, part: Any = None, *rest: Any
    ) -> Iterator[str]:
        """The full names a shorthand may stand for; none for a layer that does not exist."""
        if rest or not isinstance(name, str):
            return
        name = _ALIASES.get(name, name)
        if layer is None:
            yield from (f"hook_{name}", f"ln_final.hook_{name}")
        elif isinstance(layer, int) and -self.n_layers <= layer < self.n_layers:
            given = ("", "attn", "mlp") if part is None else (_PARTS.get(part, part),)
            for prefix in ("blocks", "decoder_blocks"):
                at = f"{prefix}.{layer % self.n_layers}"
                for place in given:
                    yield f"{at}.{place}.hook_{name}" if place else f"{at}.hook_{name}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same cache with every value on `device`."""
        return self._like({k: v.to(device) for k, v in self._values.items()}, self.has_batch_dim)

    def _like(self, values: Mapping[str, torch.Tensor], has_batch_dim: bool) -> ActivationCache:
        return ActivationCache(values, self._names, self._lens, has_batch_dim, self._call)

    @property
    def _analyses(self) -> Analyses:
        if self._lens is None:
            raise LensError(
                "this cache knows no model, so it cannot be analysed",
                hint="take the cache that lens.run_with_cache returns",
            )
        return Analyses(self, self._lens, self.has_batch_dim)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream ahead of every layer up to `layer`, `[row, ..., d_model]`.

        `apply_ln` puts each row through the final norm, by its own mean and size: with `@ W_U +
        b_U` behind it this is the logit lens. `mlp_input` adds the stream ahead of that layer's
        MLP, `incl_mid` ahead of every MLP; where attention and MLP are parallel that is no value
        of its own. `return_labels` gives `(stack, labels)`.
        """
        at = self._analyses
        rows = at.accumulated(layer, incl_mid, mlp_input, pos_slice)
        if apply_ln:
            final = at.final_norm()
            rows = [(label, value if final is None else final(value)) for label, value in rows]
        return stacked(rows, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What the stream ahead of `layer` is the sum of, `[row, ..., d_model]`.

        `apply_ln` is `apply_ln_to_stack` for that layer.

        Raises: LensError where the stream of this model is no such sum.
        """
        rows = self._analyses.decomposed(layer, mlp_input, mode, incl_embeds, pos_slice)
        return self._normed(rows, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def apply_ln_to_stack(
        self,
        residual_stack: torch.Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> torch.Tensor:
        """What each row of a stack is of the norm's result by which `layer` reads the stream.

        It is centred, divided by the divisor of the run and multiplied by the gain, so that rows
        that sum to the stream give rows that sum to the norm's result less its bias. The slices
        are those the stack was made with. `recompute_ln` is the whole final norm of each row.
        """
        at = self._analyses
        if has_batch_dim and self.has_batch_dim:
            residual_stack = sliced(residual_stack, batch_slice, 1)
        final = at.final_norm() if recompute_ln and at.is_last(layer) else None
        if final is not None:
            return final(residual_stack)
        return at.through(layer, mlp_input, pos_slice, batch_slice).stack(residual_stack)

    def logit_attrs(
        self,
        residual_stack: torch.Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        before_cap: bool = False,
    ) -> torch.Tensor:
        """What each row of a stack adds to the logits of `tokens`, `[row, ...]`.

        Less what it adds to those of `incorrect_tokens`, if given. Tokens are a string, a number,
        or a tensor of the shape of the batch or of batch and positions.

        Raises: LensError if the logits are capped, unless `before_cap` asks for what is capped.
        """
        at = self._analyses
        single = getattr(self._lens, "to_single_token", int)
        directions = at.directions(tokens, incorrect_tokens, single)
        stack = self.apply_ln_to_stack(
            residual_stack,
            pos_slice=pos_slice,
            batch_slice=batch_slice,
            has_batch_dim=has_batch_dim,
        )
        return at.attributed(stack, directions, before_cap)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Any:
        """What every head ahead of `layer` adds to the stream, `[head, ..., d_model]`.

        `incl_remainder` adds a row for the rest of the stream. Biases belong to no head.

        Raises: LensError where the stream is no sum of them.
        """
        at, last, parts = self._analyses, self._layer(layer), Wanted(pos_slice)
        at.sum.check(last)
        rows = at.heads(last, False, parts)
        if incl_remainder:
            rows.append(("remainder", at.rest(last, rows, parts)))
        return self._normed(rows, last, False, apply_ln, pos_slice, return_labels)

    def compute_head_results(self) -> None:
        """Add `hook_result` of every attention to the cache: what its heads add to the stream."""
        at = self._analyses
        for addend in at.sum.addends(self._layer(None)):
            name = at.sum.name(addend.block, "attn.hook_result")
            if addend.short == "attn" and name not in self._values:
                self._values[name] = at.per_head(addend, Wanted())

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each neuron of one layer adds to the stream, `[..., neuron, d_model]`.

        `project_output_onto`, `[d_model]` or `[d_model, n]`, is multiplied on first.

        Raises: LensError if there is no such layer, or it has no MLP.
        """
        at = self._analyses
        if not isinstance(layer, int) or not -self.n_layers <= layer < self.n_layers:
            raise LensError(
                f"layer={layer!r}, but there are {self.n_layers} blocks",
                hint="print(lens.structure)",
            )
        addend = at.mlp(layer % self.n_layers)
        parts = Through().parts(pos_slice, project_output_onto)
        return parts.shown(at.per_neuron(addend, neuron_slice, parts))

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> Any:
        """What every neuron ahead of `layer` adds to the stream, `[neuron, ..., d_model]`."""
        at, last = self._analyses, self._layer(layer)
        at.sum.check(last)
        through = at.through(last, False, pos_slice, None) if apply_ln else Through()
        parts = through.parts(pos_slice, project_output_onto)
        rows = at.neurons(last, neuron_slice, parts)
        if incl_remainder:
            rows.append(("remainder", at.rest(last, rows, parts)))
        return through.finished(rows, parts, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: torch.Tensor | None = None,
    ) -> Any:
        """The stream ahead of `layer` as heads, neurons or MLPs, embeddings, and biases."""
        at, last = self._analyses, self._layer(layer)
        through = at.through(last, mlp_input, pos_slice, None) if apply_ln else Through()
        parts = through.parts(pos_slice, project_output_onto)
        rows = at.full(last, mlp_input, expand_neurons, parts)
        return through.finished(rows, parts, return_labels)

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> torch.Tensor:
        """One value of every layer ahead of `layer`, `[layer, ...]`."""
        count = self.n_layers if layer in (None, -1) else layer
        key = (activation_name, sublayer_type)
        return torch.stack([self[(key[0], i, *key[1:])] for i in range(count or 0)])

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> ActivationCache:
        """The hook points of the cache for some rows of the batch; a number drops the axis.

        Values of operators are left out: which axis of theirs is the batch is not known here.

        Raises: LensError if the batch axis is gone.
        """
        if not self.has_batch_dim:
            raise LensError("this cache has no batch axis to slice", hint="remove_batch_dim=False")
        points = {k: v for k, v in self._values.items() if ".hook_" in f".{k}"}
        values = {k: sliced(v, batch_slice, 0) for k, v in points.items()}
        return self._like(values, not isinstance(batch_slice, int))

    def _layer(self, layer: int | None) -> int:
        return self._analyses.layer(layer)

    def _normed(
        self,
        rows: Rows,
        layer: int | None,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: SliceInput,
        labels: bool,
    ) -> Any:
        if apply_ln:
            through = self._analyses.through(layer, mlp_input, pos_slice, None)
            rows = [(label, through.stack(value)) for label, value in rows]
        return stacked(rows, labels)

    def __repr__(self) -> str:
        shown = ", ".join([*list(self)[:6], *(["..."] if len(self) > 6 else [])])
        return f"ActivationCache with {len(self)} values: {shown}" if shown else "an empty cache"
