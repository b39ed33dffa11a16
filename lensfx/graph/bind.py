"""bind and with_weights: give a program the tensors of a checkpoint, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from lensfx.errors import RewriteError
from lensfx.graph.blocks import evaluate
from lensfx.graph.checkpoint import Checkpoint
from lensfx.graph.misfit import (
    Problem,
    is_empty,
    misfit,
    refuse,
    refuse_missing,
    untied,
    without_values,
)
from lensfx.graph.node import dtype_of, outputs_of
from lensfx.graph.ops import written_tensors
from lensfx.graph.program import Formula, Program, copy_graph
from lensfx.graph.sources import Slot, buffers_of, leaves, of_changes, ties

__all__ = ["bind", "with_weights"]


def bind(
    program: Program,
    weights: Mapping[str, torch.Tensor] | nn.Module | str,
    device: torch.device | str | None = None,
) -> Program:
    """The program with tensors out of a state dict, a lazily read checkpoint or a real module.

    Every tensor that has no memory is looked up under its name or one that the model tied to it;
    a tensor that has some is replaced where the weights hold it. Folded parameters are computed
    from the given ones, one at a time, so that a lazily read checkpoint need not fit in memory
    beside the result; `unfolded` stays without weights. All goes to `device`, by default where the
    weights are, and so do the constants that the graph makes. Parameters of a module are shared.

    Raises: RewriteError if a weight is missing or has another shape or dtype than the program's.
    """
    given = _Given(program, weights, fill=True)
    refuse_missing(program, given.missing(given.needed()))
    refuse(program, given.misfits())
    return given.bound(device)


def with_weights(program: Program, weights: Any, *, strict: bool = True) -> Program:
    """`Program.with_weights`."""
    given = _Given(program, weights, fill=False)
    missing = given.missing(given.slots if strict else given.needed())
    hint = "name the weights as the model's state_dict does"
    problems = [(f"{name} is missing in the weights", hint) for name in missing]
    if strict:
        problems += given.unexpected()
    refuse(program, [*problems, *given.misfits()])
    return given.bound(None)


@dataclass(frozen=True)
class _Job:
    """A tensor of the result: where it is read or what it is computed from, and the old one."""

    name: str
    old: torch.Tensor
    formula: Formula | None


class _Given:
    """Weights by any name that the model has for them, and what follows from them."""

    def __init__(self, program: Program, weights: Any, *, fill: bool) -> None:
        _refuse_copies(program)
        self.program, self.fill = program, fill
        self.levels = [program]
        while (below := self.levels[-1].unfolded) is not None:
            self.levels.append(below)
        self.follows = fill or any(map(is_empty, program.tensors.values()))
        self.buffers = buffers_of(program)
        self.slots = self._slots()
        self.ties = ties(self.levels, self.slots)
        self.known = {*self.slots, *self.ties, *program.source.unread, *self.buffers}
        self.weights = Checkpoint.of(weights, self.known)
        self.late: list[Problem] = []
        # What a run writes to is not shared with a dict, nor with the program as it was.
        shared = self.weights.module is not None
        self._written = set() if shared else written_tensors(program.graph)
        self._uses: dict[str, int] = {}
        self._read_now: dict[str, torch.Tensor] = {}
        self._computed: dict[int, torch.Tensor] = {}

    def _slots(self) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for level in self.levels:
            for name, tensor in level.tensors.items():
                if name not in level.formulas:
                    slots.setdefault(name, Slot(tensor, self._staying(name, tensor)))
        for formula in (f for level in self.levels for f in level.formulas.values()):
            for name, like, own in leaves(formula):
                stays = None if own is None else self._staying(name, own)
                slots.setdefault(name, Slot(like, stays))
        return slots

    def _staying(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if is_empty(tensor):
            return None
        owed = isinstance(tensor, nn.Parameter) or self.buffers.get(name, False)
        return tensor if self.fill or not owed else None

    def held(self, name: str) -> list[str]:
        """The names under which the weights hold a tensor of the model."""
        return [n for n in self.ties.get(name, (name,)) if n in self.weights and self._may_hold(n)]

    def _tied(self, name: str) -> frozenset[str]:
        return frozenset(self.ties.get(name, (name,)))

    def _may_hold(self, name: str) -> bool:
        """Not so for a buffer that belongs into no state dict."""
        own = self.fill or self.weights.module is not None
        return own or self.buffers.get(name) is not False

    def needed(self) -> list[str]:
        """The tensors of the model that the program itself needs, not those before folding."""
        own = [
            self._sources(_Job(n, t, self.program.formulas.get(n)))
            for n, t in self.program.tensors.items()
        ]
        return list(dict.fromkeys(name for names in own for name in names))

    def _sources(self, job: _Job) -> list[str]:
        return [job.name] if job.formula is None else [n for n, *_ in leaves(job.formula)]

    def missing(self, wanted: Any) -> list[str]:
        """Those that the weights have to hold and do not, one name for all that are tied."""
        lost = [n for n in wanted if self.slots[n].kept is None and not self.held(n)]
        return list({self._tied(n): n for n in reversed(lost)}.values())[::-1]

    def unexpected(self) -> list[Problem]:
        """Names that no state dict of the model has."""
        hint = "strict=False ignores what the model does not have"
        return [
            (f"{name} is in the weights and not in the model", hint)
            for name in sorted(self.weights.states)
            if name not in self.known or not self._may_hold(name)
        ]

    def misfits(self) -> list[Problem]:
        """What the weights hold in another form, or twice and different."""
        found: dict[Problem, None] = {}
        for tensor_name, slot in self.slots.items():
            names = self.held(tensor_name)
            wrong = [misfit(n, slot.like, *self.weights.kind(n)) for n in names]
            if not any(wrong) and (self.weights.held or len(names) > 1):
                tensors = [self.weights.read(n) for n in names]
                pairs = zip(names, tensors, strict=True)
                wrong = [without_values(n, t) for n, t in pairs]
                wrong = wrong if any(wrong) else [*untied(names, tensors)]
            found |= dict.fromkeys(p for p in wrong if p is not None)
        return list(found)

    def bound(self, device: torch.device | str | None) -> Program:
        """The program with these weights."""
        jobs = self._jobs()
        for job in jobs:
            for name in self._sources(job):
                for known in self.held(name)[:1]:
                    self._uses[known] = self._uses.get(known, 0) + 1
        made: dict[int, torch.Tensor] = {}
        kept: list[_Job] = []
        for job in jobs:
            value = self._value(job, device)
            if value is None:
                kept.append(job)
            else:
                made[id(job.old)] = value
        refuse(self.program, self.late)
        target = _target(device, made, kept) if self.follows else None
        for job in kept:
            old = job.old if target is None else _placed(job.old, job.old, target)
            made[id(job.old)] = old.clone() if job.name in self._written else old
        return self._program(made, target)

    def _jobs(self) -> list[_Job]:
        """What is to be made, those that read the same large tensor one after the other."""
        jobs: dict[int, _Job] = {}
        fills = self.weights.held and not self.follows
        for level in self.levels if fills else self.levels[:1]:
            for name, old in level.tensors.items():
                jobs.setdefault(id(old), _Job(name, old, level.formulas.get(name)))
        for name in of_changes(self.program) if not self.follows else ():
            if name in (base := self.levels[-1]).tensors:
                old = base.tensors[name]
                jobs.setdefault(id(old), _Job(name, old, base.formulas.get(name)))
        groups: dict[Any, list[_Job]] = {}
        for job in jobs.values():
            names = self._sources(job)
            largest = max(names, key=lambda n: self.slots[n].like.numel(), default=None)
            groups.setdefault(largest and self._tied(largest), []).append(job)
        return [job for group in groups.values() for job in group]

    def _value(self, job: _Job, device: torch.device | str | None) -> torch.Tensor | None:
        """The new tensor; None if the old one is to stay."""
        given = any(self.held(n) for n in self._sources(job))
        if self.fill and not given and not is_empty(job.old):
            return None
        place = device if self.follows else job.old.device
        if job.formula is not None:
            value = self._computed_from(job.formula)
            return None if value is None else _placed(value, job.old, place, self._trained(job))
        if not given:
            return None if self.slots[job.name].kept is not None else _emptied(job.old)
        value = self._stored(job.name)
        assert value is not None
        owned = self.weights.mapped or job.name in self._written
        return _placed(value.clone() if owned else value, job.old, place)

    def _trained(self, job: _Job) -> bool:
        """Whether a folded parameter requires gradients: as those of a module it comes from do."""
        if self.weights.module is None:
            return job.old.requires_grad
        sources = (n for s in self._sources(job) for n in self.held(s)[:1])
        return any(self.weights.read(n).requires_grad for n in sources)

    def _computed_from(self, formula: Formula) -> torch.Tensor | None:
        if id(formula) in self._computed:
            return self._computed[id(formula)]
        sources: dict[str, torch.Tensor] = {}
        for name in formula.sources:
            below = formula.over.get(name)
            folded = below if isinstance(below, Formula) else None
            value = self._stored(name) if folded is None else self._computed_from(folded)
            if value is None:
                return None
            sources[name] = value
        (root,) = outputs_of(formula.graph)
        dtype = dtype_of(root)
        assert dtype is not None
        made = evaluate(root, lambda n: sources[str(n.target)], dtype)
        if self.weights.held:
            self._computed[id(formula)] = made
        return made

    def _stored(self, name: str) -> torch.Tensor | None:
        """A tensor of the model, out of the weights or as it was; read again for nobody."""
        known = next(iter(self.held(name)), None)
        if known is None:
            return self.slots[name].kept
        if known not in self._read_now:
            value, like = self.weights.read(known), self.slots[name].like
            wrong = without_values(known, value) or misfit(known, like, *_kind(value))
            if wrong is not None:
                self.late.append(wrong)
                value = torch.zeros(like.shape, dtype=like.dtype)
            self._read_now[known] = value
        value = self._read_now[known]
        self._uses[known] -= 1
        if not self._uses[known]:
            del self._read_now[known]
        return value

    def _program(self, made: Mapping[int, torch.Tensor], target: torch.device | None) -> Program:
        program = self.program
        tensors = {name: made[id(t)] for name, t in program.tensors.items()}
        changed: dict[str, Any] = {"tensors": MappingProxyType(tensors)}
        if target is None:
            changed["unfolded"] = self._unfolded(program.unfolded, made)
        else:
            changed["graph"] = _moved(program.graph, target)
            changed["example"] = tuple(
                torch.zeros_like(t, device=target) if t.is_meta else t.to(target)
                for t in program.example
            )
        origin = self._origin(tensors)
        source = program.source if origin else replace(program.source, buffers=self.buffers)
        return replace(program, origin=origin, source=source, **changed)

    def _unfolded(
        self, program: Program | None, made: Mapping[int, torch.Tensor]
    ) -> Program | None:
        """The program before folding: with what is in memory anyway, for the rest without."""
        if program is None:
            return None
        made = dict(made)
        for name, old in program.tensors.items():
            slot = self.slots.get(name)
            stays = name not in program.formulas and slot is not None and slot.kept is old
            made.setdefault(id(old), old if stays else _emptied(old))
        tensors = MappingProxyType({n: made[id(t)] for n, t in program.tensors.items()})
        below = self._unfolded(program.unfolded, made)
        return replace(program, tensors=tensors, unfolded=below, origin=None)

    def _origin(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The model with these weights, for calls off the captured path; None if it cannot be run.

        A checkpoint that is read lazily stays where it is.
        """
        origin, module = self.program.origin, self.weights.module
        if origin is None or not self.weights.held:
            return None
        # A module that is to stay opaque is another object in another model.
        paths = {id(m): path for path, m in origin.model.named_modules()}
        opaque = tuple(paths.get(id(o), o) for o in origin.opaque)
        if module is not None:
            return replace(origin, model=module, opaque=opaque)
        given = {n: t for n, t in self.weights.as_dict().items() if self._may_hold(n)}
        given |= {n: t for n, t in tensors.items() if n in self._written}
        try:
            made = origin.with_weights(given, self.program.source.aliases)
        except Exception:
            # Some models cannot be copied, and then only the captured path is known.
            return None
        return made and replace(made, opaque=opaque)


def _kind(value: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(value.shape), value.dtype


def _emptied(old: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(old, device="meta")
    if isinstance(old, nn.Parameter):
        return nn.Parameter(empty, requires_grad=old.requires_grad)
    return empty


def _placed(
    value: torch.Tensor,
    old: torch.Tensor,
    device: torch.device | str | None,
    trained: bool | None = None,
) -> torch.Tensor:
    """The value on its device, as a parameter where the old one was; one that fits is kept."""
    moved = value if device is None else value.to(device)
    if moved is not value:
        moved = moved.detach()
    if not isinstance(old, nn.Parameter) or isinstance(moved, nn.Parameter):
        return moved
    grad = old.requires_grad if trained is None else trained
    return nn.Parameter(moved.detach(), requires_grad=grad)


def _target(
    device: torch.device | str | None, made: Mapping[int, torch.Tensor], kept: list[_Job]
) -> torch.device:
    first = next(iter([*made.values(), *(job.old for job in kept)]), None)
    return torch.device(device or ("cpu" if first is None else first.device))


def _refuse_copies(program: Program) -> None:
    if program.journal and not program.stages:
        raise RewriteError(
            "this program is a copy, which does not know how its weights were folded",
            hint="give the weights to the program that was copied",
        )


def _moved(graph: fx.Graph, target: torch.device) -> fx.Graph:
    """A copy of the graph whose constants are made on the target device."""
    copy, _ = copy_graph(graph)

    def there(value: Any) -> Any:
        return target if isinstance(value, torch.device) else value

    for node in copy.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, there)
            node.kwargs = fx.node.map_aggregate(node.kwargs, there)
    return copy
