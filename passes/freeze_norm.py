"""Replace what a norm divides by with a number kept from one call.

    layer_norm(x; g, s)  ->  (x - mean(x)) / d * g + s      x: [..., pos, d_model]
    rms_norm(x; g)       ->  x / d * g                      d: [..., pos, 1], from that call

The norm is then affine in x: the linearisation that attribution graphs are made of. It is not
exact. On the captured example, where `d` comes from by default, outputs are what they were; on
another call they are another function, and on one of other sizes there is an error. With divisors
that are given, the proof only says how far the example moves. Attention patterns are not frozen.

Leaves alone: a norm over several axes, one without a divisor, and every norm of a program that
holds no weights, unless divisors are given.

Source: Ameisen et al., Circuit Tracing (2025), on the local replacement model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import fx

from lensfx.analysis import frozen
from lensfx.graph import Program, argument, dtype_of, is_op, native_name
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import AtExample, Float64

aten = torch.ops.aten
Scales = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class AtGiven(AtExample):
    """Norms divide by what was given: how far that moves the example is measured, not bounded."""

    name: ClassVar[str] = "at-given-divisors"
    bound: ClassVar[float] = inf
    weakness: ClassVar[int] = 4


def found_by(scales: Scales | None, at: tuple[str, ...]) -> Rule:
    """The rule for the norms that `at` names, or for all of them."""

    def find(program: Program) -> Iterator[Match | Miss]:
        names = frozen.norm_names(program)
        done = [e.note.split() for e in program.journal if e.pass_name == FreezeNorm().name]
        norms = frozen.norms_at(names, at, done)
        held = kept(program, norms) if scales is None else frozen.divisors_in(scales, names)
        for norm in reversed(norms):
            d = held if isinstance(held, str) else frozen.fitted(norm, held.get(norm))
            if isinstance(d, str):
                yield Miss(d, norm, at_site=True)
            else:
                yield Match({"root": norm, "d": d, "names": names[norm]}, (), program)

    return Rule(Sites(find), lambda m: None, replace)


def kept(program: Program, norms: list[fx.Node]) -> dict[fx.Node, torch.Tensor] | str:
    """What each norm divides by on the example call, in float64."""
    if any(t.is_meta for t in program.tensors.values()):
        return "the program holds no weights to run the example with; give the divisors"
    run = frozen.norm_inputs(program, norms)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Float64() as oracle:
        torch.manual_seed(0)
        values = oracle.read(run())
    return {n: frozen.divisor(n, values[n.name]) for n in norms}


def affine(at: At, norm: fx.Node, d: fx.Node) -> fx.Node:
    """The norm over a given divisor, in the dtype that norms compute in."""
    x, dtype = argument(norm, "input"), dtype_of(norm)
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def cast(value: fx.Node, to: torch.dtype | None) -> fx.Node:
        return value if dtype_of(value) == to else at.call(aten.to.dtype, value, to)

    y, s = cast(x, wide), None
    if is_op(norm, aten.layer_norm.default):
        y, s = at.call(aten.sub.Tensor, y, at.call(aten.mean.dim, y, [-1], True)), "bias"
    y = at.call(aten.div.Tensor, y, cast(d, wide))
    for op, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, s)):
        if name is not None and (vector := argument(norm, name)) is not None:
            y = at.call(op, y, cast(vector, wide))
    return cast(y, dtype)


def replace(m: Match, edit: Edit) -> None:
    at, x, site = edit.before(m.root), argument(m.root, "input"), native_name(m.root)
    d = frozen.read_kept(at, x, edit.constant(f"{site}.divisor", m.d), site)
    edit.remark(" ".join(m.names))
    at.replace(m.root, affine(at, m.root, d))


@dataclass(frozen=True)
class FreezeNorm(Pass):
    """Freeze the divisors of norms at `scales`, by default those of the example call.

    `scales` maps hook, native or node names to divisors, as an ActivationCache does; `at` names
    norms, or modules around them.
    """

    scales: Scales | None = field(default=None, compare=False)
    at: str | tuple[str, ...] = ()

    needs = ("canonical-norm", "fold-norm", "center-writers", "layer-norm-to-rms", "rotate-stream")

    @property
    def contract(self) -> AtExample:  # type: ignore[override]
        """What is promised: everything at the example, or nothing where divisors are given."""
        return AtExample() if self.scales is None else AtGiven()

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by(self.scales, (self.at,) if isinstance(self.at, str) else self.at),)
