"""Capture every causal language model of transformers that can be built tiny; `make zoo`.

Each model comes from its own config class with small sizes put in wherever the class has a field
for them, gets random parameters, is captured, and is run beside its program at two shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils import _pytree as pytree
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import lensfx

SMALL = {
    **dict.fromkeys(("vocab_size",), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
LARGEST = 20_000_000


class TooSlowError(Exception):
    """The time for one model is over."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def build(config_class: Any, model_class: Any) -> torch.nn.Module:
    plain = config_class()
    fields = {k: v for k, v in SMALL.items() if getattr(plain, k, None) is not None}
    config = config_class(**fields)
    config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters even with small sizes")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.05 * noise.to(parameter.dtype)
    return model


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(batch))


def agrees(model: torch.nn.Module, program: lensfx.Program, tokens: torch.Tensor) -> bool:
    a = pytree.tree_leaves(model(input_ids=tokens))
    b = pytree.tree_leaves(program(input_ids=tokens))
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor)]
    return all(torch.equal(x, y) for x, y in pairs)


def row(config_class: Any, model_class: Any) -> tuple[str, str, str, str]:
    name = model_class.__name__
    try:
        with within(60):
            model = build(config_class, model_class)
            model(input_ids=ids(2, 9))
    except Exception as error:
        return name, "not built", "", str(error).splitlines()[0][:90] if str(error) else ""
    start = time.process_time()
    try:
        with within(120):
            program = lensfx.capture(model, input_ids=ids(2, 9))
            taken = f"{time.process_time() - start:.1f}"
            if not agrees(model, program, ids(2, 9)):
                return name, "WRONG", taken, ""
            if program.guards.specialised:
                fixed = ", ".join(a.label for a in program.guards.specialised)
                return name, "specialised", taken, fixed
            return name, "captured" if agrees(model, program, ids(3, 5)) else "WRONG", taken, ""
    except TooSlowError as error:
        return name, "too slow", "", str(error)
    except lensfx.LensError as error:
        return name, "refused", "", error.headline[:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    console = Console()
    table = Table("model", "outcome", "seconds", "why")
    counts: Counter[str] = Counter()
    for config_class, found in track(list(MODEL_FOR_CAUSAL_LM_MAPPING.items()), console=console):
        model_class = found[0] if isinstance(found, tuple) else found
        if options.only.lower() in model_class.__name__.lower():
            with contextlib.redirect_stdout(io.StringIO()):
                result = row(config_class, model_class)
            counts[result[1]] += 1
            table.add_row(*result)
    console.print(table)
    console.print(dict(counts))


if __name__ == "__main__":
    main()
