"""What is found in every model class of transformers' auto mappings, beside what its config says.

Each class is built tiny with random parameters and captured in a process of its own, as the zoo
does it, and its structure is compared with facts from its config, as captured and in canonical
form. Results are appended to a file of json lines; the table is written at the end, or with
`--table` alone.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

import zoo

Record = dict[str, Any]
OUTCOMES = ("wrong", "failed", "unknown", "complete", "not captured", "not built")
COUNTED = OUTCOMES[:4]


def main() -> None:
    from models.zoo.score import scored

    zoo.run_over("structure", "structure", scored, page, __doc__, only="causal_lm")


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
