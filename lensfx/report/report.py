"""What capture and the passes did to one model, as data and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lensfx.graph.guards import Guards
from lensfx.graph.program import Program, Source
from lensfx.rewrite.rule import PassReport
from lensfx.verify.prove import Equivalence

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """`passes` by class name, each with `fired` and `refused`; `equivalence` if it was proved.

    `source` holds capture's notes, `guards` the sizes that stayed free and those that did not.
    """

    passes: Mapping[str, PassReport]
    equivalence: Equivalence | None
    source: Source
    guards: Guards
    operators: int
    parameters: int = 0
    folded: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, program: Program, equivalence: Equivalence | None = None) -> Report:
        """The report of a program."""
        passes = {_class_name(r.name): r for r in program.reports}
        return cls(
            MappingProxyType(passes),
            equivalence,
            program.source,
            program.guards,
            sum(n.op == "call_function" for n in program.graph.nodes),
            sum(p.numel() for p in program.parameters()),
            tuple(program.formulas),
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._captured()
        if self.passes:
            yield self._fired()
        yield from self._refusals()
        if self.equivalence is not None:
            yield self._proved(self.equivalence)

    def __str__(self) -> str:
        console = Console(width=110, force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__

    def _captured(self) -> Table:
        table = Table(title=f"captured {self.source.model}", title_justify="left", box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("operators", f"{self.operators:,}")
        table.add_row("parameters", f"{self.parameters:,}")
        free = [f"{a.label} {_range(a.low, a.high)}" for a in self.guards.dynamic]
        table.add_row("free sizes", ", ".join(free) or "none")
        fixed = [f"{a.label} = {a.size}" for a in self.guards.specialised]
        if fixed:
            table.add_row("fixed sizes", ", ".join(fixed))
        for note in self.source.notes:
            table.add_row("note", note)
        return table

    def _fired(self) -> Table:
        table = Table(title="passes, in order", title_justify="left")
        for name in ("pass", "fired", "refused", "contract", "site error", "output error"):
            table.add_column(name, justify="left" if name in ("pass", "contract") else "right")
        proofs = {p.name: p for p in self.equivalence.passes} if self.equivalence else {}
        for name, report in self.passes.items():
            proof = proofs.get(report.name)
            figures = ("", "", "")
            if proof is not None:
                site, output = f"{proof.site_error:.1e}", f"{proof.output_error:.1e}"
                figures = (proof.contract.name, site, output)
            table.add_row(name, str(len(report.fired)), str(len(report.refused)), *figures)
        return table

    def _refusals(self) -> Iterator[Table]:
        rows = [(n, r) for n, report in self.passes.items() for r in report.refused]
        notes = [(n, note) for n, report in self.passes.items() for note in report.notes]
        if not rows and not notes:
            return
        table = Table(title="left alone, and why", title_justify="left")
        for column in ("pass", "where", "reason", "because of"):
            table.add_column(column, overflow="fold")
        for name, refusal in rows[:MOST]:
            table.add_row(name, refusal.path or f"%{refusal.root}", refusal.reason, refusal.blame)
        if len(rows) > MOST:
            table.add_row("", "", f"and {len(rows) - MOST} more: report.passes[...].refused", "")
        for name, note in notes:
            table.add_row(name, "", note, "")
        yield table

    def _proved(self, proved: Equivalence) -> Table:
        table = Table(title="equivalence", title_justify="left", box=None)
        table.add_column(style="dim")
        table.add_column()
        table.add_row("worst float64 error", f"{proved.worst:.1e} relative, at any site or output")
        table.add_row("drift", f"{proved.drift:.2f} x the model's own rounding noise")
        if self.folded:
            rounding = f"{len(self.folded)} parameters, within {proved.folded:.1f} roundings"
            table.add_row("folded", rounding)
        return table


MOST = 12


def _range(low: int, high: int) -> str:
    return f">= {low}" if high >= 2**40 else f"{low}..{high}"


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))
