"""Mixtures of experts, as different people spell the dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import builder
from .stranger import WIDTH, Stranger, ids_only, vectors
from .trunk import GPT

EXPERTS = 4


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))


class DenseEinsum(nn.Module):
    """Every expert sees every token; the gate is zero for most."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) / 4)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.gate(x).softmax(-1)
        top, idx = probs.topk(2, dim=-1)
        weights = torch.zeros_like(probs).scatter(-1, idx, top / top.sum(-1, keepdim=True))
        h = F.silu(torch.einsum("btd,edf->btef", x, self.w_in))
        return torch.einsum("btef,efd,bte->btd", h, self.w_out, weights)


class MaskedLoop(nn.Module):
    """A loop over the experts, each on the rows a boolean mask picks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gates, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (chosen == e).any(-1)
            weight = (gates * (chosen == e)).sum(-1, keepdim=True)
            out[mask] += weight[mask] * expert(flat[mask])
        return out.view_as(x)


class IndexAddLoop(MaskedLoop):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        flat = x.view(-1, dim)
        weights, selected = torch.topk(F.softmax(self.router(flat), dim=1, dtype=torch.float), 2)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        final = torch.zeros((batch * length, dim), dtype=x.dtype, device=x.device)
        hits = F.one_hot(selected, num_classes=EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            k, rows = torch.where(hits[e])
            current = self.experts[e](flat[None, rows].reshape(-1, dim))
            final.index_add_(0, rows, (current * weights[rows, k, None]).to(x.dtype))
        return final.reshape(batch, length, dim)


class SkippingLoop(MaskedLoop):
    """Skips the experts that nobody asked for, which is a decision on values."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gate, assign = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for e in range(EXPERTS):
            idx = (assign == e).nonzero(as_tuple=True)[0]
            if idx.numel() == 0:
                continue
            out = out.index_copy(0, idx, gate[idx, None] * self.experts[e](flat[idx]))
        return out.view_as(x)


class GatherScatter(DenseEinsum):
    """Takes the chosen experts' weights out of the table and multiplies by those."""

    def forward(self, x: Tensor) -> Tensor:
        weight, idx = self.gate(x).topk(1, dim=-1)
        h = torch.relu(torch.einsum("btd,btkdf->btkf", x, self.w_in[idx]))
        y = torch.einsum("btkf,btkfd->btkd", h, self.w_out[idx])
        return (y * weight.sigmoid().unsqueeze(-1)).sum(2)


class SortedSegments(DenseEinsum):
    """Sorts tokens by expert, works on padded segments, unsorts."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        gate, expert = self.gate(flat).sigmoid().max(-1)
        order = torch.argsort(expert, stable=True)
        batched = torch.bmm(flat[order].unsqueeze(1), self.w_in[expert[order]]).relu()
        done = torch.bmm(batched, self.w_out[expert[order]]).squeeze(1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(flat.size(0)))
        return (done[back] * gate[:, None]).unflatten(0, x.shape[:2])


class ExpertChoice(DenseEinsum):
    """Experts choose their tokens, so a token's output depends on the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        capacity = -(-flat.size(0) * 2 // EXPERTS)
        gates, tokens = self.gate(flat).softmax(-1).t().topk(capacity, dim=-1)
        h = torch.bmm(flat[tokens], self.w_in).relu()
        y = torch.bmm(h, self.w_out) * gates[..., None]
        index = tokens.reshape(-1, 1).expand(-1, WIDTH)
        return torch.zeros_like(flat).scatter_add(0, index, y.reshape(-1, WIDTH)).view_as(x)


class SoftMoE(DenseEinsum):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(WIDTH, EXPERTS, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("btd,des->btes", x, self.phi)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        slots = torch.einsum("btd,btes->besd", x, dispatch)
        h = torch.einsum("besd,edf->besf", slots, self.w_in).relu()
        return torch.einsum("besf,efd,btes->btd", h, self.w_out, combine)


def _alone(name: str, factory: Callable[[], nn.Module], **more: Any) -> Stranger:
    return Stranger(f"moe_{name}", builder(factory), vectors, **more)


STRANGERS = [
    _alone("dense", DenseEinsum),
    Stranger("moe_dense_gpt", builder(lambda: GPT(mlp=DenseEinsum)), ids_only),
    _alone("masked_loop", MaskedLoop, note="sizes that depend on values"),
    _alone("index_add", IndexAddLoop, note="sizes that depend on values"),
    _alone("skipping_loop", SkippingLoop, expect="branch"),
    _alone("gather", GatherScatter),
    _alone("sorted", SortedSegments),
    _alone("expert_choice", ExpertChoice, shapes=((2, 7), (3, 11), (2, 2))),
    _alone("soft", SoftMoE),
]
