"""The weights of a model by their role, computed from the graph when they are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from lensfx.analysis.structure.facts import Block, Place, Write
from lensfx.analysis.structure.structure import Structure
from lensfx.errors import LensError
from lensfx.graph.program import Program
from lensfx.run.affine import Affine, Maps, plain_place
from lensfx.run.ends import head_map, position_table, token_table
from lensfx.run.factored import FactoredMatrix

__all__ = ["ByRole", "Weights", "layer_weight"]

Stacked = torch.Tensor | tuple[torch.Tensor | None, ...]


class ByRole:
    """Weights by role, for whoever has a `program` and its `structure`.

    Each is an expression over the parameters of the program, computed anew when it is read, so
    that it follows them and gradients reach them. Those of layers are stacked, `[layer, ...]`,
    where all layers agree, else a tuple with None where a layer has none. What stands between the
    product and the value that a hook shows is part of them: `attn_out` is the sum over heads of
    `z @ W_O`, plus `b_O`, layer scale and residual multiplier included; a norm on the way to the
    stream is not, so there it is what that norm reads.

    Raises: LensError where a value is no linear map of what it is computed from, with the node
    that is in the way, or no layer has such a weight.
    """

    @property
    def program(self) -> Program:
        """The program whose parameters these are."""
        raise NotImplementedError

    @property
    def structure(self) -> Structure:
        """What was found in that program's graph."""
        raise NotImplementedError

    @property
    def W_Q(self) -> Stacked:
        """`[layer, head, d_model, d_head]`, from the norm's result to q before rotary."""
        return self._layers("W_Q")

    @property
    def W_K(self) -> Stacked:
        """`[layer, kv_head, d_model, d_head]`: grouped heads are not repeated."""
        return self._layers("W_K")

    @property
    def W_V(self) -> Stacked:
        """`[layer, kv_head, d_model, d_head]`: grouped heads are not repeated."""
        return self._layers("W_V")

    @property
    def W_O(self) -> Stacked:
        """`[layer, head, d_head, d_model]`, from z to the stream."""
        return self._layers("W_O")

    @property
    def W_in(self) -> Stacked:
        """`[layer, d_model, d_mlp]`; of a gated MLP the branch without the non-linearity."""
        return self._layers("W_in")

    @property
    def W_gate(self) -> Stacked:
        """`[layer, d_model, d_mlp]`: the branch of a gated MLP that has the non-linearity."""
        return self._layers("W_gate")

    @property
    def W_out(self) -> Stacked:
        """`[layer, d_mlp, d_model]`, from post to the stream."""
        return self._layers("W_out")

    @property
    def b_Q(self) -> Stacked:
        """`[layer, head, d_head]`; zeros where there is no bias, like every bias here."""
        return self._layers("b_Q")

    @property
    def b_K(self) -> Stacked:
        """`[layer, kv_head, d_head]`."""
        return self._layers("b_K")

    @property
    def b_V(self) -> Stacked:
        """`[layer, kv_head, d_head]`."""
        return self._layers("b_V")

    @property
    def b_O(self) -> Stacked:
        """`[layer, d_model]`."""
        return self._layers("b_O")

    @property
    def b_in(self) -> Stacked:
        """`[layer, d_mlp]`."""
        return self._layers("b_in")

    @property
    def b_gate(self) -> Stacked:
        """`[layer, d_mlp]`."""
        return self._layers("b_gate")

    @property
    def b_out(self) -> Stacked:
        """`[layer, d_model]`."""
        return self._layers("b_out")

    @property
    def W_E(self) -> torch.Tensor:
        """`[d_vocab, d_model]`: the table, without a number that the model scales it by."""
        return token_table(self.program, self.structure)

    @property
    def W_pos(self) -> torch.Tensor:
        """`[n_ctx, d_model]`: one row for each position, rows kept for padding left out."""
        return position_table(self.program, self.structure)

    @property
    def W_U(self) -> torch.Tensor:
        """`[d_model, d_vocab]`, from the final norm to the logits, ahead of a soft cap on them."""
        return head_map(self.program, self.structure).matrix

    @property
    def b_U(self) -> torch.Tensor:
        """`[d_vocab]`."""
        return head_map(self.program, self.structure).bias

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q @ W_K^T` per head, `[layer, head, d_model, d_model]`."""
        keys = _repeated(self._one("W_K"), self._one("W_Q").shape[1])
        return FactoredMatrix(self._one("W_Q"), keys.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V @ W_O` per head, `[layer, head, d_model, d_model]`."""
        out = self._one("W_O")
        return FactoredMatrix(_repeated(self._one("W_V"), out.shape[1]), out)

    def _layers(self, name: str) -> Stacked:
        found = tuple(
            layer_weight(self.program, self.structure, name, i)
            for i in range(len(self.structure.blocks))
        )
        there = [t for t in found if t is not None]
        if not there:
            raise LensError(
                f"no layer has a {name}", hint="print(lens.structure) for what there is"
            )
        same = len({t.shape for t in there}) == 1 and len(there) == len(found)
        return torch.stack(there) if same else found

    def _one(self, name: str) -> torch.Tensor:
        found = self._layers(name)
        if isinstance(found, tuple):
            raise LensError(
                f"the layers differ in {name}, so they make no one matrix",
                hint="take the layers one by one: lens.blocks[0].attn.OV",
            )
        return found


class Weights(ByRole):
    """The weights of a program by role, from the structure that was found in its graph."""

    def __init__(self, program: Program, structure: Structure) -> None:
        self._program, self._structure = program, structure

    @property
    def program(self) -> Program:
        """The program whose parameters these are."""
        return self._program

    @property
    def structure(self) -> Structure:
        """What was found in that program's graph."""
        return self._structure


def layer_weight(
    program: Program, structure: Structure, name: str, layer: int
) -> torch.Tensor | None:
    """One weight or bias of one layer, by name, without the axis of layers; None if it has none.

    Raises: LensError.
    """
    block = structure.blocks[layer]
    find = _FIND[name[2:]]
    try:
        found = find(Maps(program), structure, block)
    except LensError as error:
        headline = f"{name} of block {layer}: {error.headline}"
        raise LensError(headline, at=error.at, hint=error.hint) from None
    if found is None:
        return None
    if name.startswith("b_"):
        return found.bias
    per_head = name[2:] in ("Q", "K", "V")
    return found.matrix.transpose(0, 1) if per_head else found.matrix


def _repeated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A weight of key/value heads `[layer, kv, ...]` once for every head of a group."""
    return weight.repeat_interleave(heads // weight.shape[1], dim=1)


def written(write: Write) -> fx.Node:
    """What a branch makes for the stream: what is added to it, or what a norm on the way reads."""
    return write.norm_out.value if write.norm_out is not None else write.value


def stops(structure: Structure) -> frozenset[fx.Node]:
    """Every value that a branch reads the stream by: streams and the results of their norms."""
    found: set[fx.Node] = set()
    for stream in structure.streams:
        found.update(stream.values)
        found.update(w.add for w in stream.writes)
        norms = [n for w in stream.writes for n in (*w.branch.norms, w.norm, w.norm_after)]
        found.update(n.node for n in [*norms, stream.final_norm] if n is not None)
    return frozenset(found)


def _known(place: Place | None, what: str) -> Place:
    if place is None:
        raise LensError(f"where {what} is, is not known", hint="print(lens.structure)")
    return place


def _reads(what: str) -> Callable[[Maps, Structure, Block], Affine | None]:
    """The map from the stream to q, k or v."""

    def find(maps: Maps, structure: Structure, block: Block) -> Affine | None:
        if block.attn is None:
            return None
        place = _known(getattr(block.attn, what), what)
        source = maps.source_of(place.node, stops(structure))
        return maps.between(plain_place(source), place)

    return find


def _channels(what: str) -> Callable[[Maps, Structure, Block], Affine | None]:
    """The map from the stream to a value of the MLP."""

    def find(maps: Maps, structure: Structure, block: Block) -> Affine | None:
        mlp = block.mlp
        if mlp is None or mlp.experts is not None or (what == "gate" and not mlp.gated):
            return None
        gated_up = what == "in" and mlp.gated
        place = _known(mlp.pre_linear if gated_up else mlp.pre, f"what the MLP's {what} makes")
        source = maps.source_of(place.node, stops(structure))
        return maps.between(plain_place(source), place)

    return find


def _out(maps: Maps, structure: Structure, block: Block) -> Affine | None:
    if block.mlp is None or block.mlp.experts is not None or block.mlp_write is None:
        return None
    place = _known(block.mlp.post, "what the MLP's output projection reads")
    return maps.between(place, plain_place(written(block.mlp_write)))


def _heads_out(maps: Maps, structure: Structure, block: Block) -> Affine | None:
    if block.attn is None or block.attn_write is None:
        return None
    return maps.between(_known(block.attn.z, "z"), plain_place(written(block.attn_write)))


_FIND: dict[str, Callable[[Maps, Structure, Block], Affine | None]] = {
    "Q": _reads("q"),
    "K": _reads("k"),
    "V": _reads("v"),
    "O": _heads_out,
    "in": _channels("in"),
    "gate": _channels("gate"),
    "out": _out,
}
