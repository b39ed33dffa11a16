"""Take the mean over the vocabulary out of the unembedding.

    W' = W - mean over rows of W      b' = b - mean of b            W: [vocab, d]   b: [vocab]

All logits of a position move by one number, which softmax cannot see. Legal only where nothing
else can either: the walk from the logits to the outputs must end in softmax, log-softmax, cross
entropy, or an output that the contract lets move. Where none does, no output moves at all.

Leaves alone: a head behind which a soft cap, a threshold or another reader sees the shift, and a
linear output that nothing shows to be logits over a vocabulary (name it: `output=0`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lensfx.analysis import Head, Proof, dead, heads
from lensfx.errors import PipelineError
from lensfx.graph import Program, argument, same_size, shape_of
from lensfx.rewrite import At, Edit, Match, Miss, Pass, Rule, Sites
from lensfx.verify import UpToLogitShift

aten = torch.ops.aten


def found_by(output: int | None) -> Rule:
    """The rule for the head of one flat output, or for every head with evidence."""

    def find(program: Program) -> Iterator[Match | Miss]:
        count = len(program.signature.outputs)
        if output is not None and not 0 <= output < count:
            raise PipelineError(f"there is no output {output}; the model has {count}")
        found = heads(program)
        for head in found:
            yield site(program, head, output)
        if not found:
            words = "no linear op leads to an output alone, without another computed value"
            yield Miss(words, program.graph.output_node(), at_site=True)

    return Rule(Sites(find), unless, replace)


def site(program: Program, head: Head, output: int | None) -> Match | Miss:
    if output is not None and output not in head.outputs:
        return Miss(f"it does not lead to output {output}, which was named", head.linear, True)
    if same_size(shape_of(argument(head.linear, "weight"))[0], 1):  # type: ignore[index]
        return Miss("it has one row, and centring would leave nothing of it", head.linear, True)
    evidence = head.evidence if output is None else f"output {output} was named"
    if not evidence:
        words = "nothing says that it gives logits over a vocabulary; name its output to say so"
        return Miss(words, head.linear, at_site=True)
    last = len(shape_of(head.linear) or ()) - 1
    allowed = {k: [-1] for k in head.logits}
    proof = dead(head.linear, [last], allowed=allowed)
    bound = {
        "root": head.linear,
        "W": argument(head.linear, "weight"),
        "b": argument(head.linear, "bias"),
        "last": last,
        "proof": proof,
        "evidence": evidence,
        "outputs": head.logits or head.outputs,
    }
    if not isinstance(proof, Proof):
        return Miss(proof.reason, proof.node, at_site=True)
    if proof.leaves and all(step.rule == "kill" for step in proof.leaves):
        # Nothing but a softmax stands between it and the outputs: none of them moves.
        bound["outputs"] = ()
    return Match(bound, (), program)


def unless(m: Match) -> str | None:
    made, formulas = m.W, m.program.formulas if m.program is not None else {}
    if made.op == "get_attr" and made.target in formulas:
        (made,) = formulas[made.target].graph.output_node().all_input_nodes
    return "" if made.meta.get("lensfx", ("",))[0] == CenterUnembed().name else None


def centred(m: Match, at: At) -> dict[str, fx.Node]:
    """The weight and the bias without their means."""
    W = at.call(aten.sub.Tensor, m.W, at.call(aten.mean.dim, m.W, [0], True))  # [vocab, d]
    if m.b is None:
        return {"weight": W}
    return {
        "weight": W,
        "bias": at.call(aten.sub.Tensor, m.b, at.call(aten.mean.dim, m.b, [0], True)),  # [vocab]
    }


def replace(m: Match, edit: Edit) -> None:
    edit.before(m.root).set(m.root, **centred(m, edit.before(m.root)))
    edit.keeps(m.root, up_to=-1, centred=True)
    edit.changes(m.root, free=[m.last])
    for node in m.proof.kept:
        edit.keeps(node)
    edit.remark(m.evidence, shifted=m.outputs)


@dataclass(frozen=True)
class CenterUnembed(Pass):
    """Centre the unembedding over the vocabulary; `output` names the flat output that is logits."""

    output: int | None = None

    contract = UpToLogitShift()
    needs = (
        *("canonical-linear", "canonical-norm", "untie", "split-fused", "fold-scale"),
        *("fold-batch-norm", "fold-linear", "fold-norm"),
    )

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (found_by(self.output),)
