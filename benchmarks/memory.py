"""What folding and new weights cost in memory, as shares of the weights: one fresh process each."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lensfx
from lensfx.rewrite import Pipeline

# Layers and widths of models like GPT-2; the vocabulary makes the tied table a large tensor.
SIZES = {150: (8, 512, 24_000), 500: (12, 768, 50_257)}
WANTED = {"folding": 0.35, "from a dict": 0.35, "from a file": 0.35}


def model(megabytes: int, seed: int) -> GPT2LMHeadModel:
    """A random model of about this size in float32."""
    layers, width, vocabulary = SIZES[megabytes]
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_layer": layers, "n_embd": width, "n_head": 8, "vocab_size": vocabulary}
    config = GPT2Config(**sizes, **ends, use_cache=False)
    torch.manual_seed(seed)
    made = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return made


def status(field: str) -> int:
    """Bytes of this process: VmRSS what is in memory now, VmHWM the most that was."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is in use now, without what was freed before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def weight_bytes(tensors: dict[int, torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def new_bytes(program: lensfx.Program, old: lensfx.Program) -> int:
    """What the tensors of a program take that the other one does not hold."""
    held = {t.data_ptr() for t in old.tensors.values()}
    own = {t.data_ptr(): t for t in program.tensors.values() if t.data_ptr() not in held}
    return weight_bytes(own)


def measured(what: str, megabytes: int) -> dict[str, float]:
    """Peak above what is kept, and kept above the tensors of the result, over the weights."""
    ids = torch.zeros(2, 9, dtype=torch.long)
    first = model(megabytes, 0)
    program = lensfx.capture(first, input_ids=ids)
    # Once beforehand, so that what is imported on the way is not counted.
    Pipeline.default().rewrite(program)
    total = sum(p.numel() * p.element_size() for p in first.parameters())
    run: Callable[[], lensfx.Program]
    if what == "folding":
        old = program

        def run() -> lensfx.Program:
            return Pipeline.default().run(program)

    else:
        old = Pipeline.default().run(program)
        state = state_of(megabytes)
        if what == "from a dict":

            def run() -> lensfx.Program:
                return old.with_weights(state)

        else:
            folder = tempfile.TemporaryDirectory()
            path = Path(folder.name) / "model.safetensors"
            save_file(state, path)
            state.clear()

            def run() -> lensfx.Program:
                return old.with_weights(path)

    forget_peak()
    before, start = status("VmRSS"), time.perf_counter()
    made = run()
    seconds = time.perf_counter() - start
    most = status("VmHWM")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    now = status("VmRSS")
    return {
        "weights": total / 1e6,
        "peak": (most - now) / total,
        "kept": (now - before) / total,
        "result": new_bytes(made, old) / total,
        "seconds": seconds,
    }


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    state = dict(model(megabytes, 1).state_dict())
    del state["lm_head.weight"]
    return state


def fresh(what: str, megabytes: int) -> dict[str, float]:
    """The same, measured in a process of its own."""
    command = [sys.executable, __file__, "--size", str(megabytes), "--what", what]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=SIZES, default=500)
    parser.add_argument("--what", choices=WANTED, help="measure one, here, and print it as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what:
        print(json.dumps(measured(options.what, options.size)))
        return
    table = Table(title=f"memory over the weights, torch {torch.__version__}")
    for column in ("what", "weights", "peak over kept", "goal", "kept", "its new tensors", "time"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, goal in WANTED.items():
        found = fresh(what, options.size)
        row = (f"{found['weights']:.0f} MB", f"{found['peak']:.3f}", f"<= {goal}")
        rest = (f"{found['kept']:.3f}", f"{found['result']:.3f}", f"{found['seconds']:.1f} s")
        table.add_row(what, *row, *rest)
    Console().print(table)


if __name__ == "__main__":
    main()
