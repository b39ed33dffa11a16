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

__all__ = ["Head", "ablated_loss", "induction_scores", "previous_scores", "tell"]

Head = tuple[int, int]
PATTERN, Z = "blocks.{}.attn.hook_pattern", "blocks.{}.attn.hook_z"
THRESHOLD = 0.4


def tell(console: Console, *, batch: int = 64, half: int = 24, seed: int = 7) -> None:
    """Print the whole story; a few seconds on one core."""
    model = load()
    tokens = repeated_tokens(batch, half, vocab=model.config.vocab, seed=seed)
    console.rule("one call: lensfx.wrap(model, tokens)")
    with console.status("capturing, rewriting and proving the model ..."):
        lens = wrap(model, tokens[:2])
    console.print(lens.report)
    console.rule("what it is made of, from its dataflow: lens.structure")
    console.print(str(lens.structure), markup=False, highlight=False, soft_wrap=True)

    console.rule("which heads look for the last time a token was seen?")
    with console.status("reading every attention pattern ..."):
        induction = induction_scores(lens, tokens, model.config.n_layer)
        previous = previous_scores(lens, tokens, model.config.n_layer)
    found = [h for h, score in induction.items() if score > THRESHOLD]
    console.print(_score_table(induction, previous))

    console.rule("what the model loses without them")
    with console.status("switching heads off, one run each ..."):
        table = _loss_table(lens, tokens, induction, found)
    console.print(table)


def induction_scores(lens: Lens, tokens: Tensor, n_layer: int) -> dict[Head, float]:
    """For each (layer, head): mean attention, in the repeat, to the token after the last match.

    `tokens`: [batch, 2 * half], the second half a repeat of the first.
    Source: Olsson et al., In-context Learning and Induction Heads (2022), on prefix matching.
    """
    return _attention(lens, tokens, n_layer, back=tokens.shape[1] // 2 - 1)


def previous_scores(lens: Lens, tokens: Tensor, n_layer: int) -> dict[Head, float]:
    """For each (layer, head): mean attention to the token just before."""
    return _attention(lens, tokens, n_layer, back=1)


def _attention(lens: Lens, tokens: Tensor, n_layer: int, back: int) -> dict[Head, float]:
    """Mean attention of each head from the repeated half to `back` positions earlier."""
    names = [PATTERN.format(layer) for layer in range(n_layer)]
    _, cache = lens.run_with_cache(tokens, names_filter=names)
    half = tokens.shape[1] // 2
    scores = {}
    for layer, name in enumerate(names):
        there = cache[name].diagonal(-back, dim1=-2, dim2=-1)[..., -half:]  # [batch, head, half]
        for head, score in enumerate(there.mean((0, 2)).tolist()):
            scores[layer, head] = score
    return scores


def ablated_loss(lens: Lens, tokens: Tensor, heads: Sequence[Head]) -> float:
    """The loss on the repeated half, in nats, with the output z of these heads set to zero."""
    half = tokens.shape[1] // 2

    def without(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()  # [batch, pos, head, d_head]
        z[:, :, [head for layer, head in heads if layer == hook.layer()]] = 0
        return z

    places = [(Z.format(layer), without) for layer in sorted({layer for layer, _ in heads})]
    with torch.no_grad():
        logits, _ = lens.run_with_hooks(tokens, fwd_hooks=places)
    predicted = logits[:, half:-1].flatten(0, 1)
    return F.cross_entropy(predicted, tokens[:, half + 1 :].flatten()).item()


def _score_table(induction: dict[Head, float], previous: dict[Head, float]) -> Table:
    table = Table(title="mean attention in the repeated half", title_justify="left")
    table.add_column("head")
    table.add_column("to the token after its last occurrence", justify="right")
    table.add_column("to the token just before", justify="right")
    for head, score in induction.items():
        table.add_row(_label(head), _shaded(score), _shaded(previous[head]))
    return table


def _label(head: Head) -> str:
    return f"layer {head[0]}, head {head[1]}"


def _shaded(score: float) -> str:
    return f"[bold green]{score:.2f}[/]" if score > THRESHOLD else f"{score:.2f}"


def _loss_table(
    lens: Lens, tokens: Tensor, induction: dict[Head, float], found: Sequence[Head]
) -> Table:
    table = Table(title="loss on the repeated half", title_justify="left")
    table.add_column("switched off")
    table.add_column("nats", justify="right")
    table.add_column("change", justify="right")
    base = ablated_loss(lens, tokens, [])
    table.add_row("nothing", f"{base:.3f}", "")
    chance = torch.tensor(float(lens.program.tensors["wte.weight"].shape[0])).log().item()
    table.add_row("[dim](guessing)", f"[dim]{chance:.3f}", "", end_section=True)
    best = max(induction, key=lambda head: induction[head])
    others = [h for h in induction if h[0] == best[0] and h != best]
    rows = [(_label(h), [h]) for h in induction]
    rows.append((f"the {len(others)} other heads of layer {best[0]} together", others))
    rows.append((f"all {len(found)} induction heads", list(found)))
    for label, heads in rows:
        loss = ablated_loss(lens, tokens, heads)
        style = "bold green" if set(heads) <= set(found) else ""
        table.add_row(label, f"{loss:.3f}", f"{loss - base:+.3f}", style=style)
    return table
