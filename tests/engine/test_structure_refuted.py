"""Models on which a reviewer found a wrong claim: what is said of each of them now."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lensfx
from lensfx.analysis import Structure, structure

WIDTH, HEADS, VOCAB = 16, 4, 20
DH = WIDTH // HEADS
IDS = torch.arange(14).reshape(2, 7) % VOCAB


class Model(nn.Module):
    """Two pre-norm blocks; what a subclass changes is the attention or the add."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.seen: dict[str, Tensor] = {}

    def apart(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, HEADS, DH)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def weighed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def attention(self, i: int, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv[i](x))
        z = self.weighed(q, k, v)
        self.seen |= {f"{i}.{n}": t.transpose(1, 2) for n, t in zip("qkvz", (q, k, v, z))}  # noqa: B905
        return self.out[i](z.transpose(1, 2).flatten(2))

    def added(self, i: int, x: Tensor) -> Tensor:
        return x + self.attention(i, self.norms[2 * i](x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for i in range(2):
            x = self.added(i, x)
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x)


class WidthFirst(Model):
    """As many heads as channels in each, the channels in front."""

    def apart(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, DH, HEADS)).permute(2, 0, 4, 1, 3)
        return q, k, v


class Transposed(Model):
    """Keys times queries, and the softmax over rows."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pattern = (k @ q.transpose(-1, -2) / DH**0.5).softmax(-2)
        return pattern.transpose(-1, -2) @ v


class NormAdded(Model):
    """The branch adds the norm it reads to what it computes."""

    def added(self, i: int, x: Tensor) -> Tensor:
        n = self.norms[2 * i](x)
        return x + (self.attention(i, n) + 0.3 * n)


class OverBatch(Model):
    """The first block attends over the examples, the second over positions."""

    def attention(self, i: int, x: Tensor) -> Tensor:
        return (
            super().attention(i, x.transpose(0, 1)).transpose(0, 1)
            if i == 0
            else super().attention(i, x)
        )


class Sinks(Model):
    def weighed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        sink = torch.zeros(1, 1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class HeadByHead(Model):
    """Each head has an output projection of its own, and their results are added."""

    def attention(self, i: int, x: Tensor) -> Tensor:
        z = self.weighed(*self.apart(self.qkv[i](x)))  # [batch, head, pos, d_head]
        weight = self.out[i].weight.t().unflatten(0, (HEADS, DH))
        return (z @ weight).sum(1)


class Multiplied(Model):
    """A fused add of a scaled branch, which has no value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def added(self, i: int, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.gain, self.attention(i, self.norms[2 * i](x)))


def wrapped(kind: type[Model]) -> tuple[Model, lensfx.Lens]:
    torch.manual_seed(0)
    model = kind().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model, lensfx.wrap(model, IDS, passes=None, verify=False)


def found(kind: type[Model]) -> Structure:
    torch.manual_seed(0)
    return structure(lensfx.capture(kind().eval(), IDS))


@pytest.mark.parametrize("kind", [Model, WidthFirst, Sinks])
def test_heads_are_told_from_channels_of_the_same_number(kind: type[Model]) -> None:
    model, lens = wrapped(kind)
    model(IDS)
    _, cache = lens.run_with_cache(IDS)
    for name in ("0.q", "0.k", "0.v", "0.z", "1.q", "1.k", "1.v", "1.z"):
        layer, letter = name.split(".")
        assert torch.equal(cache[f"blocks.{layer}.attn.hook_{letter}"], model.seen[name]), name


def test_transposed_scores_have_the_same_heads() -> None:
    for block in found(Transposed).blocks:
        assert block.attn is not None
        assert (block.attn.heads, block.attn.head_width) == (HEADS, DH)


def test_a_norm_that_a_branch_adds_is_part_of_what_it_writes() -> None:
    _, lens = wrapped(NormAdded)
    assert [[w.kind for w in b.writes] for b in lens.structure.blocks] == [["attention", "mlp"]] * 2
    assert lens.structure.stream is not None
    assert not lens.structure.stream.post_norm
    _, cache = lens.run_with_cache(IDS)
    for i in range(2):
        total = cache["resid_pre", i] + cache["attn_out", i]
        torch.testing.assert_close(total, cache["resid_mid", i])


def test_attention_over_examples_is_no_mlp() -> None:
    kinds = [[w.kind for w in b.writes] for b in found(OverBatch).blocks]
    assert kinds == [["mixer", "mlp"], ["attention", "mlp"]]


def test_a_sink_is_no_key() -> None:
    _, lens = wrapped(Sinks)
    _, cache = lens.run_with_cache(IDS)
    assert cache["attn_scores", 0].shape == cache["pattern", 0].shape == (2, HEADS, 7, 7)
    assert lens.structure.blocks[0].attn is not None
    assert lens.structure.blocks[0].attn.sinks is not None


def test_results_of_heads_that_are_projected_one_by_one() -> None:
    _, lens = wrapped(HeadByHead)
    _, cache = lens.run_with_cache(IDS)
    for i in range(2):
        assert cache["result", i].shape == (2, 7, HEADS, WIDTH)
        torch.testing.assert_close(cache["result", i].sum(2), cache["attn_out", i])
    out = lens.run_with_hooks(IDS, fwd_hooks=[("blocks.0.attn.hook_result", lambda v, hook: v * 0)])
    gone = lens.run_with_hooks(IDS, fwd_hooks=[("blocks.0.hook_attn_out", lambda v, hook: v * 0)])
    torch.testing.assert_close(out, gone)


def test_a_fused_add_is_a_write_and_a_note_says_so() -> None:
    answer = found(Multiplied)
    assert answer.complete
    assert [[w.kind for w in b.writes] for b in answer.blocks] == [["attention", "mlp"]] * 2
    assert any("fused with its add" in n.text for n in answer.notes)
    names = {p.name for p in answer.points}
    assert {"blocks.0.hook_resid_mid", "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out"} <= names
    assert not names & {"blocks.0.hook_attn_out", "blocks.0.attn.hook_result"}
    assert not lensfx.wrap(Multiplied().eval(), IDS, passes=None).report.witness.demoted
