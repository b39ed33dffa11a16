"""Where a model begins and ends: its tables, and the map from the final norm to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lensfx.analysis.structure.flow import lookup
from lensfx.analysis.structure.structure import Structure
from lensfx.errors import LensError
from lensfx.graph.node import is_weight, outputs_of, shape_of, value_of
from lensfx.graph.ops import data_inputs
from lensfx.graph.program import Program
from lensfx.run.affine import Affine, Maps, plain_place

__all__ = ["head_map", "head_source", "is_capped", "position_table", "reads_stream", "token_table"]


def token_table(program: Program, structure: Structure) -> torch.Tensor:
    """The token embedding, `[d_vocab, d_model]`.

    Raises: LensError if there is none, or it has another width than the stream.
    """
    found = structure.embed
    if found is None or found.table is None or structure.stream is None:
        raise LensError("this model has no token embedding", hint="print(lens.structure)")
    table = Maps(program).weight(found.table)
    width = (shape_of(structure.stream.start) or (0,))[-1]
    if table.shape[-1] != width:
        raise LensError(
            f"the token table is {table.shape[-1]} wide and the stream {width}: it is projected",
            hint="read hook_embed",
        )
    return table


def position_table(program: Program, structure: Structure) -> torch.Tensor:
    """The absolute positions, `[n_ctx, d_model]`, from the row of the first position on.

    Raises: LensError if none are added.
    """
    found = structure.pos_embed
    table = found.table if found is not None else None
    node: Any = found.node if found is not None else None
    while found is not None and table is None and isinstance(node, fx.Node):
        table = node if is_weight(node) else None
        node = next(iter(data_inputs(node)), None)
    if found is None or table is None:
        raise LensError("no table of positions is added here", hint="print(lens.structure)")
    value = Maps(program).weight(table)
    if value.ndim < 2 or value.numel() != value.shape[-2:].numel():
        raise LensError("positions are no table of rows here", hint="read hook_pos_embed")
    value = value.reshape(value.shape[-2:])
    return value[_first_row(program, found.node) :]


def _first_row(program: Program, node: fx.Node) -> int:
    """The row of the first position; 0 where rows are taken by more than a step of one."""
    pair = lookup(node)
    if pair is None:
        return 0
    ids = computed(program, pair[1])
    steps = torch.arange(ids.shape[-1], device=ids.device)
    first = int(ids.min()) if ids.numel() else 0
    return first if bool((ids == first + steps).all()) else 0


def computed(program: Program, node: fx.Node) -> torch.Tensor:
    """A value on the call that was captured; nothing that it does not need is run."""
    needed, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                stack.append(source)
    given = iter(program.example)
    env: dict[fx.Node, Any] = {}
    for n in program.graph.nodes:
        if n.op == "placeholder":
            env[n] = next(given)
        elif n in needed and n.op == "get_attr":
            env[n] = program.tensors[str(n.target)]
        elif n in needed:
            call: Any = n.target
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), env.__getitem__)
            env[n] = call(*args, **kwargs)
    found: torch.Tensor = env[node]
    return found


def head_map(program: Program, structure: Structure) -> Affine:
    """From the final norm's result to the logits, or to what a soft cap on them reads.

    Where more than linear maps lie behind that norm, from what the unembedding itself reads.

    Raises: LensError if the model has no unembedding.
    """
    if structure.unembed is None or structure.stream is None:
        raise LensError("this model has no unembedding", hint="print(lens.structure)")
    maps = Maps(program)
    source = plain_place(head_source(program, structure))
    last = plain_place(logits(program, structure.unembed))
    # Numbers that scale the logits behind the head are part of the map, a cap on them is not.
    end = last if maps.is_linear(source, last) else plain_place(structure.unembed)
    return maps.between(source, end)


def head_source(program: Program, structure: Structure) -> fx.Node:
    """The final norm's result, or the stream, that the unembedding reads; else its own input."""
    assert structure.unembed is not None
    assert structure.stream is not None
    maps = Maps(program)
    final = structure.stream.final_norm
    ends = {structure.stream.end} | set(structure.stream.values)
    ends |= {final.node} if final is not None else set()
    own = next(n for n in data_inputs(structure.unembed) if not is_weight(n))
    try:
        source = maps.source_of(structure.unembed, frozenset(ends))
    except LensError:
        return own
    return source if maps.is_linear(plain_place(source), plain_place(own)) else own


def reads_stream(program: Program, structure: Structure) -> bool:
    """Whether the unembedding reads the final norm's result by linear maps alone."""
    if structure.unembed is None or structure.stream is None:
        return False
    final = structure.stream.final_norm
    source = head_source(program, structure)
    return source is final.node if final is not None else source in structure.stream.values


def logits(program: Program, head: fx.Node) -> fx.Node:
    """The result of the model that the head leads to with the fewest steps; the head if none."""
    outputs = {n for n in outputs_of(program.graph) if isinstance(n, fx.Node)}
    queue = [head]
    for node in queue:
        if node in outputs and isinstance(value_of(node), torch.Tensor) and value_of(node).ndim > 1:
            return node
        queue += [n for n in node.users if n not in queue]
    return head


def is_capped(program: Program, structure: Structure) -> bool:
    """Whether the logits are no linear map of what the unembedding reads: a soft cap, mostly."""
    if structure.unembed is None:
        return False
    last = logits(program, structure.unembed)
    return not Maps(program).is_linear(plain_place(structure.unembed), plain_place(last))
