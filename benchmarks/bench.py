"""What capture and the passes cost, as ratios measured in one run: `make bench`."""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from synthetic import synthetic_program
from torch.export import Dim
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lensfx
from lensfx import passes as p
from lensfx.analysis import structure
from lensfx.rewrite import Pipeline
from lensfx.verify import prove

LAYERS = (2, 12, 48, 96)
PASSES_AT = 12
STRUCTURE_AT = (12, 48, 96)
REWRITE_AT = (2, 12, 48)
# The shape of a 70B model of the Llama kind.
HUGE = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def gpt2(layers: int) -> torch.nn.Module:
    config = GPT2Config(n_layer=layers, n_embd=64, n_head=4, vocab_size=256, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return GPT2LMHeadModel(config).eval()


def llama(layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], runs: int
) -> tuple[float, float, float]:
    """Median seconds of each and the median of the ratios, pair by pair, after one warm-up."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    return mine, other, statistics.median(a / b for a, b in pairs)


def capture_rows(runs: int) -> list[tuple[str, ...]]:
    return [
        row
        for layers in LAYERS
        for name, build in (("GPT-2", gpt2), ("Llama", llama))
        for row in rows_of(f"{name}, {layers} layers", build(layers), layers, runs)
    ]


def rows_of(name: str, model: torch.nn.Module, layers: int, runs: int) -> Iterator[tuple[str, ...]]:
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}

    def bare() -> object:
        return torch.export.export(
            model, (), {"input_ids": ids}, dynamic_shapes=shapes, strict=False
        )

    def captured() -> object:
        return lensfx.capture(model, input_ids=ids)

    def whole() -> object:
        return lensfx.wrap(model, input_ids=ids, verify=False)

    wanted = [("capture", captured, "<= 1.3")]
    if layers == PASSES_AT:
        wanted.append(("capture + five passes", whole, "<= 1.5"))
    for label, ours, goal in wanted:
        mine, other, ratio = interleaved(ours, bare, runs)
        case = f"{name}: {label} / torch.export"
        yield case, f"{mine:.2f} s", f"{other:.2f} s", f"{ratio:.2f}", goal
    program = lensfx.capture(model, input_ids=ids)
    if layers in REWRITE_AT:
        yield from rewriting_rows(name, program, model, captured, runs)
    if layers in STRUCTURE_AT:
        mine, other, ratio = interleaved(lambda: structure(program), captured, runs)
        case = f"{name}: structure / capture"
        yield case, f"{mine:.2f} s", f"{other:.2f} s", f"{ratio:.3f}", "<= 0.2"


def rewriting_rows(
    name: str,
    program: lensfx.Program,
    model: torch.nn.Module,
    captured: Callable[[], object],
    runs: int,
) -> Iterator[tuple[str, ...]]:
    """What is done to a captured program, over what capturing it costs."""
    pipeline = Pipeline.default()
    result = pipeline.run(program)
    tasks: list[tuple[str, Callable[[], object], str]] = [
        ("passes and folding", lambda: pipeline.run(program), "<= 0.5"),
        ("with_weights", lambda: result.with_weights(model.state_dict()), ""),
        ("full proof", lambda: prove(result), ""),
    ]
    for label, ours, goal in tasks:
        mine, other, ratio = interleaved(ours, captured, runs)
        case = f"{name}: {label} / capture"
        yield case, f"{mine:.2f} s", f"{other:.2f} s", f"{ratio:.3f}", goal


def huge() -> None:
    """Print the seconds and the peak memory of capturing a model that has no weights."""
    with lensfx.empty_weights():
        model = LlamaForCausalLM(LlamaConfig(**HUGE, use_cache=False)).eval()
    taken = seconds(lambda: lensfx.capture(model, input_ids=torch.zeros(2, 9, dtype=torch.long)))
    print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def huge_row() -> tuple[str, ...]:
    command = [sys.executable, __file__, "--huge"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    taken, memory = map(float, out.split())
    label = f"capture of a 70B shape, {HUGE['num_hidden_layers']} layers, no weights: memory"
    return label, f"{taken:.0f} s", f"{memory:.2f} GiB", "", "< 4 GiB"


def rewrite_rows() -> list[tuple[str, ...]]:
    pipeline = Pipeline([p.CanonicalLinear(), p.CanonicalNorm(), p.FoldNorm()])
    found = {}
    rows = []
    for size, goal in ((10_000, "< 2 s"), (100_000, "<= 12")):
        program = synthetic_program(size)
        count = len(program.graph.nodes)
        found[size] = seconds(lambda program=program: pipeline.rewrite(program))
        ratio = f"{found[size] / found[10_000]:.1f}" if size > 10_000 else ""
        label = f"match and edit, {count:,} nodes (ratio: over the smaller graph)"
        rows.append((label, f"{found[size]:.2f} s", "", ratio, goal))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--huge", action="store_true", help="the model without weights only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.huge:
        huge()
        return
    console = Console()
    table = Table(title=f"CPU seconds on one thread, torch {torch.__version__}")
    for column in ("what", "lensfx", "reference", "ratio", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    with console.status("exporting and capturing ..."):
        for row in capture_rows(options.runs):
            table.add_row(*row)
    with console.status("capturing without weights ..."):
        table.add_row(*huge_row())
    with console.status("rewriting large graphs ..."):
        for row in rewrite_rows():
            table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
