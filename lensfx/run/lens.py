"""Lens: a program that can be run, read and edited by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import networkx as nx
import torch
from torch import fx, nn

from lensfx.analysis import Structure, component_graph
from lensfx.graph.choice import OtherPathError
from lensfx.graph.mode import Mode, plain
from lensfx.graph.network import to_networkx
from lensfx.graph.opaque import OpaqueError
from lensfx.graph.program import Program
from lensfx.report.report import Report
from lensfx.rewrite.pipeline import Pipeline
from lensfx.run.cache import ActivationCache
from lensfx.run.hooks import HookFunction
from lensfx.run.module import as_module
from lensfx.run.names import NameFilter, Place
from lensfx.run.protocol import Protocol
from lensfx.run.raw import Both, Call, Kind, Maps, captured
from lensfx.run.reading import collector, kept, path_changed, scalar, stop_name
from lensfx.run.registry import Registry, pairs
from lensfx.run.specialise import Request
from lensfx.run.variants import Variant, Variants

__all__ = ["Lens"]

T = TypeVar("T")
Hooks = Sequence[tuple[NameFilter, HookFunction]]


class Lens(Protocol):
    """A wrapped model: call it as the model, read and edit any value by its hook name.

    `program` is the rewritten graph, `report` what the passes did and how equal the result is.
    """

    def __init__(self, program: Program, report: Report | None = None) -> None:
        self._start(program, report)
        self._hooks = Registry(self._names)
        self.training = program.mode.training

    def _start(self, program: Program, report: Report | None) -> None:
        self._variants = Variants(program, report)
        self._names = self._variants.main.names
        self._raw: Lens | None = None
        self._both: Both | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Lens:
        """A lens of a copy of the model, with parameters of its own and no hooks."""
        if self.program.origin is None:
            lens = Lens(copy.deepcopy(self.program, memo), self.report)
        else:
            copied = self._variants.copied()
            lens = Lens(copied.program, copied.report)
        lens.tokenizer = self.tokenizer
        return lens

    @property
    def program(self) -> Program:
        """The rewritten program of the call that was wrapped, its folded weights up to date."""
        self._variants.main.sources.follow()
        return self._variants.main.program

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every program captured so far: one for each mode, path and kind of call that was met."""
        return tuple(v.program for v in self._variants.all)

    @property
    def structure(self) -> Structure:
        """The stream, blocks, attention, MLPs and embeddings found; prints as a tree."""
        return self._variants.main.structure

    @property
    def report(self) -> Report:
        """What capture and the passes did, for the call that was wrapped."""
        return self._variants.main.report

    @property
    def raw(self) -> Lens:
        """The model as it was before any pass, with the same hook names and the same parameters.

        A lens that no pass changed is its own.
        """
        if not any(entry.changes or entry.sites for entry in self.program.journal):
            return self
        if self._raw is None:
            hooks = Pipeline(Pipeline.default().passes[-1:])
            self._raw = Lens(hooks.run(captured(self.program)))
        return self._raw

    def to_raw(self, name: str, x: torch.Tensor, *, kind: Kind = "value") -> torch.Tensor:
        """A value at a hook point as it would be in the model before any pass, of the same shape.

        `kind="direction"` maps a difference of values, and `"probe"` a vector whose product with
        the value is read: then only scales and rotations count. Computed in float64.

        Raises: UnknownNameError, and LensError where a pass took off what the value does not tell.
        """
        maps, place = self._maps(name)
        return maps.to_raw(name, place, x, kind)

    def from_raw(
        self, name: str, direction: torch.Tensor, *, kind: Kind = "direction"
    ) -> torch.Tensor:
        """A direction that was found in the model before any pass, as it is at this hook point.

        The other way round than `to_raw`; `kind="value"` maps whole values, `"probe"` readers.

        Raises: UnknownNameError, and LensError where a pass cannot be undone.
        """
        maps, place = self._maps(name)
        return maps.from_raw(name, place, direction, kind)

    def _maps(self, name: str) -> tuple[Maps, Place]:
        place = self._names.places[self._names.resolve([name])[0]]
        maps = Maps(self.program)
        if self.raw is not self:
            self._both = self._both or Both(Lens(self.program), self.raw, self.program)
            self._both.check(name, place, maps)
        return maps, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns on this call, of the same type, under the hooks now attached.

        A call that is off the captured path is captured too, with the same passes and the same
        folded weights. Hooks before a module that stays opaque are called again where it does
        what it never did. Raises: GuardError if the model does not take the call, or if a hook
        changes a value that decides the path.
        """
        return self._answered(args, kwargs, lambda v, t: self._run(v, t, (), None)[0])

    @property
    def hook_names(self) -> list[str]:
        """Canonical names first, in the order of the run, then one native name per operator."""
        return list(self._names.all)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: NameFilter = None,
        stop_at_layer: int | None = None,
        pos_slice: slice | int | tuple[int | None, ...] | None = None,
        incl_bwd: bool = False,
        remove_batch_dim: bool = False,
        device: torch.device | str | None = None,
        return_cache_object: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | Any]:
        """The model's result and the values of the names asked for; None keeps every name.

        `stop_at_layer=n` returns the stream before block n and computes nothing behind it.
        `incl_bwd` runs `backward` from the scalar result and adds gradients as `name_grad`.
        `pos_slice` is a slice, its two or three numbers, or one position, which drops the axis.
        `return_cache_object=False` gives a plain dict.

        Raises: UnknownNameError, and LensError where a value lies behind the stop.
        """
        stop = stop_name(self.structure, self._names, stop_at_layer)
        self._names.resolve(names_filter)

        def run(
            variant: Variant, tensors: list[torch.Tensor]
        ) -> tuple[Variant, Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            return variant, *self._read(variant, tensors, names_filter, stop, incl_bwd)

        variant, out, values, grads = self._answered(args, kwargs, run)
        if incl_bwd:
            scalar(out).backward()
        found = {name: value.detach() for name, value in values.items()}
        found |= {f"{name}_grad": grads[name] for name in values if name in grads}
        if pos_slice is not None:
            found = {k: variant.axes.slice_positions(k, v, pos_slice) for k, v in found.items()}
        if remove_batch_dim:
            found = {k: variant.axes.drop_batch(k, v) for k, v in found.items()}
        if device is not None:
            found = {k: v.to(device) for k, v in found.items()}
        if not return_cache_object:
            return out, found
        options = {
            "stop_at_layer": stop_at_layer,
            "pos_slice": pos_slice,
            "remove_batch_dim": remove_batch_dim,
            "device": device,
        }
        call = Call.of(self, args, kwargs, options, self._hooks.change_values)
        return out, ActivationCache(found, variant.names.all, self, not remove_batch_dim, call)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The model's result with these hooks attached for this one call.

        A hook is `fn(value, hook)`; it returns None to look only, or the value to put in place.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Lens]:
        """Attach hooks inside a `with` block; blocks can be nested."""
        entries = [self._hooks.check(n, f, "fwd") for n, f in pairs(fwd_hooks)]
        entries += [self._hooks.check(n, f, "bwd") for n, f in pairs(bwd_hooks)]
        for entry in entries:
            self._hooks.add(entry)
        try:
            yield self
        finally:
            if reset_hooks_end:
                for entry in entries:
                    self._hooks.remove(entry)
            if clear_contexts:
                self._hooks.clear_contexts()

    def add_hook(
        self,
        name: NameFilter,
        fn: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach a hook to a name, a list of names, or all names a predicate holds for.

        It stays until `reset_hooks`; a permanent one until `reset_hooks(including_permanent=True)`.
        `level` is taken for callers written for TransformerLens and has no effect: a `with` block
        removes its own hooks and no others.

        Raises: UnknownNameError, HookError for what is not callable or no direction.
        """
        self._hooks.add(self._hooks.check(name, fn, dir, is_permanent), prepend)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
    ) -> None:
        """Detach every hook added with `add_hook`."""
        self._hooks.reset(direction, including_permanent)
        if clear_contexts:
            self._hooks.clear_contexts()

    @cached_property
    def module(self) -> fx.GraphModule:
        """The recompiled graph as a GraphModule with the model's signature, hooks as identities."""
        return as_module(self.program)

    def to_networkx(self, component: str = "ops") -> nx.MultiDiGraph:
        """The computation as a directed multigraph: one node a value, or one a component.

        `component="heads"` has a node for each head, MLP and embedding and an edge for each read
        of the residual stream, with `read` one of q, k, v, mlp, mixer, unembed; `"blocks"` has a
        node for each block.

        Raises: LensError for a component that is not there, or if the structure is not known.
        """
        if component == "ops":
            return to_networkx(self.program)
        return component_graph(self.program, component, self._names.canonical)

    def train(self, mode: bool = True) -> Lens:
        """Run as the model does in training mode from now on; the lens itself.

        The training graph is captured at the first call, with the same passes and the same
        parameters. The wrapped model keeps its own mode, and what it keeps in eval mode while it
        trains stays so.
        """
        self.training = bool(mode)
        return self

    def eval(self) -> Lens:
        """Run as the model does in eval mode from now on; the lens itself."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> Lens:
        """Move to a device, a dtype, or both, as `torch.nn.Module.to` takes them; the lens itself.

        The lens becomes what wrapping the moved model gives: a copy of the model is moved and
        captured again, so float32 islands in its code stay. The wrapped model is left alone, and
        the parameters of the lens are new ones. What was written into the lens's own folded
        parameters is carried over.

        Raises: CaptureError if the model cannot be copied, or captured where it is moved to.
        """
        moved = self._variants.moved(*args, **kwargs)
        self._start(moved.program, moved.report)
        self._hooks.rename(self._names)
        return self

    def with_weights(self, weights: Any, *, strict: bool = True) -> Lens:
        """A lens of another checkpoint of the model, as `Program.with_weights` takes it."""
        lens = Lens(self.program.with_weights(weights, strict=strict))
        lens.tokenizer = self.tokenizer
        return lens

    def parameters(self) -> list[nn.Parameter]:
        """Each trainable tensor once: the model's own objects, save those that a pass folded.

        In training mode it is what the training graph reads, captured now if it was not yet.
        """
        if self.training:
            return self._variants.trained(Mode.ambient(True)).program.parameters()
        found = [p for program in self.programs for p in program.parameters()]
        return list({id(p): p for p in found}.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of the program by name."""
        return {name: t.detach() for name, t in self.program.tensors.items()}

    def __repr__(self) -> str:
        names = self._names
        return (
            f"Lens({self.program.source.model}: {len(names.canonical)} canonical and "
            f"{len(names.all) - len(names.canonical)} native hook points)"
        )

    def _answered(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run: Callable[[Variant, list[torch.Tensor]], T],
    ) -> T:
        """What `run` makes of a call; on a new capture of it where an opaque module refuses it."""
        mode = Mode.ambient(self.training)
        variant, tensors = self._variants.pick(args, kwargs, mode)
        try:
            with variant.undone_if_refused(tensors):
                return run(variant, tensors)
        except OpaqueError:
            return run(*self._variants.anew(args, kwargs, mode))

    def _read(
        self,
        variant: Variant,
        tensors: list[torch.Tensor],
        wanted: NameFilter,
        stop: str | None,
        with_grads: bool,
    ) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The result, the values by name, and where gradients will be put."""
        names = kept(variant, wanted, stop)
        if wanted is not None and not callable(wanted):
            for name in names:
                self._variants.check_name(variant, name)
        grads: dict[str, torch.Tensor] = {}
        collect = collector(variant, names, grads) if with_grads else {}
        out, values = self._run(variant, tensors, tuple(names), stop, collect)
        return out, dict(zip(names, values, strict=True)), grads

    def _run(
        self,
        variant: Variant,
        tensors: list[torch.Tensor],
        keep: tuple[str, ...],
        stop: str | None,
        grads: Mapping[str, HookFunction] | None = None,
    ) -> tuple[Any, tuple[torch.Tensor, ...]]:
        variant.program.check_runnable()
        active = self._hooks.active(grads or {})
        edited = frozenset(active.forward) | frozenset(active.backward) | frozenset(active.collect)
        places = variant.names.places
        for name in sorted(edited):
            self._variants.check_name(variant, name)
        if stop is not None:
            upstream = variant.runs.upstream(stop)
            edited = frozenset(n for n in edited if places[n].node in upstream)
        run = variant.runs(Request(keep, edited, stop))
        try:
            with plain():
                flat = run(tensors, active)
        except OtherPathError as error:
            raise path_changed(error, not edited.isdisjoint(active.forward)) from None
        results, values = flat[: run.results], flat[run.results :]
        if stop is not None:
            return results[0], values
        return variant.program.signature.unflatten(list(results)), values
