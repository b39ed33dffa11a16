"""PROVISIONAL: being rewritten."""
import torch
from dataclasses import dataclass
@dataclass(frozen=True)
class Difference:
    error: float; index: tuple=(); reference: float=0.; candidate: float=0.
def rows(a,b):
    if a.shape!=b.shape: return Difference(float('inf'))
    if not a.is_floating_point(): return Difference(0. if torch.equal(a,b) else float('inf'))
    a=torch.nan_to_num(a.double()); b=torch.nan_to_num(b.double())
    a2=a.reshape(-1,a.shape[-1]) if a.ndim else a.reshape(1,1); b2=b.reshape(-1,a2.shape[-1])
    n=a2.norm(dim=1); e=(a2-b2).norm(dim=1)/torch.maximum(n,1e-3*n.median()+1e-300)
    return Difference(e.max().item() if e.numel() else 0.)
def drift(r,c,o):
    x=(r.double()-o).norm(); y=(c.double()-o).norm()
    return (y/x).item() if x>0 else (1. if y==0 else float('inf'))
