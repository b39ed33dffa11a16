"""Capture every model class of transformers' auto mappings that can be built tiny; `make zoo`.

Each class runs in a process of its own with a limit on time and memory. Results are appended to
a file of json lines as they come, and a class that is in the file already is not run again, so
that a run can be stopped and taken up. The table is written at the end, or with `--table` alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
# The models that tests are run on live with the tests.
sys.path.insert(0, str(ROOT / "tests"))

MEMORY = 8 << 30
GRACE = 20
Record = dict[str, Any]
Trial = Callable[[Any], Iterable[Record]]


def main() -> None:
    from models.zoo.trial import trial

    run_over("results", "zoo", trial, page, __doc__)


def run_over(
    results: str,
    docs: str,
    trial: Trial,
    page: Callable[[list[Record]], str],
    about: str | None,
    only: str = "",
) -> None:
    """Try the classes that the command line names, and write the page of all results so far."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else "")
    parser.add_argument("--only", default=only, help="tasks or parts of class names, with commas")
    parser.add_argument("--results", type=Path, default=ROOT / ".zoo" / f"{results}.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / f"{docs}.md")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=120, help="the time limit of one model")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.results.parent.exists():
        options.results.parent.mkdir(parents=True)
        (options.results.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    if not options.table:
        drive(chosen(options), options, trial)
    options.docs.parent.mkdir(parents=True, exist_ok=True)
    options.docs.write_text(page(read(options.results)), encoding="utf-8")


def chosen(options: argparse.Namespace) -> list[Any]:
    """The architectures that were asked for and have no result yet."""
    from models.zoo import architectures

    done = {record["name"] for record in read(options.results)}
    wanted = options.only.lower().split(",")
    return [
        a
        for a in architectures()
        if a.class_name not in done
        and any(w == a.task or (w != "" and w in a.class_name.lower()) or not w for w in wanted)
    ]


def drive(waiting: list[Any], options: argparse.Namespace, trial: Trial) -> None:
    """Run each architecture in a child process, so many at a time."""
    running: dict[int, tuple[Any, float]] = {}
    waiting.reverse()
    while waiting or running:
        while waiting and len(running) < options.processes:
            architecture = waiting.pop()
            running[start(architecture, options, trial)] = (architecture, time.monotonic())
        time.sleep(0.05)
        for child, (architecture, since) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            taken = time.monotonic() - since
            if ended:
                del running[child]
                if os.WIFSIGNALED(status):
                    killed(architecture, os.WTERMSIG(status), options.results)
                print(f"{len(waiting)} left  {architecture.class_name}", flush=True)
            elif taken > options.seconds:
                # Native code does not heed a signal that Python would have to handle.
                late = taken > options.seconds + GRACE
                os.kill(child, signal.SIGKILL if late else signal.SIGTERM)


def start(architecture: Any, options: argparse.Namespace, trial: Trial) -> int:
    """Start a child that tries one architecture; its process id."""
    child = os.fork()
    if child == 0:
        try:
            run(architecture, options.results, trial)
        finally:
            os._exit(1)
    return child


def run(architecture: Any, results: Path, trial: Trial) -> None:
    """Try one architecture and append the last record that it came to."""
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    last: Record = {}

    def stop(*_: object) -> None:
        append(results, last)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    for record in trial(architecture):
        last = record
    stop()


def killed(architecture: Any, number: int, results: Path) -> None:
    """Note that a child died without a word."""
    record = {"name": architecture.class_name, "task": architecture.task, "outcome": "failed"}
    append(results, {**record, "why": f"killed by {signal.Signals(number).name}"})


def append(results: Path, record: Record) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(results: Path) -> list[Record]:
    """The records of a results file."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def page(records: list[Record]) -> str:
    """The results as a page: totals, then what went wrong, then a row for each architecture."""
    built = [r for r in records if r["outcome"] != "not built"]
    good = [r for r in built if r["outcome"] == "captured"]
    share = f"{len(good) / len(built):.1%}" if built else "none"
    bitwise = sum(r.get("gradients") == "bitwise" for r in good)
    free = sum(r.get("other_shape") == "bitwise" for r in good)
    lines = [
        "# The zoo",
        "",
        "Model classes of transformers' auto mappings, built tiny from their config classes with",
        "random parameters, captured, and run beside their programs. Written by `make zoo`.",
        "",
        f"{len(records)} tried, {len(built)} built, {len(good)} captured bitwise: **{share}**. "
        f"Gradients bitwise in {bitwise}; bitwise at a second batch and length in {free}.",
        "",
        *_totals(built),
        "",
        "## Architectures",
        "",
        "| model | task | outcome | gradients | second shape | seconds | nodes | remark |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = {"wrong": 0, "failed": 1, "refused": 2, "captured": 3, "not built": 4}
    rows = sorted(records, key=lambda r: (order[r["outcome"]], r["task"], r["name"]))
    return "\n".join([*lines, *map(_row, rows)]) + "\n"


def _totals(built: list[Record]) -> list[str]:
    counts = Counter(r["task"] for r in built)
    good = Counter(r["task"] for r in built if r["outcome"] == "captured")
    lines = ["| task | built | captured |", "| --- | --- | --- |"]
    return [*lines, *(f"| {task} | {n} | {good[task]} |" for task, n in counts.most_common())]


def _row(record: Record) -> str:
    seconds = f"{record['seconds']:.1f}" if "seconds" in record else ""
    other = record.get("other_shape", "")
    cells = (
        record["name"],
        record["task"],
        record["outcome"],
        record.get("gradients", ""),
        other if other in ("", "bitwise") else "no",
        seconds,
        str(record.get("nodes", "")),
        _remark(record),
    )
    return f"| {' | '.join(cells)} |"


def _remark(record: Record) -> str:
    at = record.get("at", "")
    said = [record.get("why", ""), at if isinstance(at, str) else "; ".join(at)]
    other = record.get("other_shape", "")
    said.append(other if other != "bitwise" else "")
    text = ". ".join(part for part in said if part)
    return " ".join(text.replace("|", "/").split())[:240]


if __name__ == "__main__":
    main()
