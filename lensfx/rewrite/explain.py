"""explain: what every pass did, or why it did nothing, at one place of a program."""

from __future__ import annotations

from typing import Any

from lensfx.errors import UnknownNameError
from lensfx.graph.names import native_name
from lensfx.graph.program import Program

__all__ = ["explain"]


def explain(program: Any, place: str) -> str:
    """What each pass did at a node, a hook name or below a module path, one line each.

    `program` is a Program or a Lens.

    Raises: UnknownNameError if no pass met the place and the program has nothing of that name.
    """
    found: Program = getattr(program, "program", program)
    lines = []
    paths = {n.name: native_name(n) for n in found.graph.nodes}
    for report in found.reports:
        for entry in report.fired:
            kept = [paths.get(new, "") for _, new in entry.sites]
            if _about(place, entry.root, entry.path, entry.note, *kept):
                lines.append(f"{report.name} fired: {entry}")
        for refusal in report.refused:
            if _about(place, refusal.root, refusal.path):
                lines.append(f"{report.name} left it alone: {refusal.reason}  ({refusal.blame})")
    if lines:
        return "\n".join(lines)
    known = {n.name for n in found.graph.nodes} | {str(n.target) for n in found.graph.nodes}
    if place in known or any(_about(place, "", p) for p in paths.values()):
        return f"no pass has a rule that meets {place}"
    raise UnknownNameError(f"the program has no node, name or path {place!r}")


def _about(place: str, root: str, *paths: str) -> bool:
    return place.lstrip("%") == root or any(
        path == place or path.startswith(f"{place}.") for path in paths
    )
