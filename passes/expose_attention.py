"""Write fused attention out, so that its scores and its pattern are values of the graph.

    scores  = (q * scale) @ k.T, masked entries -inf      [..., q, k]
    pattern = softmax(scores)                             [..., q, k]
    z       = pattern @ v                                 [..., q, d]

Masks, causal order, scale and grouped heads mean what they mean to the fused call; a row without
any key is 0. Exact in real arithmetic. A float16 or bfloat16 attention is computed in float32
and rounded at the end, as the fused kernels do. It costs the memory of the scores.

Leaves alone: attention that drops entries out in training, for the kernel draws them itself, and
one whose head width or grouping is not fixed. `at` restricts it to module paths or node names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lensfx.errors import PipelineError
from lensfx.graph import Program, module_path, native_name
from lensfx.rewrite import Edit, Match, Pass, Rule, Sites, attention
from lensfx.verify import Exact

FUSED = torch.ops.aten.scaled_dot_product_attention.default


def found_by(at: tuple[str, ...]) -> Rule:
    """The rule for the attentions that `at` names, or for all of them."""

    def find(program: Program) -> Iterator[Match]:
        sites = list(program.graph.find_nodes(op="call_function", target=FUSED))
        places = [(module_path(n), n.name, native_name(n)) for n in sites]
        for name in at:
            if not any(is_named(name, *p) for p in places) and not is_done(name, program):
                there = ", ".join(path or f"%{node}" for path, node, _ in places) or "none at all"
                raise PipelineError(
                    f"there is no fused attention at {name!r}",
                    hint=f"leave `at` out, or choose from what there is: {there}",
                )
        for site, place in reversed([*zip(sites, places, strict=True)]):
            if not at or any(is_named(name, *place) for name in at):
                yield Match({"root": site}, (), program)

    return Rule(Sites(find), unless, replace)


def is_named(name: str, path: str, *names: str) -> bool:
    """Whether `name` is one of the names of a place, its module, or a module around that."""
    return name in (path, *names) or path.startswith(f"{name}.")


def is_done(name: str, program: Program) -> bool:
    """Whether `name` is of an attention that was written out before."""
    done = [e for e in program.journal if e.pass_name == ExposeAttention().name]
    return any(is_named(name, e.path, e.root) or name.startswith(f"{e.path}.") for e in done)


def unless(m: Match) -> str | None:
    return attention.refusal(m.root)


def replace(m: Match, edit: Edit) -> None:
    attention.settle(m.root)
    at = edit.before(m.root)
    made = attention.lowered(at.call, m.root)
    edit.remark(f"scores %{made.scores.name}, pattern %{made.pattern.name}")
    at.replace(m.root, made.z)


@dataclass(frozen=True)
class ExposeAttention(Pass):
    """Lower fused attention to scores, pattern and values; `at` names modules or nodes, () all."""

    at: str | tuple[str, ...] = ()

    contract = Exact()
    needs = ("fold-scale", "fold-value-bias", "fold-key-bias", "refactor-attention")

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by((self.at,) if isinstance(self.at, str) else self.at),)
