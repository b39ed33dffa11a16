"""The residual stream as a sum: which cached values it is made of, and when it is no sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis.structure.facts import Block, Stream, Write
from lensfx.analysis.structure.points import block_prefix
from lensfx.errors import LensError
from lensfx.graph.node import argument, is_op, shape_of, value_of, where
from lensfx.run.affine import Affine, Maps, bare, plain_place
from lensfx.run.norms import AppliedNorm
from lensfx.run.weights import ByRole, written

__all__ = ["Addend", "Out", "Summed", "norm_name"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Addend:
    """One write of one block: its short name (`attn`, `mlp`, `cross_attn`, `mixer`)."""

    block: Block
    write: Write
    short: str

    @property
    def label(self) -> str:
        """How a decomposition names it, `0_attn_out`."""
        return f"{self.block.index}_{self.short}_out"


@dataclass(frozen=True)
class Out:
    """From heads or neurons to what they add: `x @ matrix / divisor`, and what belongs to none.

    `bias` is divided too, `after` is not. The divisor is that of `norm`, which stands between the
    branch and the stream; None if none does. `first` is the map to what it reads.
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    after: torch.Tensor
    norm: AppliedNorm | None
    first: Affine


class Summed:
    """What the main stream of a model is the sum of."""

    def __init__(self, model: ByRole) -> None:
        structure = model.structure
        if structure.stream is None:
            raise LensError("this model has no residual stream", hint="print(lens.structure)")
        self.model = model
        self.stream: Stream = structure.stream
        self.prefix = block_prefix(structure.streams, len(structure.streams) - 1)

    @property
    def origin(self) -> fx.Node:
        """The stream ahead of the first block."""
        blocks = self.stream.blocks
        return blocks[0].pre if blocks else self.stream.start

    def check(self, layer: int) -> None:
        """Pass if the stream up to a layer is the sum of its start and what is written.

        Raises: LensError with the place where it is changed in another way.
        """
        carry, last = _same(self.origin), None
        for block in self.stream.blocks[:layer]:
            for write in block.writes:
                if block.label(write) is None:
                    raise _no_sum(write.add, "a write that is no attention, mixer or MLP")
                if write.add is not last and _same(write.carry) is not carry:
                    raise _no_sum(write.carry, "the stream is changed between two writes")
                carry, last = _same(write.add), write.add
        pre = self.stream.blocks[layer].pre if layer < len(self.stream.blocks) else self.stream.end
        if _same(pre) is not carry:
            raise _no_sum(pre, "the stream is changed between two writes")

    def addends(self, layer: int, mlp_input: bool = False) -> Iterator[Addend]:
        """Every write ahead of a layer, or of its MLP, in the order attention, MLP."""
        for block in self.stream.blocks[: layer + mlp_input]:
            here = block.index == layer
            if here and block.parallel:
                continue
            pairs = (
                ("attn", block.attn_write),
                ("mixer", block.mixer_write),
                ("cross_attn", block.cross_write),
                ("mlp", block.mlp_write),
            )
            known = [(short, write) for short, write in pairs if write is not None]
            if here:
                # What the block writes ahead of its MLP, wherever that stands.
                order = {id(write): i for i, write in enumerate(block.writes)}
                last = len(order) if block.mlp_write is None else order[id(block.mlp_write)]
                known = [(short, write) for short, write in known if order[id(write)] < last]
            yield from (Addend(block, write, short) for short, write in known)

    def name(self, block: Block, rest: str) -> str:
        """A hook name inside a block."""
        return f"{self.prefix}.{block.index}.{rest}"

    def starts(self) -> list[str]:
        """What the start is the sum of: `embed`, `pos_embed`, then `start` for what is no hook."""
        known = {_same(e.scaled): e.kind for e in self.stream.embeddings}
        positions = [e for e in self.stream.embeddings if e.kind == "position"]
        leaves = list(_leaves(self.origin))
        kinds = [known.get(n, "") for n in leaves]
        if kinds.count("token") != 1:
            return ["start"]
        found = ["embed"]
        if "position" in kinds and len(positions) == 1:
            found.append("pos_embed")
        return found if len(found) == len(leaves) else [*found, "start"]

    def out(self, addend: Addend) -> Out:
        """The map from heads (z) or neurons (post) to what their branch adds.

        Raises: LensError where there is none.
        """
        write, block = addend.write, addend.block
        attention = block.attn if addend.short == "attn" else block.cross_attn
        place = block.mlp.post if addend.short == "mlp" and block.mlp else None
        if addend.short in ("attn", "cross_attn") and attention is not None:
            place = attention.z
        if place is None:
            raise _no_sum(write.value, f"{addend.label} has no parts that are known")
        maps = Maps(self.model.program)
        first = maps.between(place, plain_place(written(write)))
        matrix, bias, after, norm = first.matrix, first.bias, first.bias * 0, None
        if write.norm_out is not None:
            norm = AppliedNorm(self.model.program, write.norm_out)
            matrix, bias = norm.linear(matrix), norm.linear(bias)
            after = after if norm.b is None else norm.b
            if _same(write.value) is not _same(write.norm_out.node):
                rest = maps.between(plain_place(write.norm_out.node), plain_place(write.value))
                matrix, bias = matrix @ rest.matrix, bias @ rest.matrix
                after = after @ rest.matrix + rest.bias
        sign = write.sign
        return Out(matrix * sign, bias * sign, after * sign, norm, first)

    def divided_by(self, addend: Addend) -> str:
        """The hook name of the divisor of the norm behind a branch."""
        number = norm_name(addend.block, addend.write)
        return self.name(addend.block, f"{number}_post.hook_scale")


def norm_name(block: Block, write: Write) -> str:
    """ln1, ln2 or ln3: norms are counted by role, mixer, cross-attention, MLP."""
    mixer = block.attn_write or block.mixer_write
    known = [w for w in (mixer, block.cross_write, block.mlp_write) if w is not None]
    return f"ln{next(i for i, w in enumerate(known, 1) if w is write)}"


def _same(node: fx.Node) -> fx.Node:
    """The value that a node is a copy of, or has the rows of in one axis instead of two."""
    node = bare(node)
    while node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        width, own = (shape_of(source) or (0,))[-1], (shape_of(node) or (1,))[-1]
        if not isinstance(width, int) or width != own:
            break
        node = bare(source)
    return node


def _leaves(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a value is the plain sum of."""
    node = _same(node)
    sides = node.args[:2] if is_op(node, aten.add.Tensor) else ()
    tensors = [n for n in sides if isinstance(n, fx.Node) and _is_tensor(n)]
    if len(tensors) == 2 and argument(node, "alpha") == 1:
        for side in tensors:
            yield from _leaves(side)
    else:
        yield node


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.Tensor)


def _no_sum(node: fx.Node, reason: str) -> LensError:
    return LensError(
        f"the residual stream of this model is no plain sum of what its blocks write: {reason}",
        at=where(node),
        hint="read the stream itself: cache['resid_post', layer]",
    )
