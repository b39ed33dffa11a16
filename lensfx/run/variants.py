"""The programs of one lens: a call off the captured path is captured too, so answers stay right."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from lensfx.analysis import Structure, structure
from lensfx.capture import recapture
from lensfx.capture.untouched import untouched
from lensfx.errors import CaptureError, GuardError, LensError, UnknownNameError
from lensfx.graph.choice import OtherPathError, choices
from lensfx.graph.compiled import effects_until
from lensfx.graph.guards import LimitError, SharedMemoryError
from lensfx.graph.mode import Mode, plain
from lensfx.graph.node import module_path, source_line
from lensfx.graph.opaque import OpaqueError, is_opaque, opaque_of
from lensfx.graph.opaque_call import Call
from lensfx.graph.ops import is_hook, written_tensors
from lensfx.graph.program import Program
from lensfx.graph.threads import one_at_a_time
from lensfx.report.report import Report
from lensfx.rewrite.pipeline import Pipeline
from lensfx.run.axes import Axes
from lensfx.run.names import Names
from lensfx.run.sources import FoldedSources, callers_level
from lensfx.run.specialise import Specialiser
from lensfx.verify.prove import Level, prove
from lensfx.verify.witness import witnessed

__all__ = ["Variant", "Variants", "checked"]

KEPT = 16
PATHS = 8


def checked(program: Program, level: Level = "fast") -> Report:
    """The report of a program with its proof, and its structure held against numbers.

    Modules in it that are run as they stand keep their state.
    """
    with _undisturbed(program):
        proved = prove(program, level=level)
        return Report.of(program, proved, witnessed(program, structure(program)))


@contextlib.contextmanager
def _undisturbed(program: Program) -> Iterator[None]:
    if program.origin is None or not program.source.opaque:
        yield
        return
    with untouched(program.origin.model, (), program.mode.training):
        yield


class Variant:
    """One program of a lens, and what is derived from it."""

    def __init__(
        self,
        program: Program,
        report: Report | None = None,
        own: dict[int, int] | None = None,
    ) -> None:
        self.program = program
        self.report = report if report is not None else Report.of(program)
        demoted = self.report.witness.demoted if self.report.witness is not None else ()
        self.names = Names(program, self.structure.points, demoted)
        self.runs = Specialiser(program, self.names)
        self.sources = FoldedSources(program, own)

    @cached_property
    def structure(self) -> Structure:
        """What the graph of the program shows of the model's structure."""
        return structure(self.program)

    @cached_property
    def axes(self) -> Axes:
        """Which axes of its values are batch and position."""
        return Axes(self.program, self.names)

    def takes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Pass if this call takes the path of the program, as far as no hook changes it.

        Raises: OtherPathError.
        """
        if self._path is None:
            return
        forward, weights = self._path
        back = self._noted(tensors)
        try:
            with torch.no_grad(), plain():
                forward(None, *tensors, *(self.program.tensors[w] for w in weights))
        finally:
            back()

    @contextlib.contextmanager
    def undone_if_refused(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Where an opaque module refuses a call inside, the call leaves no trace."""
        if not self._calls:
            yield
            return
        back = self._noted(tensors)
        try:
            yield
        except OpaqueError:
            back()
            raise

    @cached_property
    def _path(self) -> Any:
        """The part of the graph that decides the path, with all it draws and writes on the way."""
        found = choices(self.program.graph)
        return effects_until(self.program.graph, found[-1]) if found else None

    def _noted(self, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """A function that puts random states and whatever the graph changes back as they are."""
        # A graph writes to its inputs at its end only.
        kept = [(t, t.detach().clone()) for t in self._written]
        everything = [*tensors, *self.program.tensors.values()]
        devices = {t.device for t in everything if t.device.type == "cuda"}
        state = torch.get_rng_state()
        states = [(torch.cuda.get_rng_state(d), d) for d in devices]
        inner = [call.noted(everything) for call in self._calls]

        def back() -> None:
            torch.set_rng_state(state)
            for state_there, device in states:
                torch.cuda.set_rng_state(state_there, device)
            for put_back in inner:
                put_back()
            for tensor, value in kept:
                tensor.detach().copy_(value)

        return back

    @cached_property
    def _written(self) -> list[torch.Tensor]:
        names = written_tensors(self.program.graph)
        return [self.program.tensors[name] for name in names]

    @cached_property
    def _calls(self) -> list[Call]:
        nodes = filter(is_opaque, self.program.graph.nodes)
        return [opaque_of(str(n.args[0])).call for n in nodes]


class Variants:
    """The programs captured so far, the latest `KEPT` of them; the first one is never dropped."""

    def __init__(self, program: Program, report: Report | None) -> None:
        self._own: dict[int, int] = {}
        self.main = Variant(program, report, self._own)
        self._all = [self.main]
        self._origin = program.origin
        self._warned = False

    @property
    def all(self) -> tuple[Variant, ...]:
        """Every variant, the first one first, then those not used for longest."""
        return (self.main, *(v for v in self._all if v is not self.main))

    @one_at_a_time
    def pick(self, args: tuple[Any, ...], kwargs: Any, mode: Mode) -> tuple[Variant, Any]:
        """The variant that is the model on this call, and the call's tensors.

        Captures the call if there is none yet. Raises: GuardError if the model does not take the
        call, or if nothing is known of the model.
        """
        misses: list[GuardError] = []
        for variant in self._latest():
            program = variant.program
            if program.mode != mode:
                continue
            try:
                tensors = program.signature.bind(args, kwargs)
                program.guards.check(tensors)
                # Folded weights may decide the path.
                variant.sources.follow()
                variant.takes(tensors)
            except SharedMemoryError:
                raise
            except GuardError as error:
                misses.append(error)
                continue
            self._used(variant)
            return variant, tensors
        variant = self._captured(args, kwargs, mode, misses)
        return variant, variant.program.signature.bind(args, kwargs)

    @one_at_a_time
    def anew(self, args: tuple[Any, ...], kwargs: Any, mode: Mode) -> tuple[Variant, Any]:
        """A variant captured on this very call, whatever is known already.

        Raises: GuardError as `pick` does.
        """
        variant = self._captured(args, kwargs, mode, ())
        return variant, variant.program.signature.bind(args, kwargs)

    def moved(self, *args: Any, **kwargs: Any) -> Variant:
        """What the first program becomes for a model moved as `torch.nn.Module.to` would move it.

        Raises: CaptureError if the model is not known, cannot be copied or cannot be captured.
        """
        main = self.main.program
        if main.origin is None:
            raise CaptureError("this program does not know the model it came from")
        return self._of(_move(*args, **kwargs), *args, **kwargs)

    def copied(self) -> Variant:
        """The first program, of a copy of the model."""
        return self._of(torch.clone, *self._devices())

    def _devices(self) -> list[torch.device]:
        return [t.device for t in self.main.program.tensors.values()][:1]

    def _of(
        self, move: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Variant:
        main = self.main.program
        origin = main.origin.moved(move, *args, **kwargs)
        example = [move(t) for t in main.example]
        given, named = main.signature.arguments(example)
        program = recapture(replace(main, origin=origin), given, named, main.mode)
        entries = [replace(r.entry, expect=None) for r in main.reports]
        program = Pipeline(entries).run(program)
        report = self._proved(program)
        latest = [item for v in self._all for item in v.sources.written().items()]
        written = {n: move(t.detach()) for n, t in latest}
        with torch.no_grad():
            for name, value in written.items():
                if name in program.tensors:
                    program.tensors[name].copy_(value)
        return Variant(program, report)

    def _proved(self, program: Program) -> Report:
        """The report of a new program, with a proof if the first one has one."""
        known = self.main.report.equivalence
        return Report.of(program) if known is None else checked(program, known.level)

    def trained(self, mode: Mode) -> Variant:
        """The variant of a mode for the call that was wrapped, captured now if there is none."""
        known = next((v for v in self._all if v.program.mode == mode), None)
        if known is None:
            args, kwargs = self.main.program.signature.arguments(self.main.program.example)
            known, _ = self.pick(args, kwargs, mode)
        return known

    def check_name(self, variant: Variant, name: str) -> None:
        """Pass if a hook name means in a variant what it means in the call that was wrapped.

        Native names number the operators of a path, and another path has others.
        Raises: UnknownNameError.
        """
        place, known = variant.names.places.get(name), self.main.names.places.get(name)
        if place is None:
            raise variant.names.unknown(name)
        here = source_line(place.node), place.node.meta.get("stack_trace")
        there = here
        if known is not None:
            there = source_line(known.node), known.node.meta.get("stack_trace")
        if variant is not self.main and not is_hook(place.node) and here != there:
            raise UnknownNameError(
                f"{name!r} is another value on the path of this call",
                at=[f"{here[0]}, on this path", f"{there[0]}, on the path that was wrapped"],
                hint="wrap the model on a call of this path to edit values that only it has",
            )

    def _latest(self) -> list[Variant]:
        return self._all[::-1]

    def _used(self, variant: Variant) -> None:
        if self._all[-1] is not variant:
            self._all.remove(variant)
            self._all.append(variant)

    def _captured(
        self, args: tuple[Any, ...], kwargs: Any, mode: Mode, misses: Sequence[GuardError]
    ) -> Variant:
        main = self.main.program
        if main.origin is None:
            raise (
                misses[0]
                if misses
                else GuardError(
                    f"this program was captured under {main.mode}, and the call is under {mode}",
                    hint="capture the model again in this mode",
                )
            )
        origin = self._without_many_paths(misses)
        try:
            program = recapture(replace(main, origin=origin), args, dict(kwargs), mode)
        except CaptureError as error:
            if limit := next((m for m in misses if isinstance(m, LimitError)), None):
                raise limit from error
            raise GuardError(error.headline, at=error.at, hint=error.hint) from error
        entries = [replace(r.entry, expect=None) for r in main.reports]
        program = Pipeline(entries).run(program)
        report = self._proved(program)
        for variant in self._all:
            variant.sources.follow()
            program = adopted(program, variant.program)
        variant = Variant(program, report, self._own)
        self._all.append(variant)
        self._bound(misses)
        return variant

    def _without_many_paths(self, misses: Sequence[GuardError]) -> Any:
        """The origin, with each module opaque in which too many paths have been taken."""
        sites = [e.site for e in misses if isinstance(e, OtherPathError)]
        for site in {s for s in sites if sites.count(s) >= PATHS}:
            path = next(
                module_path(n)
                for v in self._all
                for n in choices(v.program.graph)
                if n.args[2] == site
            )
            if not path:
                raise GuardError(
                    f"nearly every call takes a path of its own: {PATHS} have been captured",
                    at=site,
                    hint="move that line into a submodule, which can then stay opaque",
                )
            self._origin = replace(self._origin, opaque=(*self._origin.opaque, path))
            taken = [
                v for v in self._all if any(n.args[2] == site for n in choices(v.program.graph))
            ]
            self._all = [v for v in self._all if v not in taken or v is self.main]
        return self._origin

    def _bound(self, misses: Sequence[GuardError]) -> None:
        if len(self._all) <= KEPT:
            return
        oldest = next(v for v in self._all if v is not self.main)
        self._all.remove(oldest)
        if not self._warned and misses:
            self._warned = True
            warnings.warn(
                f"more than {KEPT} kinds of calls have been captured, and old ones are captured "
                f"again when they come back; the last reason was: {misses[-1].headline}",
                stacklevel=callers_level(),
            )


def adopted(program: Program, main: Program) -> Program:
    """The program reading the very parameters of `main` wherever both folded the same formula."""
    tensors = dict(program.tensors)
    for name, formula in program.formulas.items():
        known = main.formulas.get(name)
        if known is not None and (known.text, known.sources) == (formula.text, formula.sources):
            mine = main.tensors[name]
            if (mine.shape, mine.dtype) == (tensors[name].shape, tensors[name].dtype):
                tensors[name] = mine
    return replace(program, tensors=MappingProxyType(tensors))


def _move(*args: Any, **kwargs: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What `Module.to` does to one tensor: devices for all, dtypes for floats only."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise LensError(
            f"a lens cannot be moved to {dtype}", hint="to(torch.float64) or another float"
        )

    def move(tensor: torch.Tensor) -> torch.Tensor:
        floats = tensor.is_floating_point() or tensor.is_complex()
        return tensor.to(device, dtype if floats else None, non_blocking)

    return move
