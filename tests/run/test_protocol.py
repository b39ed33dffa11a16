"""What users of TransformerLens ask of a model: sizes, tokens, blocks; and unusual streams."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixtures.models import BUILDERS, IDS
from torch import Tensor, nn

import lensfx
from lensfx import ActivationCache, Lens, LensError


@cache
def lens_of(name: str) -> Lens:
    model = BUILDERS[name]("sdpa")
    return lensfx.wrap(model, input_ids=IDS, use_cache=False, passes=None, verify=False)


WANTED: dict[str, dict[str, Any]] = {
    "gpt2": dict(act_fn="gelu_new", normalization_type="LN", positional_embedding_type="standard",
                 n_ctx=16, tie_word_embeddings=True, gated_mlp=False, n_key_value_heads=None),
    "neox": dict(act_fn="gelu", normalization_type="LN", positional_embedding_type="rotary",
                 n_ctx=None, parallel_attn_mlp=True, final_rms=False),
    "llama": dict(act_fn="silu", normalization_type="RMS", positional_embedding_type="rotary",
                  gated_mlp=True, final_rms=True, n_key_value_heads=2, attn_only=False),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_cfg_is_what_the_model_was_built_with(name: str) -> None:
    cfg = lens_of(name).cfg
    sizes = dict(n_layers=2, d_model=32, n_heads=4, d_head=8, d_mlp=48, d_vocab=37, d_vocab_out=37)
    for key, wanted in {**sizes, **WANTED[name], "dtype": torch.float32}.items():
        assert getattr(cfg, key) == wanted, key
    assert cfg.attn_scale == pytest.approx(8**0.5)
    assert not cfg.output_logits_soft_cap
    with pytest.raises(AttributeError, match=r"what cfg\.rotary_dim is"):
        _ = cfg.rotary_dim


class Letters:
    """A tokenizer of one letter each, `#` the beginning and the padding."""

    letters = "#abcdefgh"
    bos_token_id: int | None = 0
    pad_token_id: int | None = 0
    eos_token_id: int | None = None
    padding_side = "right"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.letters.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i] for i in ids)


@pytest.fixture
def lens() -> Lens:
    found = lens_of("gpt2")
    found.tokenizer = Letters()
    return found


def test_tokens_there_and_back(lens: Lens) -> None:
    assert lens.to_tokens("abc").tolist() == [[0, 1, 2, 3]]
    assert lens.to_tokens("abc", prepend_bos=False).tolist() == [[1, 2, 3]]
    assert lens.to_tokens(["a", "abc"]).tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    left = lens.to_tokens(["a", "abc"], padding_side="left")
    assert left.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert lens.to_tokens("a" * 40).shape == (1, 16)
    assert lens.to_tokens("a" * 40, truncate=False).shape == (1, 41)
    assert lens.to_string(torch.tensor([1, 2])) == "ab"
    assert lens.to_string([[1, 2], [3, 4]]) == ["ab", "cd"]
    assert lens.to_str_tokens("ab") == ["#", "a", "b"]
    assert lens.to_str_tokens(torch.tensor([[1, 2]])) == ["a", "b"]
    assert lens.to_str_tokens(["a", "bc"], prepend_bos=False) == [["a"], ["b", "c"]]
    assert lens.to_single_token("c") == 3
    assert lens.to_single_str_token(3) == "c"


def test_tokens_that_cannot_be_made_say_why(lens: Lens) -> None:
    with pytest.raises(LensError, match="2 tokens, not one"):
        lens.to_single_token("ab")
    with pytest.raises(LensError, match="padding_side='up'"):
        lens.to_tokens("a", padding_side="up")
    lens.tokenizer.bos_token_id = lens.tokenizer.pad_token_id = None
    assert lens.to_tokens("ab").tolist() == [[1, 2]]
    with pytest.raises(LensError, match="no token for the beginning"):
        lens.to_tokens("ab", prepend_bos=True)
    with pytest.raises(LensError, match="need a padding token"):
        lens.to_tokens(["a", "ab"])
    lens.tokenizer = None
    with pytest.raises(LensError, match="no tokenizer"):
        lens.to_tokens("ab")


@pytest.mark.parametrize("name", BUILDERS)
def test_blocks_norm_and_head_are_the_models_own(name: str) -> None:
    lens = lens_of(name)
    assert lens.all_head_labels() == [f"L{i}H{h}" for i in range(2) for h in range(4)]
    block = lens.blocks[1]
    assert torch.equal(block.attn.W_Q, lens.W_Q[1])
    assert torch.equal(block.attn.OV.AB, lens.OV[1].AB)
    assert torch.equal(block.mlp.W_out, lens.W_out[1])
    assert block.ln1 is not None
    with torch.no_grad():
        out, kept = lens.run_with_cache(input_ids=IDS, use_cache=False)
        q = torch.einsum("...d,hdk->...hk", block.ln1(kept["resid_pre", 1]), block.attn.W_Q)
        torch.testing.assert_close(q + block.attn.b_Q, kept["q", 1], atol=1e-5, rtol=1e-5)
        logits = lens.unembed(lens.ln_final(kept["resid_post", -1]))
        torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=1e-5)
        scale = lens.ln_final.divisor(kept["resid_post", -1])
        torch.testing.assert_close(scale, kept["ln_final.hook_scale"], atol=1e-5, rtol=1e-5)
    with pytest.raises(AttributeError, match="has no 'W_nothing'"):
        _ = block.attn.W_nothing
    direction = lens.tokens_to_residual_directions(5)
    assert torch.equal(direction, lens.W_U[:, 5])
    assert lens.tokens_to_residual_directions(IDS).shape == (2, 7, 32)
    assert torch.equal(lens.accumulated_bias(0), torch.zeros(32))
    with_mlp, without = lens.accumulated_bias(1), lens.accumulated_bias(1, include_mlp_biases=False)
    torch.testing.assert_close(with_mlp - without, lens.b_out[0])


class Odd(nn.Module):
    """A small model with norms behind the branches, multipliers and caps, as switched on."""

    def __init__(
        self, norm: type[nn.Module], where: str, cap: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.where, self.cap, self.scale = where, cap, scale
        self.embed = nn.Embedding(19, 12)
        self.places = nn.Embedding(16, 12)
        self.qkv = nn.ModuleList(nn.Linear(12, 36) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.norms = nn.ModuleList(norm(12) for _ in range(9))
        self.head = nn.Linear(12, 19)
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)

    def attention(self, i: int, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv[i](x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out[i](z.transpose(1, 2).flatten(2))

    def mlp(self, i: int, x: Tensor) -> Tensor:
        return self.downs[i](F.silu(self.ups[i](x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * 3.0 + self.places(torch.arange(ids.shape[1]))
        for i in range(2):
            for j, branch in enumerate((self.attention, self.mlp)):
                before, behind = self.norms[4 * i + 2 * j], self.norms[4 * i + 2 * j + 1]
                y = branch(i, before(x) if self.where != "after" else x)
                y = (behind(y) if self.where == "both" else y) * self.scale
                x = x + y
                x = behind(x) if self.where == "after" else x
        logits = self.head(self.norms[8](x)) * 0.5
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def odd(*given: Any, **switches: Any) -> tuple[Lens, Tensor, ActivationCache]:
    torch.manual_seed(0)
    model = Odd(*given, **switches).double().eval()
    ids = IDS % 19
    lens = lensfx.wrap(model, ids, passes=None, verify=False)
    with torch.no_grad():
        out, kept = lens.run_with_cache(ids)
    return lens, out, kept


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@torch.no_grad()
def test_norms_behind_the_branches(norm: type[nn.Module], scale: float) -> None:
    lens, logits, kept = odd(norm, "both", scale=scale)
    close, ids = torch.testing.assert_close, IDS % 19
    end = kept["resid_post", -1]
    full, labels = kept.get_full_resid_decomposition(return_labels=True)
    close(full.sum(0), end)
    assert labels[:6] == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    close(kept.decompose_resid().sum(0), end)
    # What a head adds is what is missing without it, while the norm divides by the same number.
    heads = kept.stack_head_results(1)
    without = kept["z", 0].clone()
    without[:, :, 1] = 0
    bare = torch.einsum("bphk,hkd->bpd", without, lens.W_O[0]) + lens.b_O[0]
    behind = lens.structure.blocks[0].attn_write.norm_out
    assert behind is not None
    own = lensfx.run.norms.AppliedNorm(lens.program, behind)
    whole = torch.einsum("bphk,hkd->bpd", kept["z", 0], lens.W_O[0]) + lens.b_O[0]
    missing = own.linear(whole - bare) / own.divisor(whole) * scale
    close(heads[1], missing)
    attributed = kept.logit_attrs(kept.decompose_resid(), ids).sum(0)
    bias = 0 if lens.ln_final.b is None else lens.ln_final.b @ lens.W_U
    constant = lens.b_U + bias
    close(attributed + constant[ids], logits.gather(-1, ids[..., None])[..., 0])
    with pytest.raises(LensError, match="0_attn_out goes through a norm"):
        lens.accumulated_bias(1)


@torch.no_grad()
def test_capped_logits_are_attributed_ahead_of_the_cap_or_not_at_all() -> None:
    lens, logits, kept = odd(nn.RMSNorm, "before", cap=2.0)
    ids, stack = IDS % 19, kept.decompose_resid()
    assert lens.cfg.output_logits_soft_cap
    with pytest.raises(LensError, match="not linear"):
        kept.logit_attrs(stack, ids)
    attributed = kept.logit_attrs(stack, ids, before_cap=True).sum(0) + lens.b_U[ids]
    capped = 2 * torch.tanh(0.5 * attributed / 2)
    torch.testing.assert_close(capped, logits.gather(-1, ids[..., None])[..., 0])


@torch.no_grad()
def test_a_stream_that_is_no_sum_is_refused() -> None:
    _, _, kept = odd(nn.LayerNorm, "after")
    for analysis in (kept.decompose_resid, kept.stack_head_results):
        with pytest.raises(LensError, match="no plain sum") as caught:
            analysis()
        assert "test_protocol.py" in str(caught.value)
    assert kept.accumulated_resid().shape == (3, 2, 7, 12)


@torch.no_grad()
def test_the_table_has_no_scale_and_the_sum_has() -> None:
    lens, _, kept = odd(nn.LayerNorm, "before")
    torch.testing.assert_close(kept["embed"], 3 * lens.W_E[IDS % 19])
    assert lens.W_pos.shape == (16, 12)
    assert kept.decompose_resid(0, return_labels=True)[1] == ["embed", "pos_embed"]
    torch.testing.assert_close(kept.decompose_resid(0).sum(0), kept["resid_pre", 0])
