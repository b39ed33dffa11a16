"""explain: what every pass did, or why it did nothing, at one place of a program."""

from __future__ import annotations

import difflib
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
    graphs = [*(stage.graph for stage in found.stages), found.graph]
    natives = {n.name: native_name(n) for graph in graphs for n in graph.nodes}
    lines = []
    for report in found.reports:
        for entry in report.fired:
            met = [natives.get(name, "") for name in (entry.root, *(new for _, new in entry.sites))]
            if _about(place, entry.root, entry.path, entry.note, *met):
                lines.append(f"{report.name} fired: {entry}")
        for refusal in report.refused:
            if _about(place, refusal.root, refusal.path, natives.get(refusal.root, "")):
                lines.append(f"{report.name} left it alone: {refusal.reason}  ({refusal.blame})")
    if lines:
        return "\n".join(lines)
    known = {n.name for n in found.graph.nodes} | {str(n.target) for n in found.graph.nodes}
    paths = {*getattr(program, "hook_names", ()), *natives.values()} - {""}
    if place.lstrip("%") in known or any(_about(place, path, path) for path in paths):
        return f"no pass has a rule that meets {place}"
    near = difflib.get_close_matches(place, sorted(known | paths), n=4, cutoff=0.4)
    raise UnknownNameError(
        f"the program has no node, name or path {place!r}",
        hint=f"the nearest are {', '.join(near)}" if near else "look at lens.hook_names",
    )


def _about(place: str, root: str, *paths: str) -> bool:
    return place.lstrip("%") == root or any(
        bool(path) and (path == place or path.startswith(f"{place}.")) for path in paths
    )
