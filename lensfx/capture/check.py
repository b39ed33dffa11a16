"""After capture: the graph is run beside the model, bitwise, also at sizes torch did not trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from lensfx.capture.empty import on_shapes
from lensfx.capture.modes import CallLog, ReadOnlyParameters
from lensfx.capture.untouched import seeded
from lensfx.errors import CaptureError, GuardError
from lensfx.graph.choice import OtherPathError, choices
from lensfx.graph.compiled import probe
from lensfx.graph.guards import Axis, Guards
from lensfx.graph.mode import plain
from lensfx.graph.ops import writes
from lensfx.graph.program import Program

__all__ = ["DisagreementError", "Traced", "settle_guards"]

Tensors = Sequence[torch.Tensor]
# Sizes of the other axes at which a path of its own is tried; None is the size it was traced at.
_OTHER_SIZES = (None, 3)
_MODEL_FAILS = "the model fails there"
_OTHER_PATH = "the graph is of another path"


class DisagreementError(CaptureError):
    """The captured graph does not compute what the model does on the example."""


@dataclass(frozen=True)
class Traced:
    """How a program was traced: its inputs, the branches on sizes that were taken, the way back.

    All dynamic axes of `inputs` are larger than 1; `restore` undoes what a run leaves behind. A
    model that has no weights is run on shapes alone.
    """

    inputs: tuple[torch.Tensor, ...]
    branches: Guards
    restore: Callable[[], Any]
    has_weights: bool = True


def settle_guards(program: Program, model: nn.Module, traced: Traced) -> Program:
    """The program with size 1 allowed on each dynamic axis where the model agrees bitwise.

    Torch never traces a dynamic axis of size 1, so code under `if length == 1` is not in the
    graph: each axis is tried at 1 and stays bounded by 2 if the model does something else there.
    Axes that agree only together (the batch of ids and of their mask) are tied by a relation.

    Raises: CaptureError if the graph and the model differ on the example itself.
    """
    trials = _Trials(program, model, traced)
    if choices(program.graph):
        # A path that is not the example's says so here, before anything else is tried.
        trials.disagreement(program.example, effects=True)
    wide, ties, units = program.guards, [], []
    for group in _groups(program, traced.inputs):
        tried = _allow_one(wide, group)
        if not trials.agree_at_one(tried, group):
            continue
        wide = tried
        if len(group) > 1 and all(trials.agree_at_one(tried, [a]) for a in group):
            units += [[a] for a in group]
        else:
            units.append(group)
            ties += [_tie(group[0], axis) for axis in group[1:]]
    ties += _apart(trials, wide, units)
    settled = program.with_graph(program.graph, guards=wide.with_relations(ties))
    if not traced.has_weights:
        return settled
    if not _passes(settled.guards, program.example):
        raise CaptureError(
            "the model takes another path at size 1 than at larger sizes, and the example has it",
            hint="capture with an example whose axes are larger than 1",
        )
    difference = trials.disagreement(program.example, effects=True)
    where = "on its own example"
    if difference is None:
        larger = trials.larger(settled.guards)
        if larger is None:
            return _noting(settled, trials.disagreement_on_values(settled.guards, traced.inputs))
        difference = trials.disagreement_on_values(settled.guards, larger)
        where = "at other sizes"
    if difference is not None:
        raise DisagreementError(
            f"the captured graph is not the model {where}: {difference}",
            hint="a forward that keeps state between calls, or draws random numbers, does this",
        )
    return settled


def _noting(program: Program, difference: str | None) -> Program:
    """The program with a note, if on other values than the example's it is not quite the model."""
    if difference is None:
        return program
    # A kernel that the values chose: it is no branch of the graph, which is right on the example.
    note = f"for other values of its inputs the model does other arithmetic: {difference}"
    source = replace(program.source, notes=(*program.source.notes, note))
    return replace(program, source=source)


def _groups(program: Program, traced: Tensors) -> list[list[Axis]]:
    """Axes to try at size 1 together: one per symbol, those at the same place in their inputs."""
    first: dict[str, Axis] = {}
    for axis in program.guards.dynamic:
        if axis.symbol is not None and axis.low == 2:
            first.setdefault(axis.symbol, axis)
    groups: dict[tuple[int, int], list[Axis]] = {}
    for axis in first.values():
        size = traced[axis.leaf].shape[axis.axis]
        groups.setdefault((axis.axis, size), []).append(axis)
    return list(groups.values())


def _apart(trials: _Trials, guards: Guards, units: Sequence[list[Axis]]) -> list[str]:
    """Relations that forbid those axes to be 1 together that agree with the model one by one."""
    refused: list[set[str | None]] = []
    relations = []
    counts = dict.fromkeys(n for n in (2, len(units)) if 2 <= n <= len(units))
    for chosen in (c for n in counts for c in combinations(units, n)):
        axes = [a for unit in chosen for a in unit]
        symbols = {a.symbol for a in axes}
        if any(r <= symbols for r in refused):
            continue
        if not trials.agree_at_one(guards, axes):
            refused.append(symbols)
            relations.append(f"not ({' and '.join(f'{_size(a)} == 1' for a in axes)})")
    return relations


def _allow_one(guards: Guards, group: Sequence[Axis]) -> Guards:
    symbols = {a.symbol for a in group}
    axes = tuple(replace(a, low=1) if a.symbol in symbols else a for a in guards.axes)
    return replace(guards, axes=axes, _passed=set())


def _size(axis: Axis) -> str:
    return f"t[{axis.leaf}].shape[{axis.axis}]"


def _tie(a: Axis, b: Axis) -> str:
    return f"({_size(a)} == 1) == ({_size(b)} == 1)"


def _passes(guards: Guards, tensors: Tensors) -> bool:
    try:
        guards.check(tensors)
    except GuardError:
        return False
    return True


class _Trials:
    """Runs of the model and of the graph side by side, each from the model's original state."""

    def __init__(self, program: Program, model: nn.Module, traced: Traced) -> None:
        self.program = program
        self.model = model
        self.traced = traced
        self._path: list[Any] = []
        self._graph, self._reads = probe(program.graph, (), effects=True)
        self._buffers = [name for name, _ in model.named_buffers()]

    def agree_at_one(self, guards: Guards, axes: Sequence[Axis]) -> bool:
        """Whether graph and model agree where these axes have size 1.

        If the model takes another path there, that has to hold for other weights, values, sizes:
        a bias that is skipped cannot be seen while it is zero, nor a mask while it is all ones.
        """
        ones = dict.fromkeys((str(a.symbol) for a in axes), 1)
        small = self._sized(ones)
        if not _passes(guards, small):
            return False
        if not self.traced.has_weights:
            return self._same_path_on_shapes(small)
        if self.disagreement(small) is not None:
            return False
        if self._path == self._traced_path and self.traced.branches.holds(small):
            return True
        if any(t.is_meta for t in [*small, *self.model.parameters()]):
            return False
        return all(self._agree_elsewhere(guards, ones, size) for size in _OTHER_SIZES)

    def _same_path_on_shapes(self, small: Tensors) -> bool:
        paths = [self._shape_path(tensors) for tensors in (small, self.traced.inputs)]
        return paths[0] is not None and paths[0] == paths[1] and self.traced.branches.holds(small)

    def _shape_path(self, tensors: Tensors) -> list[Any] | None:
        """The path of the model's code on these shapes; None if it asks for a value."""
        try:
            with on_shapes(self.model, tensors) as given, self.program.mode.entered():
                args, kwargs = self.program.signature.arguments(given)
                with CallLog() as log:
                    self.model(*args, **kwargs)
        except Exception:
            # The user's code, which may ask a fake for its value.
            return None
        finally:
            self.traced.restore()
        return log.calls

    def _sized(self, sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """The traced inputs cut or repeated to other sizes, given by symbol."""
        tensors = list(self.traced.inputs)
        shapes = [t.shape for t in tensors]
        axes = self.program.guards.dynamic
        known = {str(a.symbol): shapes[a.leaf][a.axis] for a in axes} | dict(sizes)
        for axis in axes:
            tensor, symbol = tensors[axis.leaf], str(axis.symbol)
            # Some sizes follow from others, such as a batch times a number of heads.
            size = known[symbol] if symbol.isidentifier() else _evaluated(symbol, known)
            if size != tensor.shape[axis.axis]:
                picked = torch.arange(size, device=tensor.device) % tensor.shape[axis.axis]
                tensors[axis.leaf] = tensor.index_select(axis.axis, picked)
        return tensors

    def larger(self, guards: Guards) -> list[torch.Tensor] | None:
        """The traced inputs at sizes that were not traced; None if the guards do not take them."""
        sizes = {
            str(a.symbol): min(self.traced.inputs[a.leaf].shape[a.axis] + 2 + a.axis, a.high)
            for a in guards.dynamic
            if str(a.symbol).isidentifier()
        }
        tensors = self._sized(sizes)
        return tensors if sizes and _passes(guards, tensors) else None

    def disagreement_on_values(self, guards: Guards, tensors: Tensors) -> str | None:
        """How the graph differs from the model at these sizes, on values that were not traced.

        Code that knows it is traced may do other arithmetic there, which happens to give the same
        bits at one size.
        """
        generator = torch.Generator().manual_seed(7)
        if any(t.is_meta for t in tensors) or not _passes(guards, tensors):
            return None
        tensors = [_redrawn(t, generator) for t in tensors]
        found = self.disagreement(tensors)
        return None if found is None or found.startswith((_MODEL_FAILS, _OTHER_PATH)) else found

    def _agree_elsewhere(self, guards: Guards, ones: Mapping[str, int], size: int | None) -> bool:
        symbols = (str(a.symbol) for a in guards.dynamic)
        others = [s for s in symbols if s not in ones and s.isidentifier()]
        tensors = self._sized({**(dict.fromkeys(others, size) if size else {}), **ones})
        if not _passes(guards, tensors):
            return True
        generator = torch.Generator().manual_seed(size or 0)
        difference = self.disagreement([_redrawn(t, generator) for t in tensors], self._moved)
        # Redrawn values may be ones that the model rejects.
        return difference is None or difference.startswith(_MODEL_FAILS)

    @cached_property
    def _moved(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {n: _moved(p, generator) for n, p in self.model.named_parameters()}

    def disagreement(
        self,
        tensors: Tensors,
        weights: Mapping[str, torch.Tensor] | None = None,
        effects: bool = False,
    ) -> str | None:
        """How the graph differs from the model on these inputs, or None if it is bitwise equal.

        `weights` take the place of parameters; `effects` compares buffers after the run as well.
        """
        try:
            want = self._run(lambda given: self._of_model(given, weights), tensors, effects)
        except Exception as error:
            return f"{_MODEL_FAILS}: {type(error).__name__}: {error}"
        try:
            with self._constants_kept():
                got = self._run(lambda given: self._of_graph(given, weights), tensors, effects)
        except OtherPathError as error:
            if effects:
                raise
            return f"{_OTHER_PATH}: {error.headline}"
        except Exception as error:
            return f"the graph fails where the model runs: {type(error).__name__}: {error}"
        if len(want) != len(got):
            return "the model returns another number of values"
        for k, (a, b) in enumerate(zip(want, got, strict=True)):
            if (difference := _difference(a, b)) is not None:
                return f"{self._label(k)} {difference}"
        return None

    def _label(self, k: int) -> str:
        names = [*self.program.signature.outputs, *self.program.signature.tensor_names]
        return [*names, *self._buffers][k]

    def _run(
        self, function: Callable[[list[torch.Tensor]], list[Any]], tensors: Tensors, effects: bool
    ) -> list[Any]:
        """The flat results, then the inputs and, if asked for, the buffers as the run left them."""
        given = [t.clone() for t in tensors]
        with seeded(self.model):
            try:
                results = [*function(given), *given]
                if effects:
                    now = dict(self.model.named_buffers(remove_duplicate=False))
                    results += [now.get(name) for name in self._buffers]
                # A result may be a buffer, which is about to be put back.
                return [r.clone() if isinstance(r, torch.Tensor) else r for r in results]
            finally:
                self.traced.restore()

    def _of_model(
        self, given: list[torch.Tensor], weights: Mapping[str, torch.Tensor] | None
    ) -> list[Any]:
        args, kwargs = self.program.signature.arguments(given)
        mode = self.program.mode.entered()
        with mode, CallLog() as log, ReadOnlyParameters(self.model):
            if weights is None:
                out = self.model(*args, **kwargs)
            else:
                out = functional_call(self.model, dict(weights), args, kwargs)
        self._path = log.calls
        return pytree.tree_leaves(out)

    def _of_graph(
        self, given: list[torch.Tensor], weights: Mapping[str, torch.Tensor] | None
    ) -> list[Any]:
        tensors = [self.program.tensors[name] for name in self._reads]
        if weights is not None:
            drawn = {id(p): weights[name] for name, p in self.model.named_parameters()}
            tensors = [drawn.get(id(t), t) for t in tensors]
        with plain():
            return list(self._graph(None, *given, *tensors))

    @contextlib.contextmanager
    def _constants_kept(self) -> Iterator[None]:
        """Undo what a run of the graph writes into tensors that are not the model's."""
        written = [
            self.program.tensors[str(n.args[0].target)]
            for n in self.program.graph.nodes
            if n.op == "call_function" and writes(n) and n.args[0].op == "get_attr"
        ]
        kept = [t.detach().clone() for t in written]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(written, kept, strict=True):
                    tensor.copy_(value)

    @cached_property
    def _traced_path(self) -> list[Any]:
        self._run(lambda given: self._of_model(given, None), self.traced.inputs, False)
        return self._path


def _evaluated(expression: str, sizes: Mapping[str, int]) -> int:
    return int(eval(expression, {**SYMPY_INTERP}, dict(sizes)))


def _moved(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not parameter.is_floating_point():
        return parameter.detach()
    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
    return (parameter + 0.3 * noise).detach().requires_grad_(parameter.requires_grad)


def _redrawn(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Other values of the same kind: flags at random, integers out of those that are there."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor)
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return torch.randint(0, 2, tensor.shape, generator=generator).to(tensor)
    picked = torch.randint(0, tensor.numel(), tensor.shape, generator=generator)
    return tensor.flatten()[picked.to(tensor.device)]


def _difference(a: Any, b: Any) -> str | None:
    if not isinstance(a, torch.Tensor):
        return None if type(a) is type(b) and a == b else f"is {b!r}, not {a!r}"
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return "has another shape or dtype"
    if a.is_meta or a.numel() == 0:
        return None
    same = (a == b) | ((a != a) & (b != b))
    if bool(same.all()):
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    worst = (a.to(wide) - b.to(wide))[~same].abs().max().item()
    return f"differs by up to {worst:.1e}"
