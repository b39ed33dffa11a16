"""Train the small induction model that comes with lensfx.

    python examples/train_induction.py --out induction.safetensors

The defaults reproduce `lensfx/demo/induction.safetensors`, in a few minutes on one core. To use
another result: `lensfx.demo.load("induction.safetensors")`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lensfx.demo import InductionConfig, InductionTransformer, repeated_tokens
from lensfx.demo.model import CausalSelfAttention

BATCH = 64
SHORTEST = 8
LEARNING_RATE = 5e-3
WARMUP = 100
WEIGHT_DECAY = 0.1
FORMED = 0.6
SETTLE = 1400
PENALTY = 1e-2
PENALTY_RAMP = 500
EVAL_EVERY = 100
HELD_OUT_SEED = 1_000_000


def training_batch(config: InductionConfig, generator: torch.Generator) -> Tensor:
    """Return sequences that repeat a random stretch of their own, `[batch, n_ctx]`.

    Every row has its own stretch length, and a quarter of the rows some other tokens in front of
    it. With one fixed length the model could look back by a fixed number of positions and would
    never need to match tokens.
    """
    n_ctx = config.n_ctx
    length = torch.randint(SHORTEST, n_ctx // 2 + 1, (BATCH, 1), generator=generator)
    room = n_ctx - 2 * length + 1
    start = (torch.rand(BATCH, 1, generator=generator) * room).long()
    start = start * (torch.randint(4, (BATCH, 1), generator=generator) == 0)
    tokens = torch.randint(config.vocab, (BATCH, n_ctx), generator=generator)
    position = torch.arange(n_ctx)
    source = torch.where(position < start, position, start + (position - start) % length)
    return tokens.gather(1, source)


@torch.no_grad()
def held_out_losses(model: InductionTransformer) -> tuple[float, float]:
    """Return the mean loss in nats on the first and on the repeated half of held-out sequences.

    Averaged over several lengths of the half, so that a model that handles only one of them
    does not pass. The first repeated token is left out: nothing announces it.
    """
    first, second = [], []
    for half in range(SHORTEST, model.config.n_ctx // 2 + 1, SHORTEST):
        tokens = repeated_tokens(256, half, vocab=model.config.vocab, seed=HELD_OUT_SEED + half)
        logits, _ = model(tokens[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        first.append(losses[:, : half - 1].mean())
        second.append(losses[:, half:].mean())
    return torch.stack(first).mean().item(), torch.stack(second).mean().item()


def head_sizes(model: InductionTransformer) -> Tensor:
    """Return the norm of each last-layer head's value and output weights, `[head]`."""
    attn = model.h[-1].attn
    assert isinstance(attn, CausalSelfAttention)
    value = attn.qkv.weight[2 * attn.d_model :].view(attn.n_head, attn.d_head, attn.d_model)
    output = attn.proj.weight.view(attn.d_model, attn.n_head, attn.d_head)
    return (value.square().sum((1, 2)) + output.square().sum((0, 2))).sqrt()


def train(steps: int, seed: int, console: Console) -> InductionTransformer:
    """Return a trained model, in eval mode.

    The first phase lasts until induction has formed. The second, of fixed length, lowers the
    learning rate and brings in a penalty on the size of each last-layer head. Without it all of
    these heads become induction heads and stand in for one another, so that no single one
    matters; with it from the start, none of them would form.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = InductionConfig()
    model = InductionTransformer(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    formed_at: int | None = None

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("waiting for induction", total=steps)
        for step in range(steps):
            settled = 0 if formed_at is None else step - formed_at
            warm = min(1.0, (step + 1) / WARMUP)
            decay = 0.55 + 0.45 * math.cos(math.pi * settled / SETTLE)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warm * decay

            tokens = training_batch(config, generator)
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            penalty = PENALTY * min(1.0, settled / PENALTY_RAMP) * head_sizes(model).sum()
            optimizer.zero_grad()
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.advance(task)

            done = step + 1
            if done % EVAL_EVERY == 0:
                first, second = held_out_losses(model)
                sizes = " ".join(f"{size:.2f}" for size in head_sizes(model).tolist())
                progress.console.print(
                    f"step {done:4d}  first half {first:.3f}  second half {second:.3f}"
                    f"  heads {sizes}",
                    highlight=False,
                )
                if formed_at is None and second < FORMED:
                    formed_at = done
                    progress.update(task, description="settling", total=min(steps, done + SETTLE))
            if formed_at is not None and done == formed_at + SETTLE:
                break
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small induction model of lensfx.")
    parser.add_argument("--steps", type=int, default=4000, help="at most this many (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("induction.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # The order of a sum depends on how many threads share it, and so would the saved weights.
    torch.set_num_threads(1)
    console = Console()
    model = train(arguments.steps, arguments.seed, console)

    _, second = held_out_losses(model)
    if second >= FORMED:
        raise SystemExit(f"no induction after {arguments.steps} steps: loss {second:.3f}")
    # A single key, because safetensors does not keep several in a fixed order.
    metadata = {"config": json.dumps(asdict(model.config), sort_keys=True)}
    save_file(model.state_dict(), arguments.out, metadata=metadata)
    console.print(f"second-half loss {second:.3f}, saved to {arguments.out}", highlight=False)


if __name__ == "__main__":
    main()
