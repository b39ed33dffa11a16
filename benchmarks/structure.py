"""What is found in every model class of transformers' auto mappings, beside what its config says.

Each class is built tiny with random parameters and captured in a process of its own, as the zoo
does it, and its structure is compared with facts from its config, as captured and in canonical
form. Results are appended to a file of json lines; the table is written at the end, or with
`--table` alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import zoo

Record = dict[str, Any]
OUTCOMES = ("wrong", "failed", "unknown", "complete", "not captured", "not built")
COUNTED = OUTCOMES[:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="causal_lm", help="tasks or parts of class names")
    parser.add_argument("--results", type=Path, default=zoo.ROOT / ".zoo" / "structure.jsonl")
    parser.add_argument("--docs", type=Path, default=zoo.ROOT / "docs" / "structure.md")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=120, help="the time limit of one model")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.results.parent.exists():
        options.results.parent.mkdir(parents=True)
        (options.results.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    if not options.table:
        from models.zoo.score import scored

        zoo.drive(zoo.chosen(options), options, scored)
    options.docs.parent.mkdir(parents=True, exist_ok=True)
    options.docs.write_text(page(zoo.read(options.results)), encoding="utf-8")


def page(records: list[Record]) -> str:
    """The results as a page: totals, then a row for each class, what is not complete first."""
    tried = [r for r in records if r["outcome"] in COUNTED]
    lines = [
        "# Structure",
        "",
        "Model classes of transformers' auto mappings, built tiny from their config classes with",
        "random parameters and captured. `complete`: blocks, attention, heads, key/value heads,",
        "norms, token table and unembedding are found and as the config says, in the captured",
        "program and in canonical form. `unknown`: something is said to be unknown or is missing.",
        "`wrong`: something contradicts the config. Written by `python benchmarks/structure.py`.",
        "",
        *_totals(records),
        "",
        *_times(tried),
        "",
        "| model | task | outcome | layers | blocks | a block is | ms | remark |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = sorted(records, key=lambda r: (OUTCOMES.index(r["outcome"]), r["task"], r["name"]))
    return "\n".join([*lines, *map(_row, rows)]) + "\n"


def _totals(records: list[Record]) -> list[str]:
    lines = ["| task | captured | complete | unknown | wrong |", "| --- | --- | --- | --- | --- |"]
    for task in dict.fromkeys(r["task"] for r in records):
        counts = Counter(r["outcome"] for r in records if r["task"] == task)
        total = sum(counts[o] for o in COUNTED)
        share = f" ({counts['complete'] / total:.1%})" if total else ""
        bad = counts["wrong"] + counts["failed"]
        lines.append(
            f"| {task} | {total} | {counts['complete']}{share} | {counts['unknown']} | {bad} |"
        )
    return lines


def _times(tried: list[Record]) -> list[str]:
    timed = [r for r in tried if "structure" in r]
    if not timed:
        return []
    parts = [r["structure"] / r["seconds"] for r in timed]
    worst = max(timed, key=lambda r: r["structure"])
    return [
        f"Finding it takes {median(r['structure'] for r in timed) * 1e3:.0f} ms in the middle and "
        f"{worst['structure'] * 1e3:.0f} ms at most ({worst['name']}, {worst['nodes']} nodes): "
        f"{median(parts):.1%} of the time of capture."
    ]


def _row(record: Record) -> str:
    cells = (
        record["name"],
        record["task"],
        record["outcome"],
        str(record.get("layers", "")),
        str(record.get("blocks", "")),
        record.get("kinds", ""),
        f"{record['structure'] * 1e3:.0f}" if "structure" in record else "",
        " ".join(record.get("why", "").replace("|", "/").split())[:200],
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
