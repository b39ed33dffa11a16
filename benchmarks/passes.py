"""The default passes on every model class of transformers' auto mappings: fired, refused, equal.

Each class is built tiny with random parameters, captured, rewritten and proved in a process of
its own, as the zoo does it. Results are appended to a file of json lines; the table is written at
the end, or with `--table` alone.
"""

from __future__ import annotations

import re
from collections import Counter
from statistics import median
from typing import Any

import zoo

Record = dict[str, Any]
OUTCOMES = ("broken", "failed", "conditioned", "proved", "not captured", "not built")
COUNTED = OUTCOMES[:4]
MOST = 6


def main() -> None:
    from models.zoo.passed import passed

    zoo.run_over("passes", "passes", passed, page, __doc__, only="causal_lm")


def page(records: list[Record]) -> str:
    """The results as a page: totals, each pass with its commonest refusals, then a row a class."""
    tried = [r for r in records if r["outcome"] in COUNTED]
    lines = [
        "# The default passes",
        "",
        "Model classes of transformers' auto mappings, built tiny from their config classes with",
        "random parameters, captured, put through `Pipeline.default()` and proved in float64.",
        "`proved`: every site and output within 1e-12, relative. `conditioned`: within a hundred",
        "times what one rounding of every weight does to the same value. `broken`: a contract was",
        "broken. Written by `python benchmarks/passes.py`.",
        "",
        *_totals(records),
        "",
        *_passes([r for r in tried if "did" in r]),
        "",
        "| model | task | outcome | site | model | drift | fired and refused | remark |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = sorted(records, key=lambda r: (OUTCOMES.index(r["outcome"]), r["task"], r["name"]))
    return "\n".join([*lines, *map(_row, rows)]) + "\n"


def _totals(records: list[Record]) -> list[str]:
    lines = [
        "| task | captured | proved | conditioned | broken | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(r["task"] for r in records):
        counts = Counter(r["outcome"] for r in records if r["task"] == task)
        total = sum(counts[o] for o in COUNTED)
        cells = [counts[o] for o in ("proved", "conditioned", "broken", "failed")]
        lines.append(f"| {task} | {total} | {' | '.join(map(str, cells))} |")
    return lines


def _passes(tried: list[Record]) -> list[str]:
    if not tried:
        return []
    parts = [r["passes"] / r["seconds"] for r in tried]
    proofs = [r["proof"] / r["seconds"] for r in tried if "proof" in r]
    lines = [
        f"Passes and folding take {median(parts):.2f} of the time of capture in the middle, "
        f"{max(parts):.2f} at most; the proof {median(proofs):.2f}.",
        "",
        "| pass | models where it fired | sites | refused | commonest reasons |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(n for r in tried for n in r["did"]):
        did = [r["did"][name] for r in tried if name in r["did"]]
        reasons: Counter[str] = Counter()
        for _, _, found in did:
            reasons.update({_generic(k): v for k, v in found.items()})
        words = "; ".join(f"{k} ({v})" for k, v in reasons.most_common(MOST)).replace("|", "/")
        fired, refused = sum(d[0] for d in did), sum(d[1] for d in did)
        lines.append(f"| {name} | {sum(d[0] > 0 for d in did)} | {fired} | {refused} | {words} |")
    return lines


def _generic(reason: str) -> str:
    """A reason without the names of nodes, so that alike ones are counted together."""
    named = re.sub(r"%(\w+?)(_default)?(_\d+)?\b", r"%\1", reason)
    return re.sub(r"\bchannels \d+ and \d+\b|\baxis \d+\b", lambda m: m[0].split()[0], named)


def _row(record: Record) -> str:
    did = record.get("did", {})
    cells = (
        record["name"],
        record["task"],
        record["outcome"],
        f"{record['site']:.0e}" if "site" in record else "",
        f"{record['model']:.0e}" if "model" in record else "",
        f"{record['drift']:.1f}" if "drift" in record else "",
        ", ".join(f"{name} {d[0]}/{d[1]}" for name, d in did.items()),
        " ".join(record.get("why", "").replace("|", "/").split())[:200],
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
