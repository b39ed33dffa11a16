"""Write the residual stream in another orthogonal basis.

    x' = x @ Q                                      x: [..., d]   Q: [d, d], Q @ Q.T = 1
    writes:  linear(z; W, b) @ Q  =  linear(z; Q.T @ W, b @ Q)        W: [d, in]   b: [d]
    tables:  E[ids] @ Q           =  (E @ Q)[ids]                     E: [vocab, d]
    reads:   linear(x; V)         =  linear(x'; V @ Q)                V: [out, d]
    between: rms_norm(x) @ Q      =  rms_norm(x'), and so for sums, numbers times x, views

One rewrite turns a whole stream; a tied table comes apart. Exact in real arithmetic.

Leaves alone: a stream that anything sees channel by channel: a scale that is not folded, a layer
norm unless Q keeps the direction (1, ..., 1), an output, an op that no rule covers.

Source: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from lensfx.analysis import Basis, basis_of, orthogonal, random_rotation, structure
from lensfx.graph import Program, argument, dtype_of, is_op, value_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import Exact

aten = torch.ops.aten


def found_by(turn: Callable[[Basis], torch.Tensor]) -> Rule:
    """The rule that turns every stream by the matrix that `turn` gives for it."""

    def find(program: Program) -> Iterator[Match | Miss]:
        done = {e.root for e in program.journal if e.pass_name == RotateStream().name}
        seen: set[fx.Node] = set()
        for stream in structure(program).streams:
            bounds = []
            values = (stream.start, *(w.add for w in stream.writes))
            for found in (None if v in seen else basis_of(v) for v in values):
                if isinstance(found, Basis):
                    seen.update(found.values)
                    if found.values[0].name not in done:
                        yield site(program, found, turn(found))
                elif found is not None:
                    bounds.append(Miss(found.reason, found.node, at_site=True))
            yield from bounds[:1]

    return Rule(Sites(find), lambda m: None, replace)


def site(program: Program, basis: Basis, Q: torch.Tensor) -> Match | Miss:
    root = basis.values[0]
    if len(Q) != basis.width:
        return Miss(f"its stream has {basis.width} channels, and Q is for {len(Q)}", root, True)
    sums = Q.sum(0)  # of a matrix that keeps (1, ..., 1), all of them 1, or all of them -1
    if basis.centring and not torch.allclose(sums, sums[0].sign().expand_as(sums), atol=1e-12):
        return Miss("it takes off a mean, whose direction Q moves", basis.centring[0], True, root)
    return Match({"root": root, "basis": basis, "Q": Q}, (), program)


def drawn(basis: Basis, seed: int) -> torch.Tensor:
    return random_rotation(basis.width, seed, bool(basis.centring))


def on_the_right(at: At, W: fx.Node, Q: fx.Node) -> fx.Node:
    wide = at.call(aten.matmul.default, at.call(aten.to.dtype, W, torch.float64), Q)
    return at.call(aten.to.dtype, wide, dtype_of(W))


def turned(at: At, node: fx.Node, Q: fx.Node, basis: Basis) -> dict[str, fx.Node]:
    """The new weight and bias of a linear op or a table."""
    W = argument(node, "weight")
    if is_op(node, aten.embedding.default):
        return {"weight": on_the_right(at, W, Q)}
    changed = {"weight": on_the_right(at, W, Q) if node in basis.reads else W}
    if node in basis.writes:
        W = at.call(aten.t.default, changed["weight"])
        changed["weight"] = at.call(aten.t.default, on_the_right(at, W, Q))  # Q.T @ W
        if (b := argument(node, "bias")) is not None:
            changed["bias"] = on_the_right(at, b, Q)
    return changed


def replace(m: Match, edit: Edit) -> None:
    Q = edit.constant(f"rotation.{m.root.name}", m.Q.to(value_of(m.root).device))
    for node in dict.fromkeys((*m.basis.writes, *m.basis.reads)):
        edit.before(node).set(node, **turned(edit.before(node), node, Q, m.basis))
    for reader, vector in m.basis.vectors:
        edit.before(reader).redirect(reader, vector, on_the_right(edit.before(reader), vector, Q))
    back = edit.before(m.basis.values[0]).call(aten.t.default, Q)
    for value in m.basis.values:
        edit.changes(value, turn=back)
    edit.remark(f"{len(m.basis.writes)} writes and {len(m.basis.reads)} reads turned")


@dataclass(frozen=True)
class RotateStream(Pass):
    """Turn every stream by `Q`, or by a random matrix drawn from `seed`."""

    Q: torch.Tensor | None = field(default=None, compare=False)
    seed: int = 0

    contract = Exact()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-embedding-scale"),
        *("fold-scale", "fold-batch-norm", "fold-linear", "fold-norm", "center-writers"),
        *("center-unembed", "layer-norm-to-rms", "fold-value-bias", "fold-key-bias"),
        "refactor-attention",
    )

    def __post_init__(self) -> None:
        if self.Q is not None:
            object.__setattr__(self, "Q", orthogonal(self.Q))

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by(lambda b: drawn(b, self.seed) if self.Q is None else self.Q),)
