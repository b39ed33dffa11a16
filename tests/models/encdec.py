"""An encoder-decoder in the style of the tutorials on "Attention is all you need"."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Inputs, builder, padding_mask, token_ids

PAD = 1
SRC_VOCAB = 47
TRG_VOCAB = 53
# The target of a test input is two tokens longer than the source.
MAX_LEN = 34


class TokenEmbedding(nn.Embedding):
    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model, padding_idx=PAD)


class PositionalEncoding:
    """Sinusoids as a plain tensor: neither a parameter nor a buffer, so `model.to` misses it."""

    def __init__(self, d_model: int, max_len: int) -> None:
        pos = torch.arange(0, max_len).float().unsqueeze(dim=1)
        _2i = torch.arange(0, d_model, step=2).float()
        self.encoding = torch.zeros(max_len, d_model)
        self.encoding[:, 0::2] = torch.sin(pos / (10000 ** (_2i / d_model)))
        self.encoding[:, 1::2] = torch.cos(pos / (10000 ** (_2i / d_model)))

    def __call__(self, x: Tensor) -> Tensor:
        _, seq_len = x.size()
        return self.encoding[:seq_len, :]


class TransformerEmbedding(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, max_len: int, drop_prob: float) -> None:
        super().__init__()
        self.tok_emb = TokenEmbedding(vocab_size, d_model)
        self.pos_emb = PositionalEncoding(d_model, max_len)
        self.drop_out = nn.Dropout(p=drop_prob)
        self.d_model = d_model

    def forward(self, x: Tensor) -> Tensor:
        tok_emb = self.tok_emb(x) * math.sqrt(self.d_model)
        # The table stays in float32 on the CPU wherever the model goes.
        pos_emb = self.pos_emb(x).to(tok_emb)
        return self.drop_out(tok_emb + pos_emb)


class LayerNorm(nn.Module):
    def __init__(self, d_model: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, unbiased=False, keepdim=True)
        out = (x - mean) / torch.sqrt(var + self.eps)
        return self.gamma * out + self.beta


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.w_q = nn.Linear(d_model, d_model)
        self.w_k = nn.Linear(d_model, d_model)
        self.w_v = nn.Linear(d_model, d_model)
        self.w_concat = nn.Linear(d_model, d_model)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.w_q(q)), self.split(self.w_k(k)), self.split(self.w_v(v))
        d_tensor = k.size(3)
        score = (q @ k.transpose(2, 3)) / math.sqrt(d_tensor)
        if mask is not None:
            score = score.masked_fill(mask == 0, -10000)
        score = F.softmax(score, dim=-1)
        return self.w_concat(self.concat(score @ v))

    def split(self, tensor: Tensor) -> Tensor:
        batch_size, length, d_model = tensor.size()
        return tensor.view(batch_size, length, self.n_head, d_model // self.n_head).transpose(1, 2)

    def concat(self, tensor: Tensor) -> Tensor:
        batch_size, head, length, d_tensor = tensor.size()
        return tensor.transpose(1, 2).contiguous().view(batch_size, length, head * d_tensor)


class PositionwiseFeedForward(nn.Module):
    def __init__(self, d_model: int, hidden: int, drop_prob: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, hidden)
        self.linear2 = nn.Linear(hidden, d_model)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(p=drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.relu(self.linear1(x))))


class EncoderLayer(nn.Module):
    def __init__(self, d_model: int, ffn_hidden: int, n_head: int, drop_prob: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_head)
        self.norm1 = LayerNorm(d_model)
        self.dropout1 = nn.Dropout(p=drop_prob)
        self.ffn = PositionwiseFeedForward(d_model, ffn_hidden, drop_prob)
        self.norm2 = LayerNorm(d_model)
        self.dropout2 = nn.Dropout(p=drop_prob)

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        _x = x
        x = self.attention(q=x, k=x, v=x, mask=src_mask)
        x = self.norm1(self.dropout1(x) + _x)
        _x = x
        x = self.ffn(x)
        return self.norm2(self.dropout2(x) + _x)


class DecoderLayer(nn.Module):
    def __init__(self, d_model: int, ffn_hidden: int, n_head: int, drop_prob: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, n_head)
        self.norm1 = LayerNorm(d_model)
        self.dropout1 = nn.Dropout(p=drop_prob)
        self.enc_dec_attention = MultiHeadAttention(d_model, n_head)
        self.norm2 = LayerNorm(d_model)
        self.dropout2 = nn.Dropout(p=drop_prob)
        self.ffn = PositionwiseFeedForward(d_model, ffn_hidden, drop_prob)
        self.norm3 = LayerNorm(d_model)
        self.dropout3 = nn.Dropout(p=drop_prob)

    def forward(self, dec: Tensor, enc: Tensor, trg_mask: Tensor, src_mask: Tensor) -> Tensor:
        _x = dec
        x = self.self_attention(q=dec, k=dec, v=dec, mask=trg_mask)
        x = self.norm1(self.dropout1(x) + _x)
        _x = x
        x = self.enc_dec_attention(q=x, k=enc, v=enc, mask=src_mask)
        x = self.norm2(self.dropout2(x) + _x)
        _x = x
        x = self.ffn(x)
        return self.norm3(self.dropout3(x) + _x)


class Encoder(nn.Module):
    def __init__(self, d_model: int, ffn_hidden: int, n_head: int, n_layers: int) -> None:
        super().__init__()
        self.emb = TransformerEmbedding(SRC_VOCAB, d_model, MAX_LEN, 0.1)
        self.layers = nn.ModuleList(
            [EncoderLayer(d_model, ffn_hidden, n_head, 0.1) for _ in range(n_layers)]
        )

    def forward(self, x: Tensor, src_mask: Tensor) -> Tensor:
        x = self.emb(x)
        for layer in self.layers:
            x = layer(x, src_mask)
        return x


class Decoder(nn.Module):
    def __init__(self, d_model: int, ffn_hidden: int, n_head: int, n_layers: int) -> None:
        super().__init__()
        self.emb = TransformerEmbedding(TRG_VOCAB, d_model, MAX_LEN, 0.1)
        self.layers = nn.ModuleList(
            [DecoderLayer(d_model, ffn_hidden, n_head, 0.1) for _ in range(n_layers)]
        )
        self.linear = nn.Linear(d_model, TRG_VOCAB)

    def forward(self, trg: Tensor, enc: Tensor, trg_mask: Tensor, src_mask: Tensor) -> Tensor:
        x = self.emb(trg)
        for layer in self.layers:
            x = layer(x, enc, trg_mask, src_mask)
        return self.linear(x)


class Transformer(nn.Module):
    def __init__(
        self, d_model: int = 32, n_head: int = 4, ffn_hidden: int = 64, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.encoder = Encoder(d_model, ffn_hidden, n_head, n_layers)
        self.decoder = Decoder(d_model, ffn_hidden, n_head, n_layers)

    def forward(self, src: Tensor, trg: Tensor) -> Tensor:
        src_mask = self.make_src_mask(src)
        trg_mask = self.make_trg_mask(trg)
        enc_src = self.encoder(src, src_mask)
        return self.decoder(trg, enc_src, trg_mask, src_mask)

    def make_src_mask(self, src: Tensor) -> Tensor:
        return (src != PAD).unsqueeze(1).unsqueeze(2)

    def make_trg_mask(self, trg: Tensor) -> Tensor:
        # As the tutorials have it, this masks the rows of padded queries, not the columns of
        # padded keys; such a row is -10000 throughout, so its softmax is uniform, not NaN.
        trg_pad_mask = (trg != PAD).unsqueeze(1).unsqueeze(3)
        trg_len = trg.shape[1]
        trg_sub_mask = torch.tril(torch.ones(trg_len, trg_len, device=trg.device)).bool()
        return trg_pad_mask & trg_sub_mask


def sentences(batch: int, length: int, seed: int) -> Inputs:
    """Source and target of different lengths, both padded at the end of every second row."""
    src = token_ids(batch, length, seed, SRC_VOCAB, low=2)
    trg = token_ids(batch, length + 2, seed + 1, TRG_VOCAB, low=2)
    src = src.masked_fill(padding_mask(batch, length) == 0, PAD)
    trg = trg.masked_fill(padding_mask(batch, length + 2) == 0, PAD)
    return (src, trg), {}


CASES = [Case("encdec", builder(Transformer), sentences, "post", True, MAX_LEN - 2)]
