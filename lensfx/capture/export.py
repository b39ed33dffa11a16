"""capture: a model and an example call to a Program that computes bitwise what the model does."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lensfx.capture.call import Call, Flat, Seen, kind_of, resized, taken_apart, widenings
from lensfx.capture.check import DisagreementError, Traced, settle_guards
from lensfx.capture.decide import Decision, Decisions, as_if_traced
from lensfx.capture.empty import has_no_weights, materialless
from lensfx.capture.failures import UntraceableError, about_sizes, capture_error, quiet
from lensfx.capture.first_run import first_run
from lensfx.capture.hf import (
    admit,
    cached_calls,
    exporter_patches,
    library_models,
    register_outputs,
)
from lensfx.capture.limits import attention_lengths, index_limits
from lensfx.capture.modes import (
    SizeBranches,
    TooSlowError,
    tracing,
    within,
)
from lensfx.capture.normal_form import normal_form
from lensfx.capture.opaque import OpaqueModules, chosen, failing_module, reason
from lensfx.capture.origin import Origin
from lensfx.capture.prepare import prepared
from lensfx.capture.untouched import seeded, untouched
from lensfx.errors import CaptureError, LensError
from lensfx.graph.choice import OtherPathError
from lensfx.graph.guards import Guards
from lensfx.graph.mode import Mode
from lensfx.graph.node import argument
from lensfx.graph.ops import writes
from lensfx.graph.program import Program, Source
from lensfx.graph.signature import Signature
from lensfx.graph.threads import one_at_a_time

__all__ = ["capture", "recapture"]

# How often a wrong guess of a branch is put right before the model is called untraceable.
_CORRECTIONS = 64
_HUGE = 2**40
# Seconds that a trace may take besides what its calls take, by far.
_PATIENCE = 20.0
_UNBACKED = re.compile(r"\bu\d+\b")


def capture(
    model: nn.Module,
    *args: Any,
    opaque: Sequence[Any] = (),
    strict: bool = False,
    cache: bool = False,
    **kwargs: Any,
) -> Program:
    """The model as a Program in normal form, captured in eval mode on one example call.

    The program's outputs are bitwise the model's and of the same type, its parameters are the
    model's own objects, and every axis the model's code leaves open is dynamic. Where the code
    branches on a value, the path of the example is captured and the value is guarded. The model
    is left exactly as it was. An autocast around this call is part of what is captured.

    A submodule that cannot be traced becomes one opaque operator, and so does every module that
    `opaque` names by type, instance or path; `strict` refuses what `opaque` does not name.

    With `cache`, a model of transformers that generates is captured as a function of a cache of
    keys and values, out of which it returns a longer one: several tokens behind a cache of any
    length, an empty one from `empty_cache` included. The cache given is left as it is.

    Raises: CaptureError naming the user's line if the model rejects the call or cannot be traced.
    """
    model, notes = prepared(model)
    if not isinstance(opaque, (list, tuple, set, frozenset)):
        opaque = (opaque,)
    origin, mode = Origin(model, tuple(opaque), strict), Mode.ambient()
    if not cache:
        return _capture(origin, args, kwargs, mode, notes)
    calls = cached_calls(model, args, kwargs)
    return admit(_capture(origin, (), calls.many, mode, notes), model, calls.trials)


def recapture(
    program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Mode
) -> Program:
    """The model that `program` came from, captured on another call or in another mode.

    Raises: CaptureError as `capture` does, or if the program did not come from a model.
    """
    if program.origin is None:
        raise CaptureError("this program does not know the model it came from")
    return _capture(program.origin, args, kwargs, mode, ())


@one_at_a_time
def _capture(
    origin: Origin,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode,
    notes: tuple[str, ...],
) -> Program:
    model = origin.model
    if not mode.training and any(m.training for m in model.modules()):
        notes += ("the model is in training mode; the program is what it computes in eval mode",)
    register_outputs(model)
    with quiet(), untouched(model, (args, kwargs), mode.training) as restore:
        call = replace(taken_apart(model, args, kwargs, mode), notes=notes)
        call = first_run(model, call, restore)
        return _Capture(origin, call, restore).program()


@dataclass(frozen=True)
class _Way:
    """One way to trace.

    Casts are kept apart, attention goes by one kernel, the model is told that it is compiled (1)
    and that it is exported (2) or not (0), `decide` says what is done about branches on values,
    `patched` takes in what a library knows of its own models, and only the first `free_axes` axes
    of each input are left free.
    """

    fresh_casts: bool = True
    plain_attention: bool = False
    said: int = 2
    decide: str = ""
    patched: bool = False
    free_axes: int | None = None


class _Capture:
    """Tries to trace one call: plainly, along the path it takes, around what cannot be traced."""

    def __init__(self, origin: Origin, call: Call, restore: Callable[[], Any]) -> None:
        self.origin, self.call, self.restore = origin, call, restore
        self.model = origin.model
        self.empty = has_no_weights(origin.model)
        self.opaque: dict[str, str] = {**call.draws, **chosen(self.model, origin.opaque)}
        self._guesses: dict[str, list[Decision] | None] = {}

    def program(self) -> Program:
        """The captured program.

        Raises: CaptureError for what is left when all that can be opaque is.
        """
        if self.opaque and self.empty:
            raise CaptureError(
                f"{next(iter(self.opaque))} cannot stay opaque in a model that has no weights: "
                "nothing shows what it returns",
                hint="capture the model with its weights",
            )
        while True:
            modules = OpaqueModules(self.model, self.opaque)
            if self.opaque:
                self._observe(modules)
            try:
                return self._by_ladder(modules)
            except (UntraceableError, LensError) as error:
                self.restore()
                cause = error.__cause__ or error
                found = failing_module(self.model, cause, tuple(self.opaque))
                found = found or self._blamed(error)
                if found is None or self.origin.strict or self.empty:
                    may = found if self.origin.strict else None
                    raise capture_error(self.model, error, may, self.empty) from error
                self.opaque[found] = reason(cause)

    def _blamed(self, error: Exception) -> str | None:
        """The submodule that an error names, unless it is opaque already."""
        path = getattr(error, "module", "")
        known = path in dict(self.model.named_modules()) and path not in self.opaque
        return path if path and known else None

    def _observe(self, modules: OpaqueModules) -> None:
        """Real runs at several sizes show how the results of opaque modules follow their inputs."""
        for tensors in resized(self.call.example):
            try:
                # Anew for each run: going back to the state before takes out what observes.
                with modules.observing():
                    Flat(self.model, self.call, Seen())([t.clone() for t in tensors])
            except Exception as error:
                if tensors is self.call.example:
                    raise error
            finally:
                self.restore()

    def _by_ladder(self, modules: OpaqueModules) -> Program:
        failures: list[Exception] = []
        for widened in widenings(self.call.example):
            for way in self._ways(failures):
                try:
                    return self._along_path(widened, way, modules)
                except (UntraceableError, LensError) as error:
                    failures.append(error)
                    self.restore()
        raise failures[0]

    def _ways(self, failures: Sequence[Exception]) -> Iterator[_Way]:
        yield _Way()
        plainly = failures[-1]
        if isinstance(plainly, DisagreementError):
            # Code for export may be other arithmetic.
            yield _Way(said=1)
            # For a model that writes into what attention, or a cast, returned.
            yield _Way(plain_attention=True)
            yield _Way(fresh_casts=False, plain_attention=True)
            yield _Way(said=0)
            yield from (_Way(free_axes=free) for free in (1, 0))
        if not isinstance(plainly, UntraceableError):
            return
        cause = plainly.__cause__
        if isinstance(cause, TooSlowError):
            yield _Way(said=1)
        unknown_size = isinstance(cause, GuardOnDataDependentSymNode)
        for decide in () if self.empty else ("defer", "numbers"):
            if self._guess(decide) is not None or (unknown_size and decide == "defer"):
                yield _Way(decide=decide)
        if library_models(self.model):
            yield _Way(patched=True)
        if not unknown_size and about_sizes(cause):
            # A call of other sizes is captured when it comes.
            yield from (_Way(free_axes=free) for free in (2, 1, 0))

    def _guess(self, decide: str) -> list[Decision] | None:
        """What the model's code asks for in a plain run on the example; None if nothing."""
        if decide not in self._guesses:
            log = self._mode(decide, None)
            try:
                with as_if_traced(), seeded(self.model):
                    Flat(self.model, self.call, Seen(), log)([t.clone() for t in self.call.example])
            except Exception:
                # A number that was put off where Python needs one: the other way is for that.
                log.asked = False
            finally:
                self.restore()
            self._guesses[decide] = log.log if log.asked else None
        return self._guesses[decide]

    @staticmethod
    def _mode(decide: str, known: Sequence[Decision] | None) -> Decisions:
        return Decisions(known, defer=decide == "defer", sizes=decide == "numbers")

    def _along_path(
        self, widened: tuple[torch.Tensor, ...], way: _Way, modules: OpaqueModules
    ) -> Program:
        if not way.decide:
            return self._attempt(widened, way, modules, None)
        known = list(self._guess(way.decide) or ())
        for _ in range(_CORRECTIONS):
            decisions = self._mode(way.decide, known)
            try:
                return self._attempt(widened, way, modules, decisions)
            except OtherPathError as error:
                # The values were computed by the very graph that will be run, so this one is right.
                taken = decisions.log[error.index]
                behind = decisions.log[error.index + 1 :]
                right = replace(taken, value=error.value)
                known = [*decisions.log[: error.index], right, *behind]
                self.restore()
        raise CaptureError(
            f"{type(self.model).__name__} branches on values in more than {_CORRECTIONS} ways that "
            "a plain run does not show",
            hint="name the module that does so in opaque=[...]",
        )

    def _attempt(
        self,
        widened: tuple[torch.Tensor, ...],
        way: _Way,
        modules: OpaqueModules,
        decisions: Decisions | None,
    ) -> Program:
        call, seen = self.call, Seen()
        if not call.contiguous:
            # How whole numbers lie in memory matters to code that asks, and to no kernel.
            widened = tuple(t if t.is_floating_point() else t.contiguous() for t in widened)
        exported, branches = self._exported(widened, way, modules, decisions, seen)
        if call.out_spec is None:
            call = call.showing(seen)
        if seen.out_spec != call.out_spec:
            kinds = kind_of(seen.out_spec), kind_of(call.out_spec)
            if kinds[0] == kinds[1]:
                raise CaptureError(
                    "the model returns an object that counts in Python what it has seen, such as "
                    "a cache with a window",
                    hint="leave it out (transformers: use_cache=False)",
                )
            raise CaptureError(
                f"the model returns {kinds[0]} when traced and {kinds[1]} when run",
                hint="let the kind of result not depend on torch.compiler.is_exporting()",
            )
        taken = decisions.log if decisions is not None else ()
        graph, tensors, unread, aliases = normal_form(
            exported, self.model, call.leaves, seen.constants, taken
        )
        full = call.signature
        # A condition on one size is the same wherever that size is 1, so a run there tells.
        guards = _guards(exported, graph, full, branches.conditions(sizes=2))
        written = any(_writes_input(n) for n in graph.nodes)
        layouts = call.contiguous
        if any("stride()" in code for code in exported._guards_code):  # type: ignore[attr-defined]
            layouts = tuple(t.is_contiguous() for t in call.example)
        guards = replace(guards, contiguous=layouts, writes_inputs=written)
        guards = guards.with_limits(index_limits(graph, guards))
        path = _guards(exported, graph, full, branches.conditions())
        kept = {o.path: o.why for o in modules.calls}
        source = Source(type(self.model).__name__, call.notes, unread, aliases, kept)
        parts = (graph, tensors, full, guards, call.example, source)
        program = Program(*parts, origin=self.origin, mode=call.mode)
        return settle_guards(
            program, self.model, Traced(widened, path, self.restore, not self.empty)
        )

    def _exported(
        self,
        widened: tuple[torch.Tensor, ...],
        way: _Way,
        modules: OpaqueModules,
        decisions: Decisions | None,
        seen: Seen,
    ) -> tuple[torch.export.ExportedProgram, SizeBranches]:
        flat = Flat(self.model, self.call, seen, decisions)
        flat.training = False
        # Torch takes a description of no inputs at all for a mistake.
        free = 99 if way.free_axes is None else way.free_axes
        per_input = [{d: Dim.AUTO for d in range(min(t.ndim, free))} for t in widened]
        shapes = (per_input,) if widened else None
        opaque = modules.tracing() if self.opaque else contextlib.nullcontext()
        traced: Any = contextlib.nullcontext(widened)
        if self.empty:
            traced = materialless(self.model, widened)
        decide = decisions.condition if decisions is not None and way.decide == "defer" else None
        way_of = tracing(way.fresh_casts, way.plain_attention, way.said)
        patience = within(_PATIENCE + 0.02 * self.call.calls if way == _Way() else 3600)
        patches = exporter_patches(self.model) if way.patched else contextlib.nullcontext()
        try:
            with (
                traced as given,
                way_of,
                SizeBranches(decide) as branches,
                opaque,
                patches,
                patience,
            ):
                exported = torch.export.export(
                    flat, (list(given),), dynamic_shapes=shapes, strict=False
                )
        except Exception as error:
            raise UntraceableError from error
        self.restore()
        return exported, branches


def _guards(exported: Any, graph: Any, signature: Signature, branches: Sequence[str]) -> Guards:
    ranges = {}
    for symbol, bounds in exported.range_constraints.items():
        ranges[str(symbol)] = (_number(bounds.lower, 0), min(_number(bounds.upper, _HUGE), _HUGE))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    # What is one object with another input has no reader of its own, but the other's sizes.
    placeholders = [inputs[k] for k in signature.same]
    # Sizes that values decide are results of the graph, and guarded as such.
    codes = (*exported._guards_code, *branches, *attention_lengths(graph))
    known = (c for c in codes if "stride()" not in c)
    conditions = [c for c in known if not _UNBACKED.search(c)]
    return Guards.build(placeholders, signature.tensor_names, ranges, conditions)


def _writes_input(node: fx.Node) -> bool:
    targets = (argument(node, name) for name in writes(node) if node.op == "call_function")
    return any(isinstance(t, fx.Node) and t.op == "placeholder" for t in targets)


def _number(bound: Any, otherwise: int) -> int:
    """A bound of torch's as a number; its infinities, of several kinds, are none."""
    try:
        return int(bound)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return otherwise
