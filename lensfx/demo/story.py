"""`lensfx demo`: wrap the embedded model, prove it, find its induction heads, switch them off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lensfx.demo import load, repeated_tokens
from lensfx.run import HookPoint, Lens, wrap

__all__ = ["Head", "ablated_loss", "induction_scores", "tell"]

Head = tuple[int, int]
PATTERN, Z = "h.{}.attn.softmax", "h.{}.attn.matmul_1"
THRESHOLD = 0.4


def tell(console: Console, *, batch: int = 64, half: int = 24, seed: int = 7) -> None:
    """Print the whole story; a few seconds on one core."""
    model = load()
    tokens = repeated_tokens(batch, half, vocab=model.config.vocab, seed=seed)
    console.rule("one call: lensfx.wrap(model, tokens)")
    with console.status("capturing, rewriting and proving the model ..."):
        lens = wrap(model, tokens[:2])
    console.print(lens.report)

    console.rule("heads that look for the last time this token was seen")
    with console.status("reading every attention pattern ..."):
        scores = induction_scores(lens, tokens, model.config.n_layer)
    found = [h for h, score in scores.items() if score > THRESHOLD]
    console.print(_score_table(scores, found))

    console.rule("what the model loses without them")
    with console.status("ablating heads ..."):
        table = _loss_table(lens, tokens, found, list(scores))
    console.print(table)


def induction_scores(lens: Lens, tokens: Tensor, n_layer: int) -> dict[Head, float]:
    """For each (layer, head): mean attention, in the repeat, to the token after the last match.

    `tokens`: [batch, 2 * half], the second half a repeat of the first.
    Source: Olsson et al., In-context Learning and Induction Heads (2022), section on prefix
    matching.
    """
    half = tokens.shape[1] // 2
    names = [PATTERN.format(layer) for layer in range(n_layer)]
    _, cache = lens.run_with_cache(tokens, names_filter=names)
    scores = {}
    for layer, name in enumerate(names):
        to_next = cache[name].diagonal(1 - half, dim1=-2, dim2=-1)[..., 1:]  # [batch, head, half]
        for head, score in enumerate(to_next.mean((0, 2)).tolist()):
            scores[layer, head] = score
    return scores


def ablated_loss(lens: Lens, tokens: Tensor, heads: Sequence[Head]) -> float:
    """The loss on the repeated half, in nats, with the output z of these heads set to zero."""
    half = tokens.shape[1] // 2

    def without(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()  # [batch, head, pos, d_head]
        z[:, [head for layer, head in heads if layer == hook.layer()]] = 0
        return z

    places = [(Z.format(layer), without) for layer in sorted({layer for layer, _ in heads})]
    with torch.no_grad():
        logits, _ = lens.run_with_hooks(tokens, fwd_hooks=places)
    predicted = logits[:, half:-1].flatten(0, 1)
    return F.cross_entropy(predicted, tokens[:, half + 1 :].flatten()).item()


def _score_table(scores: dict[Head, float], found: Sequence[Head]) -> Table:
    table = Table(title="induction score: attention to the token after the previous occurrence")
    table.add_column("layer", justify="right")
    heads = sorted({head for _, head in scores})
    for head in heads:
        table.add_column(f"head {head}", justify="right")
    for layer in sorted({layer for layer, _ in scores}):
        row = []
        for head in heads:
            text = f"{scores[layer, head]:.2f}"
            row.append(f"[bold green]{text}[/]" if (layer, head) in found else text)
        table.add_row(str(layer), *row)
    return table


def _loss_table(lens: Lens, tokens: Tensor, found: Sequence[Head], every: Sequence[Head]) -> Table:
    table = Table(title=f"loss on the repeated half, in nats (chance is {_chance(lens):.2f})")
    table.add_column("without")
    table.add_column("loss", justify="right")
    table.add_column("change", justify="right")
    base = ablated_loss(lens, tokens, [])
    table.add_row("nothing", f"{base:.3f}", "")
    rows: list[tuple[str, Sequence[Head]]] = [("the induction heads", found)] if found else []
    layers = {layer for layer, _ in found}
    others = [h for h in every if h not in found and h[0] in layers]
    if others:
        rows.append(("all other heads of the same layer", others))
    rows += [(f"head {head} of layer {layer}", [(layer, head)]) for layer, head in every]
    for label, heads in rows:
        loss = ablated_loss(lens, tokens, heads)
        style = "bold green" if set(heads) <= set(found) else ""
        table.add_row(label, f"{loss:.3f}", f"{loss - base:+.3f}", style=style)
    return table


def _chance(lens: Lens) -> float:
    table = lens.program.tensors["wte.weight"]
    return float(torch.tensor(float(table.shape[0])).log())
