"""The promise that a model is left as it was: its Python state, its tensors, the random state."""

from __future__ import annotations

import contextlib
import dis
import functools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

__all__ = ["hides_tensors", "holds_tensors", "seeded", "untouched"]

# Deep enough for a list in a hook's closure or in a helper object, too shallow for what merely
# hangs off a module, such as the optimizer state of a trainer that the module points to.
_DEPTH = 6
_OURS = ("training", "_compiled_call_impl")
_OPAQUE = (type, types.ModuleType, str, bytes, int, float, torch.dtype, torch.device)


@contextlib.contextmanager
def untouched(
    model: nn.Module, call: Any = (), training: bool = False
) -> Iterator[Callable[[], list[str]]]:
    """Put the model into a mode inside; afterwards every attribute, tensor and flag is back.

    In training mode, a model that already trains keeps its flags: some parts may be frozen.

    Tracing leaves fake tensors wherever a forward keeps something, in the objects of its `call`
    too, and a real run updates buffers and counters. Parameters are not copied; see
    ReadOnlyParameters. Yields a function that goes back to the state at entry, eval mode kept, and
    returns the names of what had changed.
    """
    before = _State([*model.modules(), call])
    flags = _flags(model, training)

    def restore() -> list[str]:
        changed = before.restore()
        _prepare(model, flags)
        return changed

    try:
        with _random_state_kept(model):
            _prepare(model, flags)
            yield restore
    finally:
        before.restore()


def _flags(model: nn.Module, training: bool) -> list[bool]:
    """The flags in a mode; some parts may be frozen, by hand or by a `train` of their own."""
    if training and model.training:
        return [m.training for m in model.modules()]
    if training and any(type(m).train is not nn.Module.train for m in model.modules()):
        before = [m.training for m in model.modules()]
        model.train()
        flags = [m.training for m in model.modules()]
        for m, flag in zip(model.modules(), before, strict=True):
            m.training = flag
        return flags
    return [training for _ in model.modules()]


def _prepare(model: nn.Module, flags: Sequence[bool]) -> None:
    for m, training in zip(model.modules(), flags, strict=True):
        m.training = training
        # A module compiled in place would be compiled anew under tracing.
        m.__dict__["_compiled_call_impl"] = None


@contextlib.contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """Every generator that a run of the model can draw from goes back to where it was.

    Runs side by side then draw the same, which is also what the call draws that is captured.
    """
    with _random_state_kept(model):
        yield


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.random.set_state(state[1])


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


class _State:
    """Every container and tensor within reach of some objects, with its contents."""

    def __init__(self, roots: Iterable[Any]) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        for value in _reachable(roots):
            if isinstance(value, torch.Tensor):
                # Subclasses may not compare or copy as plain tensors do.
                if type(value) is torch.Tensor and value.layout is torch.strided:
                    self._tensors.append((value, _held_value(value)))
            elif isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))
            elif isinstance(value, types.CellType):
                self._containers.append((value, value.cell_contents))
            elif isinstance(value, _Globals):
                self._containers.append((value, value.values()))
            elif isinstance(value, (dict, list, set, deque)):
                self._containers.append((value, _copied(value)))

    def restore(self) -> list[str]:
        """Put back what has changed and leave alone what has not; the keys of what has changed."""
        changed: list[str] = []
        for container, kept in self._containers:
            changed += _refill(container, kept)
        for tensor, value in self._tensors:
            if not tensor.is_meta and not _same(tensor, value):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)
            if tensor.grad_fn is not None and not value.requires_grad:
                # It was written into with gradients on, and has a history since.
                tensor.detach_()
        for generator, state in self._generators:
            generator.set_state(state)
        return [name for name in dict.fromkeys(changed) if name not in _OURS]


def _held_value(tensor: torch.Tensor) -> torch.Tensor:
    # With a history of its own it is left with one.
    return tensor.detach().clone().requires_grad_(tensor.grad_fn is not None)


def holds_tensors(value: Any) -> bool:
    """Whether tensors or symbolic sizes hang on to a Python object that torch sees as one leaf."""
    symbols = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(isinstance(v, symbols) for v in _reachable([value]))


def hides_tensors(value: Any) -> bool:
    """Whether a leaf of a result holds tensors, or makes them when it is read."""
    return isinstance(value, Iterator) or holds_tensors(value)


def _reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """Containers, cells, tensors and symbols that can be reached in a few steps, each once."""
    here, seen = list(roots), set()
    for _ in range(_DEPTH + 1):
        found: list[Any] = []
        for value in here:
            if value is None or isinstance(value, _OPAQUE) or id(value) in seen:
                continue
            seen.add(id(value))
            yield value
            found += _inside(value)
        here = found


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, torch.Tensor):
        return ()
    if isinstance(value, types.CellType):
        return [value.cell_contents]
    if isinstance(value, types.FunctionType):
        return _used_by(value)
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, _Globals):
        return list(value.values().values())
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    own = getattr(value, "__dict__", None)
    found = [own] if type(own) is dict else []
    if isinstance(value, nn.Module):
        found += _of_class(type(value))
    slots = [n for c in type(value).__mro__ for n in getattr(c, "__slots__", ()) or ()]
    return [*found, *(getattr(value, n, None) for n in slots if isinstance(n, str))]


def _of_class(kind: type) -> list[Any]:
    """What classes of modules keep for all of their instances, and the forwards that use it."""
    own = [c for c in kind.__mro__ if "forward" in vars(c)]
    written = [c for c in own if not c.__module__.startswith("torch.")]
    held = [v for c in written for v in vars(c).values()]
    kept = [v for v in held if isinstance(v, (dict, list, set, deque, torch.Tensor))]
    return [*kept, *(v for c in written if isinstance(v := vars(c)["forward"], types.FunctionType))]


def _used_by(function: types.FunctionType) -> list[Any]:
    """What a hook or a patched forward can keep things in: its closure and the globals it names."""
    if (function.__module__ or "").split(".")[0] == "torch":
        return []
    cells = [c for c in function.__closure__ or () if _filled(c)]
    named = [function.__globals__.get(n) for n in function.__code__.co_names]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    kept = [v for v in (*named, *defaults) if isinstance(v, (dict, list, set, deque))]
    stored = {i.argval for i in dis.get_instructions(function) if i.opname == "STORE_GLOBAL"}
    return [*cells, *kept, *([_Globals(function.__globals__, tuple(stored))] if stored else [])]


class _Globals:
    """The global names that a function assigns to, as a container of their values."""

    def __init__(self, names: dict[str, Any], stored: tuple[str, ...]) -> None:
        self.names, self.stored = names, stored

    def values(self) -> dict[str, Any]:
        """What the names stand for now; those that are not set are left out."""
        return {n: self.names[n] for n in self.stored if n in self.names}


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False


def _copied(container: Any) -> Any:
    if isinstance(container, dict):
        return list(container), list(container.values())
    return list(container)


def _refill(container: Any, kept: Any) -> list[str]:
    if isinstance(container, types.CellType):
        container.cell_contents = kept
        return []
    if isinstance(container, _Globals):
        changed = [n for n in container.stored if container.names.get(n) is not kept.get(n)]
        for name in container.stored:
            if name in kept:
                container.names[name] = kept[name]
            else:
                container.names.pop(name, None)
        return changed
    if isinstance(container, dict):
        return _refill_dict(container, *kept)
    now = _copied(container)
    if len(now) != len(kept) or not all(map(is_, now, kept)):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(kept)
        return [f"a {type(container).__name__}"]
    return []


def _refill_dict(container: dict[Any, Any], keys: list[Any], values: list[Any]) -> list[str]:
    same = len(container) == len(keys) and all(map(is_, container.values(), values))
    if same and all(map(is_, container, keys)):
        return []
    new = {k: id(v) for k, v in container.items()}
    old = {k: id(v) for k, v in zip(keys, values, strict=True)}
    # A subclass may do more in its own methods than keep items.
    kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
    kind.clear(container)
    for key, value in zip(keys, values, strict=True):
        kind.__setitem__(container, key, value)
    # Keys that are no names, such as those of hooks, would tell a reader nothing.
    return [k for k in {**old, **new} if isinstance(k, str) and old.get(k) != new.get(k)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN counted as equal to NaN."""
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
