"""Modules that cannot be traced: which one it is, and a trace in which it is one operator.

    parts = OpaqueModules(model, {"encoder.pool": "net.py:12  x.numpy()"})
    with parts.observing():
        model(x); model(longer)
    with parts.tracing():
        exported = torch.export.export(model, ...)

What real runs show is what is declared of the operator: which sizes its outputs have, what it
updates in place, how much random state there is to draw from, what a gradient reaches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lensfx.capture.opaque_find import chosen, failing_module, reason
from lensfx.capture.opaque_fit import Fit, Meta, Seen, alike, flattened, rebuilt, tensors_of
from lensfx.capture.untouched import holds_tensors
from lensfx.errors import CaptureError
from lensfx.graph.opaque import Opaque, known_sizes, lead_dtype
from lensfx.graph.opaque_call import Call, Slot, leaf, random_state

__all__ = ["OpaqueModules", "chosen", "failing_module", "reason"]


def _noted(values: Sequence[Any]) -> list[Any]:
    return [Meta(v) if isinstance(v, Tensor) else v for v in values]


class OpaqueModules:
    """Submodules of a model, by path and why, that are traced as one operator each.

    `calls` lists what a trace made of them, in order. Each call of a module is its own.
    """

    def __init__(self, model: nn.Module, why: Mapping[str, str]) -> None:
        self.calls: list[Opaque] = []
        self._model = model
        self._why = {id(model.get_submodule(path)): (path, text) for path, text in why.items()}
        self._modules = {path: model.get_submodule(path) for path, _ in self._why.values()}
        for path, module in self._modules.items():
            if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
                raise CaptureError(
                    f"{path} is TorchScript, whose weights cannot be lent to it",
                    hint="use the module that it was scripted from",
                )
        self._slots = {path: _slots(m) for path, m in self._modules.items()}
        self._runs: list[dict[str, list[Seen]]] = []
        self._tries: dict[tuple[str, int], tuple[Call, list[Tensor], tuple[int, ...]]] = {}
        self._gradients: dict[tuple[str, int], _Gradients] = {}
        self._depth = 0

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Real runs of the model inside show what to declare of the operators."""
        with self._replaced(self._observe, lambda: self._runs.append({})):
            yield
        for key, (call, given, updates) in self._tries.items():
            if key not in self._gradients:
                self._gradients[key] = _gradients(call, given, updates)
                self._tries[key] = (call, [], updates)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """The modules are operators inside, as the runs observed before have shown them.

        Raises: CaptureError, inside, for a call that no run has shown or that has no declaration.
        """
        self.calls = []
        count: dict[str, Iterator[int]] = {}

        def begin() -> None:
            self.calls.clear()
            count.update({path: itertools.count() for path in self._modules})

        def traced(path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return self._traced(path, original, next(count[path]), flattened((args, kwargs)))

        begin()
        with self._replaced(traced, begin):
            yield

    @contextlib.contextmanager
    def _replaced(self, call: Callable[..., Any], begin: Callable[[], None]) -> Iterator[None]:
        """The forwards of the modules are `call`; each forward of the whole model begins anew."""

        def stub(path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> Any:
                if path:
                    return call(path, original, args, kwargs)
                begin()
                return original(*args, **kwargs)

            return forward

        modules = {"": self._model, **self._modules}
        held = {path: m.__dict__.get("forward") for path, m in modules.items()}
        try:
            for path, module in modules.items():
                module.__dict__["forward"] = stub(path, module.forward)
            yield
        finally:
            for path, module in modules.items():
                if held[path] is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = held[path]

    def _observe(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._depth or not self._runs:
            return original(*args, **kwargs)
        seen = Seen(*flattened((args, kwargs)))
        inputs, slots = tensors_of(seen.leaves), self._slots[path]
        call = self._call(path, original, seen)
        buffers = [s.value() if s.is_buffer else None for s in slots]
        before: list[Any] = [t if t is None else t.detach().clone() for t in (*inputs, *buffers)]
        sources = call.sources(inputs)
        state = random_state(sources)
        self._depth += 1
        try:
            result = original(*args, **kwargs)
        finally:
            self._depth -= 1
        after = [*inputs, *(s.value() for s in slots)]
        pairs = enumerate(zip(before, after, strict=True))
        seen.updates = tuple(k for k, (a, b) in pairs if a is not None and _changed(a, b))
        # A call that draws nothing now may draw on other values.
        seen.state = _room(len(state))
        results, seen.out_spec = flattened(result)
        self._refuse_hidden(path, "returns", results)
        key = (path, len(self._runs[-1].setdefault(path, [])))
        self._tries.setdefault(key, (call, before[: len(inputs)], seen.updates))
        seen.leaves, seen.results = _noted(seen.leaves), _noted(results)
        self._runs[-1][path].append(seen)
        return result

    def _call(self, path: str, original: Callable[..., Any], seen: Seen) -> Call:
        """How to run a call again; sizes are those of its leaves that are symbolic."""
        self._refuse_hidden(path, "is called with", seen.leaves)
        numbers = {"tensor": itertools.count(), "size": itertools.count()}
        leaves = []
        for value in seen.leaves:
            kind = "tensor" if isinstance(value, Tensor) else "constant"
            kind = "size" if isinstance(value, torch.SymInt) else kind
            leaves.append((kind, next(numbers[kind]) if kind in numbers else value))
        module = self._modules[path]
        flags = tuple((m, m.training) for m in module.modules())
        return Call(
            module,
            original,
            self._slots[path],
            flags,
            seen.spec,
            tuple(leaves),
            rebuilt,
            flattened,
        )

    def _refuse_hidden(self, path: str, does: str, leaves: Sequence[Any]) -> None:
        for value in leaves:
            if not isinstance(value, (Tensor, torch.SymInt)) and holds_tensors(value):
                kind = type(value).__name__
                raise CaptureError(
                    f"the opaque module {path} {does} an object of type {kind}, in which torch "
                    "sees no tensors",
                    hint=f"use tuples, lists, dicts or dataclasses, or register {kind} as a "
                    "pytree node",
                )

    def _traced(
        self,
        path: str,
        original: Callable[..., Any],
        index: int,
        given: tuple[list[Any], pytree.TreeSpec],
    ) -> Any:
        plain = {torch.SymFloat: float, torch.SymBool: bool}
        leaves = [plain.get(type(v), lambda v: v)(v) for v in given[0]]
        inputs, sizes = tensors_of(leaves), [v for v in leaves if isinstance(v, torch.SymInt)]
        call = self._call(path, original, Seen(leaves, given[1]))
        calls = [run[path][index] for run in self._runs if len(run.get(path, ())) > index]
        calls = [s for s in calls if s.spec == given[1] and alike(s.leaves, leaves)]
        if not calls:
            raise CaptureError(
                f"the opaque module {path} is called otherwise when traced than when run",
                hint="let its calls not depend on torch.compiler.is_exporting()",
            )
        _tie_down(inputs, calls)
        opaque = self._declared(path, index, call, calls)
        self.calls.append(opaque)
        weights = [s.value() for s in self._slots[path]]
        made = torch.ops.lensfx.opaque(opaque.key, inputs, sizes, weights)
        changed = made[len(opaque.outputs) :]
        for (k, _), new in zip(opaque.updates, changed, strict=False):
            [*inputs, *weights][k].copy_(new)
        outputs, known = iter(made), known_sizes(inputs, sizes)
        flat = []
        for kind, value in opaque.results:
            value = next(outputs) if kind == "tensor" else value
            flat.append(value.among(known) if kind == "size" else value)
        return rebuilt(pytree.tree_unflatten(flat, opaque.spec))

    def _declared(self, path: str, index: int, call: Call, calls: Sequence[Seen]) -> Opaque:
        kinds = [kind for kind, _ in call.leaves]
        fit = Fit(path, calls, kinds)
        results, outputs = fit.results()
        updates = sorted({k for seen in calls for k in seen.updates})
        carries, reached = self._gradients[path, index]
        after = dict(zip(self._tries[path, index][2], carries[len(outputs) :], strict=False))
        outputs = [
            dataclasses.replace(o, differentiable=c) for o, c in zip(outputs, carries, strict=False)
        ]
        tensors = [*tensors_of(calls[0].leaves), *(s.value() for s in self._slots[path])]
        return Opaque(
            path=path,
            why=self._why[id(self._modules[path])][1],
            call=call,
            spec=calls[0].out_spec,
            results=tuple(results),
            outputs=tuple(outputs),
            updates=tuple((k, after.get(k, False)) for k in updates),
            reached=reached,
            lead=lead_dtype(tensors),
            state=max(seen.state for seen in calls),
        )


def _tie_down(inputs: Sequence[Tensor], calls: Sequence[Seen]) -> None:
    """Fix the sizes that were the same in all runs: at others the module may well fail."""
    for k, tensor in enumerate(inputs):
        for axis, size in enumerate(tensor.shape):
            known = {tensors_of(seen.leaves)[k].shape[axis] for seen in calls}
            if isinstance(size, torch.SymInt) and len(known) == 1:
                torch._check(size == known.pop())


_Gradients = tuple[tuple[bool, ...], tuple[bool, ...]]


def _gradients(call: Call, given: Sequence[Tensor], updates: Sequence[int]) -> _Gradients:
    """Which outputs and updates can carry a gradient, which tensors it can reach.

    Found by running the call once more; where that fails, all of them do.
    """
    tensors = [*given, *(s.value().detach().clone() for s in call.slots)]
    count, reached = len(given), [True] * len(tensors)
    carries: tuple[bool, ...] = (True,) * 99

    def ends(leaves: Sequence[Tensor]) -> list[Any]:
        copies = [t.clone() if k in updates else t for k, t in enumerate(leaves)]
        results, _, left = call.run(copies[:count], (), copies[count:])
        final = [*copies[:count], *left]
        return [*tensors_of(results), *(final[k] for k in updates)]

    with call.undone(tensors), torch.enable_grad(), contextlib.suppress(Exception):
        # A buffer takes no part, unless it asks to.
        mute = [False] * count + [s.is_buffer and not s.value().requires_grad for s in call.slots]
        pairs = zip(tensors, mute, strict=True)
        leaves = [leaf(t, t.dtype.is_floating_point and not m) for t, m in pairs]
        made = ends(leaves)
        # What this call did not take may be what another takes: an expert, a branch.
        reached = [t.requires_grad for t in leaves]
        results = len(made) - len(updates)
        carries = tuple(
            t.requires_grad or (k < results and t.is_floating_point()) for k, t in enumerate(made)
        )
    return carries, tuple(reached)


def _room(length: int) -> int:
    return (length // 4096 + 2) * 4096


def _changed(old: Tensor, new: Any) -> bool:
    if not isinstance(new, Tensor) or old.shape != new.shape or old.dtype != new.dtype:
        return False
    return not bool(((old == new) | ((old != old) & (new != new))).all())


def _slots(module: nn.Module) -> tuple[Slot, ...]:
    """Parameters, buffers and tensors kept as attributes, each with all places that hold it."""
    found: dict[int, list[tuple[str, dict[str, Any], str, bool]]] = {}
    parts = dict(module.named_modules())
    for name, value in module.__dict__.items():
        for k, part in enumerate(value if isinstance(value, list) else ()):
            if isinstance(part, nn.Module):
                parts |= {f"{name}.{k}.{p}".strip("."): m for p, m in part.named_modules()}
    for path, part in parts.items():
        kept = [v for v in part.__dict__.values() if type(v) is dict]
        for holder in (part._parameters, part._buffers, part.__dict__, *kept):
            for name, value in list(holder.items()):
                if isinstance(value, Tensor):
                    full = f"{path}.{name}" if path else name
                    entry = (full, holder, name, holder is part._buffers)
                    found.setdefault(id(value), []).append(entry)
    return tuple(
        Slot(same[0][0], tuple((holder, name) for _, holder, name, _ in same), same[0][3])
        for same in found.values()
    )
