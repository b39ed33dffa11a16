"""Contracts, the float64 oracle, and the proof that a rewrite keeps its contract."""

from lensfx.verify.check import Comparison, check
from lensfx.verify.compare import Difference
from lensfx.verify.contract import AtExample, Exact, Observes, UpToLogitShift
from lensfx.verify.inputs import hard_inputs
from lensfx.verify.oracle import Float64
from lensfx.verify.prove import Equivalence, PassProof, prove

__all__ = [
    "AtExample",
    "Comparison",
    "Difference",
    "Equivalence",
    "Exact",
    "Float64",
    "Observes",
    "PassProof",
    "UpToLogitShift",
    "check",
    "hard_inputs",
    "prove",
]
