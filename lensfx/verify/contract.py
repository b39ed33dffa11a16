"""PROVISIONAL: being rewritten."""
import torch
from dataclasses import dataclass
from lensfx.verify.compare import rows, Difference
@dataclass(frozen=True)
class Exact:
    name='Exact'; bound=1e-12
    def compare(s,a,b): return rows(a,b)
@dataclass(frozen=True)
class UpToLogitShift:
    name='UpToLogitShift'; bound=1e-12
    def compare(s,a,b): return rows(a-a.mean(-1,keepdim=True),b-b.mean(-1,keepdim=True))
@dataclass(frozen=True)
class Observes:
    name='Observes'; bound=0.
    def compare(s,a,b): return Difference(0. if torch.equal(torch.nan_to_num(a),torch.nan_to_num(b)) else float('inf'))
