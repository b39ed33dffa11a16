"""A structure beside the facts of its model: what it says that is wrong, and what it lacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import lensfx
from lensfx.analysis.structure import Structure, structure
from lensfx.graph.node import argument
from lensfx.graph.program import Program

from .architectures import Architecture
from .builder import Built, build
from .facts import Facts, facts
from .trial import SHAPES, Record, said


@dataclass(frozen=True)
class Score:
    """`wrong` are claims that contradict the facts, `missing` what is not known."""

    wrong: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all was found, and as it is."""
        return not self.wrong and not self.missing


def score(facts: Facts, program: Program, found: Structure) -> Score:
    """How a structure compares with the facts of its model."""
    wrong = [*_attention(facts, found), *_norms(facts, found), *_ends(facts, program, found)]
    missing = [*_unknown(facts, found)]
    blocks = len(found.blocks)
    if not _fits(facts, found):
        said = f"{blocks} blocks, not {facts.layers}"
        (wrong if found.complete else missing).append(said)
    return Score(tuple(dict.fromkeys(wrong)), tuple(dict.fromkeys(missing)))


def _fits(facts: Facts, found: Structure) -> bool:
    """Whether the blocks are the layers, or their halves, or layers of one write each."""
    blocks = len(found.blocks)
    halves = bool(facts.layers) and blocks % facts.layers == 0 and blocks == facts.attentions
    return blocks == facts.layers or halves or len(_writes(found)) == facts.layers


def _attentions(found: Structure) -> list[Any]:
    return [a for b in found.blocks for w in b.writes for a in w.attention]


def _attending(found: Structure) -> int:
    return sum(bool(w.attention) for b in found.blocks for w in b.writes)


def _attention(facts: Facts, found: Structure) -> Iterator[str]:
    for a in _attentions(found):
        if a.heads is not None and a.heads not in facts.heads:
            yield f"{a.heads} heads, not {sorted(facts.heads)}"
        if a.kv_heads is not None and a.kv_heads not in facts.kv_heads:
            yield f"{a.kv_heads} key heads, not {sorted(facts.kv_heads)}"
    if _attending(found) > facts.attentions:
        yield f"{_attending(found)} writes with attention, not {facts.attentions}"
    for mlp in (w.mlp for w in _writes(found)):
        if mlp is not None and mlp.experts is not None and mlp.experts not in facts.experts:
            yield f"{mlp.experts} experts, not {sorted(facts.experts)}"


def _norms(facts: Facts, found: Structure) -> Iterator[str]:
    norms = [n for b in found.blocks for w in b.writes for n in (w.norm, w.norm_out, w.norm_after)]
    if found.stream is not None:
        norms.append(found.stream.final_norm)
    for norm in norms:
        if norm is not None and facts.norms and norm.kind not in facts.norms:
            yield f"a {norm.kind} norm, not {sorted(facts.norms)}"


def _ends(facts: Facts, program: Program, found: Structure) -> Iterator[str]:
    """Whether token table and head are the ones that the model says it has."""
    if found.embed is not None and facts.table is not None and found.embed.table is not None:
        if not _same(program, found.embed.table, facts.table):
            yield f"the token table is %{found.embed.table.name}"
    if found.unembed is not None and facts.head is not None:
        weight = (
            argument(found.unembed, "weight") if "linear" in str(found.unembed.target) else None
        )
        if weight is not None and not _same(program, weight, facts.head):
            yield f"the unembedding is %{found.unembed.name}"


def _same(program: Program, node: Any, wanted: torch.Tensor) -> bool:
    held = program.tensors.get(str(node.target))
    if held is None:
        return True
    return held.data_ptr() == wanted.data_ptr() or held.shape == wanted.shape


def _unknown(facts: Facts, found: Structure) -> Iterator[str]:
    if not found.streams:
        yield "no stream"
        return
    if found.unclaimed:
        yield f"{len(found.unclaimed)} unclaimed"
    if _attending(found) < facts.attentions:
        yield f"attention in {_attending(found)} of {facts.attentions}"
    if any(a.heads is None for a in _attentions(found)):
        yield "heads"
    if any(a.kv_heads is None for a in _attentions(found)):
        yield "key heads"
    if found.embed is None and facts.table is not None:
        yield "token table"
    if found.unembed is None and facts.head is not None:
        yield "head"
    if any(b.mlp is None and len(b.writes) == 1 for b in found.blocks) and _lone(found):
        yield "mlp"
    if facts.norms and not any(w.norm or w.norm_out or w.norm_after for w in _writes(found)):
        yield "norms"


def _writes(found: Structure) -> list[Any]:
    return [w for b in found.blocks for w in b.writes if w.kind != "inject"]


def _lone(found: Structure) -> bool:
    return any(b.mlp is not None for b in found.blocks)


def scored(architecture: Architecture) -> Iterator[Record]:
    """How the structure of one architecture compares, as a record after each step."""
    record: Record = {"name": architecture.class_name, "task": architecture.task}
    yield record | {"outcome": "not built", "why": "no time left"}
    try:
        built = build(architecture)
    except Exception as error:
        yield record | {"outcome": "not built", "why": said(error)}
        return
    yield record | {"outcome": "not captured", "why": "no time left"}
    start = time.process_time()
    try:
        program = captured(built)
    except Exception as error:
        yield record | {"outcome": "not captured", "why": said(error)}
        return
    record |= {"seconds": time.process_time() - start, "nodes": len(program.graph.nodes)}
    yield record | {"outcome": "failed", "why": "no time left"}
    try:
        yield record | compared(built, program)
    except Exception as error:
        yield record | {"outcome": "failed", "why": said(error)}


def captured(built: Built) -> Program:
    """The program of a built model, without a cache where it takes that word."""
    try:
        return lensfx.capture(built.model, use_cache=False, **built.inputs(*SHAPES[0]))
    except TypeError:
        return lensfx.capture(built.model, **built.inputs(*SHAPES[0]))


def canonical(program: Program) -> Program:
    """The program after the canonical passes and the fold of norms."""
    return lensfx.Pipeline(lensfx.Pipeline.default().passes[:3]).run(program)


def compared(built: Built, program: Program) -> Record:
    """The scores of a program as captured and in canonical form, the worse one counted."""
    known = facts(built)
    start = time.process_time()
    found = structure(program)
    taken = time.process_time() - start
    folded = canonical(program)
    scores = [score(known, program, found), score(known, folded, structure(folded))]
    wrong = dict.fromkeys(w for s in scores for w in s.wrong)
    missing = dict.fromkeys(m for s in scores for m in s.missing)
    outcome = "wrong" if wrong else ("unknown" if missing else "complete")
    return {
        "outcome": outcome,
        "why": "; ".join([*wrong, *(f"unknown: {m}" for m in missing)]),
        "structure": taken,
        "layers": known.layers,
        "blocks": len(found.blocks),
        "kinds": _kinds(found),
    }


def _kinds(found: Structure) -> str:
    """The blocks in words, each kind once."""
    words = [", ".join(w.kind.replace("_", " ") for w in b.writes) for b in found.blocks]
    return "; ".join(dict.fromkeys(words))
