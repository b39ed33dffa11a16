"""What capture and the passes did to one model, as data and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lensfx.graph.guards import Guards
from lensfx.graph.ops import is_hook
from lensfx.graph.program import Program, Source
from lensfx.rewrite.rule import PassReport
from lensfx.verify.prove import Equivalence
from lensfx.verify.witness import Witness

__all__ = ["Report"]

WIDTH = 110
MOST = 12


@dataclass(frozen=True)
class Report:
    """`passes` by class name, each with `fired` and `refused`; `equivalence` if it was proved.

    `source` holds capture's notes, `guards` the sizes that stayed free and those that did not,
    `witness` what one run of the example says of the structure.
    """

    passes: Mapping[str, PassReport]
    equivalence: Equivalence | None
    source: Source
    guards: Guards
    operators: int
    parameters: int = 0
    folded: tuple[str, ...] = field(default=())
    outputs: tuple[str, ...] = ()
    witness: Witness | None = None

    @classmethod
    def of(
        cls,
        program: Program,
        equivalence: Equivalence | None = None,
        witness: Witness | None = None,
    ) -> Report:
        """The report of a program."""
        passes: dict[str, PassReport] = {}
        for report in program.reports:
            name = _class_name(report.name)
            passes[name] = _joined(passes[name], report) if name in passes else report
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        return cls(
            MappingProxyType(passes),
            equivalence,
            program.source,
            program.guards,
            sum(not is_hook(n) for n in calls),
            sum(p.numel() for p in program.parameters()),
            tuple(program.formulas),
            program.signature.outputs,
            witness,
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._captured()
        if self.passes:
            yield self._fired()
        yield from self._refusals()
        if self.equivalence is not None:
            yield self._proved(self.equivalence)
        if self.witness is not None and self.witness.checked:
            yield self._witnessed(self.witness)

    def __str__(self) -> str:
        console = Console(width=WIDTH, force_terminal=False, force_jupyter=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__

    def _captured(self) -> Table:
        title = Text(f"captured {self.source.model}")
        table = Table(title=title, title_justify="left", box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row(*_cells("operators", f"{self.operators:,}"))
        table.add_row(*_cells("parameters", f"{self.parameters:,}"))
        free = [f"{a.label} {_range(a.low, a.high)}" for a in self.guards.dynamic]
        table.add_row(*_cells("free sizes", ", ".join(free) or "none"))
        fixed = [f"{a.label} = {a.size}" for a in self.guards.specialised]
        if fixed:
            table.add_row(*_cells("fixed sizes", ", ".join(fixed)))
        for path, why in self.source.opaque.items():
            table.add_row(*_cells("opaque", f"{path}, because of {why}"))
        for note in self.source.notes:
            table.add_row(*_cells("note", note))
        return table

    def _fired(self) -> Table:
        table = Table(title="passes, in order", title_justify="left")
        names = ["pass", "fired", "refused", "contract", "site error", "output error"]
        if self._has_gradients:
            names.append("gradient error")
        for name in names:
            words = name in ("pass", "contract")
            table.add_column(name, justify="left" if words else "right", overflow="fold")
        for name, report in self.passes.items():
            counts = (str(len(report.fired)), str(len(report.refused)))
            table.add_row(*_cells(name, *counts, *self._figures(report.name)))
        return table

    def _figures(self, name: str) -> tuple[str, ...]:
        """Contract and worst errors of a pass; nothing for one that fired nowhere."""
        runs = self.equivalence.passes if self.equivalence is not None else ()
        proofs = [p for p in runs if p.name == name]
        if not proofs:
            return ("",) * (4 if self._has_gradients else 3)
        site = max(p.site_error for p in proofs)
        output = max(p.output_error for p in proofs)
        figures = (proofs[-1].contract.name, f"{site:.1e}", f"{output:.1e}")
        if not self._has_gradients:
            return figures
        slopes = [p.gradient_error for p in proofs if p.gradient_error is not None]
        return (*figures, f"{max(slopes):.1e}" if slopes else "not measured")

    @property
    def _has_gradients(self) -> bool:
        return self.equivalence is not None and self.equivalence.gradient is not None

    def _refusals(self) -> Iterator[Table]:
        rows = [(n, r) for n, report in self.passes.items() for r in report.refused]
        notes = [(n, note) for n, report in self.passes.items() for note in report.notes]
        if not rows and not notes:
            return
        table = Table(title="left alone, and why", title_justify="left")
        for column in ("pass", "where", "reason", "because of"):
            table.add_column(column, overflow="fold")
        for name, refusal in rows[:MOST]:
            at = refusal.path or f"%{refusal.root}"
            table.add_row(*_cells(name, at, refusal.reason, refusal.blame))
        if len(rows) > MOST:
            more = f"and {len(rows) - MOST} more: report.passes[...].refused"
            table.add_row(*_cells("", "", more, ""))
        for name, note in notes:
            table.add_row(*_cells(name, "", note, ""))
        yield table

    def _proved(self, proved: Equivalence) -> Table:
        table = Table(title="equivalence", title_justify="left", box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("worst float64 error", f"{proved.worst:.1e} relative, at any site or output")
        if proved.gradient is not None:
            at = "at any input or parameter"
            table.add_row(
                "worst gradient error", f"{proved.gradient:.1e} relative in float64, {at}"
            )
        table.add_row("drift", f"{proved.drift:.2f} x the model's own rounding noise")
        if self.folded:
            rounding = f"{len(self.folded)} parameters, within {proved.folded:.1f} roundings"
            table.add_row("folded", rounding)
        for shifted in self._shifts():
            table.add_row(*_cells("moved", shifted))
        return table

    def _witnessed(self, witness: Witness) -> Table:
        table = Table(title="structure", title_justify="left", box=None)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("held against numbers", f"{witness.checked:,} claims")
        for name, reason in list(witness.demoted.items())[:MOST]:
            table.add_row(*_cells(f"no {name}", reason))
        return table

    def _shifts(self) -> Iterator[str]:
        """What was allowed to move, and what shows that nothing sees it."""
        for report in self.passes.values():
            for entry in report.fired:
                if entry.shifted:
                    names = ", ".join(self.outputs[k] for k in entry.shifted)
                    yield f"{names} by one number a row, as logits may: {entry.note}"


def _cells(*texts: str) -> Iterator[Text]:
    """The texts as they are: rich would take `x[ids]` in a line of source for markup."""
    return map(Text, texts)


def _joined(first: PassReport, again: PassReport) -> PassReport:
    """What a pass that ran twice did in all; what the second run took up is no refusal."""
    taken = {entry.root for entry in again.fired}
    refused = [r for r in (*first.refused, *again.refused) if r.root not in taken]
    return replace(
        first,
        fired=(*first.fired, *again.fired),
        refused=tuple(dict.fromkeys(refused)),
        notes=again.notes,
    )


def _range(low: int, high: int) -> str:
    return f">= {low}" if high >= 2**40 else f"{low}..{high}"


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))
