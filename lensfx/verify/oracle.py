"""Run any callable in float64, as if it had been written that way, and leave no trace.

Two modes do the work. One sits below autograd and sees every operator: it widens each floating
tensor and each dtype argument that names a smaller float. The other sits above, at the Python
call, for what is decided before the operators are reached: the dtype of a `torch.tensor`, the
eps that `rms_norm` takes from its input, composites that ask all arguments for one dtype.

A tensor that existed before is never written to. The first write to one makes a float64 stand-in
of its storage, and from then on every alias of it, by whatever route, reads and writes that.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from lensfx.errors import LensError
from lensfx.graph.opaque import opaque_of
from lensfx.verify.kernels import KERNELS, WIDER

__all__ = ["Float64"]

T = TypeVar("T")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
aten = torch.ops.aten

# These only move numbers, so widening what comes out costs less than widening what goes in.
MOVES = {"_to_copy", "clone", "embedding", "gather", "index", "index_select"}
# These read memory without an operator call, so they would miss a stand-in.
LOOKS = {"tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__format__"}
# Python functions that call composites where the upper mode no longer looks.
WRAPPERS = {"cartesian_prod", "meshgrid", "multi_head_attention_forward", "tensordot"}
RMS_NORMS = {f"{part}rms_norm{end}" for part in ("", "_fused_") for end in ("", ".default")}


@dataclass(frozen=True)
class _Kind:
    """What is known of an operator: what it is made of, and what its results share."""

    name: str
    view: bool
    writes: dict[int, str]  # position and name of each argument it writes to
    composite: bool
    free: bool  # it only calls other operators, and its result shares nothing


@cache
def _kind(func: OpOverload[..., Any]) -> _Kind:
    schema = func._schema
    writes = {
        i: a.name
        for i, a in enumerate(schema.arguments)
        # The schemas of batch norms do not say that they write to their running statistics.
        if (a.alias_info and a.alias_info.is_write) or a.name in ("running_mean", "running_var")
    }
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = has_kernel(func._name, "CompositeImplicitAutograd")
    aliases = any(r.alias_info is not None for r in schema.returns)
    makes = any("Tensor" in str(r.type) for r in schema.returns)
    return _Kind(
        name=schema.name.removeprefix("aten::"),
        view=aliases and not writes,
        writes=writes,
        composite=composite,
        free=composite and makes and not aliases and not writes,
    )


@cache
def _is_free(func: Any) -> bool:
    """Whether what Python calls is a free operator, its `out=` overloads left aside."""
    if isinstance(func, (BuiltinFunctionType, MethodDescriptorType)):
        func = getattr(aten, func.__name__, None)
    overloads = [func] if isinstance(func, OpOverload) else []
    if isinstance(func, OpOverloadPacket):
        every = [getattr(func, name) for name in func._overload_names]
        overloads = [o for o in every if not any(a.is_out for a in o._schema.arguments)]
    # Some names, such as size, have overloads that only TorchScript knows.
    known = [o for o in overloads if torch._C._dispatch_has_kernel(o._name)]
    return bool(known) and all(_kind(o).free for o in known)


def _words(t: Tensor) -> str:
    return f"a {t.dtype} tensor of {tuple(t.shape)} on {t.device}"


def _not_its_own(t: Tensor) -> LensError:
    return LensError(f"the program gives other data or another size to {_words(t)}, not its own")


def _address(t: Tensor) -> int:
    """What all aliases of a tensor share; 0 where there is nothing to share."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


def _flat(t: Tensor) -> Tensor:
    """The whole storage of `t`, real numbers in one row."""
    return torch.empty(0, dtype=t.real.dtype, device=t.device).set_(t.untyped_storage())


@dataclass
class _StandIn:
    """What is read in place of a storage; `origin` keeps the storage, and its address, alive."""

    origin: Tensor
    flat: Tensor
    owned: bool = False

    def view(self, t: Tensor) -> Tensor:
        """The elements that `t` has in its own storage, as this stand-in holds them."""
        _check_bits(self.origin.real, t.real.dtype)
        if not t.is_complex():
            return self.flat.as_strided(t.shape, t.stride(), t.storage_offset())
        strides = (*(2 * s for s in t.stride()), 1)
        pairs = self.flat.as_strided((*t.shape, 2), strides, 2 * t.storage_offset())
        value = torch.view_as_complex(pairs)
        return value.conj() if t.is_conj() else value


class _Memory:
    """Which storages were made inside the modes, and what stands in for the others."""

    def __init__(self, narrow: bool) -> None:
        self.made: set[int] = set()
        self.stand_ins: dict[int, _StandIn] = {}
        self.reshaped: list[tuple[Tensor, Tensor]] = []
        self.narrow = narrow

    def current(self, t: Tensor) -> Tensor:
        """`t`, or what stands in for it, in whatever dtype that is held."""
        found = self.stand_ins.get(_address(t)) if self.stand_ins else None
        return t if found is None else found.view(t)

    def widen(self, value: Any) -> Any:
        """An argument of an operator in float64: tensors, lists of them, and dtypes."""
        if isinstance(value, Tensor):
            value = self.current(value)
            self.narrow = self.narrow or value.dtype in WIDER
            return value.to(WIDER[value.dtype]) if value.dtype in WIDER else value
        if isinstance(value, torch.dtype):
            self.narrow = self.narrow or value in WIDER
            return WIDER.get(value, value)
        return [*map(self.widen, value)] if isinstance(value, (list, tuple)) else value

    def call(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        """What `func` returns for the same arguments in float64."""
        return func(*map(self.widen, args), **{k: self.widen(v) for k, v in kwargs.items()})

    def is_outside(self, t: Any) -> bool:
        """Whether a tensor's storage is older than the modes; none made under them is narrow."""
        return isinstance(t, Tensor) and (t.dtype in WIDER or _address(t) not in self.made)

    def adopt(self, t: Tensor) -> Tensor:
        """A float64 tensor that may be written in place of the outside tensor `t`."""
        where = _address(t)
        if not where:
            return t.to(WIDER.get(t.dtype, t.dtype), copy=True)
        found = self.stand_ins.setdefault(where, _StandIn(t.detach(), _flat(t)))
        if not found.owned:
            wide = WIDER.get(found.flat.dtype, found.flat.dtype)
            found.flat, found.owned = found.flat.to(wide, copy=True), True
        return found.view(t)

    def override(self, values: Mapping[Tensor, Tensor]) -> None:
        """Let every alias of each key read its value, borrowed as it is where it can be."""
        for t, value in values.items():
            sorts = [(v.shape, v.device, v.is_floating_point(), v.is_complex()) for v in (t, value)]
            if sorts[0] != sorts[1]:
                raise LensError(f"{_words(value)} cannot be read in place of {_words(t)}")
            whole = t.is_contiguous() and t.nbytes == t.untyped_storage().nbytes()
            if whole and _address(t) not in self.stand_ins:
                real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
                self.stand_ins[_address(t)] = _StandIn(t.detach(), real.detach().reshape(-1))
            else:
                self.adopt(t).copy_(value)
        shared = values if len({_address(t) for t in values}) < len(values) else {}
        for t, value in shared.items():
            if not torch.allclose(self.widen(t), self.widen(value), 0, 0, equal_nan=True):
                raise LensError(f"two overrides share a storage and differ: one is of {_words(t)}")

    def record(self, out: Any, args: Args) -> None:
        """Remember what an operator made, unless it handed one of its arguments through."""
        if isinstance(out, (tuple, list)):
            for part in out:
                self.record(part, args)
        elif isinstance(out, Tensor) and (where := _address(out)) not in self.made:
            if all(where != _address(a) for a in args if isinstance(a, Tensor)):
                self.made.add(where)

    def restore_shapes(self) -> None:
        """Undo what `unsqueeze_` and its like did to outside tensors."""
        while self.reshaped:
            t, was = self.reshaped.pop()
            t.as_strided_(was.shape, was.stride(), was.storage_offset())


class _Operators(TorchDispatchMode):
    """Sees every operator, below autograd, whoever calls it."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        # An operator that no Python call announced arrives with the upper mode still on.
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        kind = _kind(func)
        if kind.composite and (kind.view or kind.writes):
            with self:
                return func.decompose(*args, **kwargs)
        if kind.view:
            if func is aten.view.dtype:
                _check_bits(*args)
            # A view of an outside tensor stays one, so that what is written to it is found.
            return func(*args, **kwargs)
        if kind.writes:
            out = self._write(func, kind, args, kwargs)
        elif kind.name in MOVES:
            moved = partial(func, self.memory.current(args[0]))
            out = self.memory.widen(self.memory.call(moved, args[1:], kwargs))
        else:
            out = self.memory.call(KERNELS.get(func, func), args, kwargs)
        self.memory.record(out, (*args, *kwargs.values()))
        return out

    def _write(self, func: Any, kind: _Kind, args: Args, kwargs: Kwargs) -> Any:
        memory = self.memory
        swapped: list[tuple[Tensor, Tensor]] = []

        def target(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return [target(v) for v in value]
            if not memory.is_outside(value):
                return value
            if kind.name == "set_":
                raise _not_its_own(value)
            if torch.Tag.inplace_view in func.tags:
                memory.reshaped.append((value, value.detach()))
                return value
            swapped.append((memory.adopt(value), value))
            return swapped[-1][0]

        names = kind.writes.values()
        out = func(
            *(target(a) if i in kind.writes else memory.widen(a) for i, a in enumerate(args)),
            **{k: target(v) if k in names else memory.widen(v) for k, v in kwargs.items()},
        )
        for stand_in, value in swapped:
            if stand_in.shape != value.shape:
                raise _not_its_own(value)
        return _swap(out, swapped)


def _check_bits(t: Tensor, dtype: torch.dtype) -> None:
    if t.dtype is not dtype and (t.is_floating_point() or dtype.is_floating_point):
        raise LensError(f"bits of {t.dtype} read as {dtype} are others in float64")


def _swap(out: Any, swapped: list[tuple[Tensor, Tensor]]) -> Any:
    """The outside tensors in place of what was written for them, since callers test with `is`."""
    if isinstance(out, (tuple, list)):
        return type(out)(_swap(part, swapped) for part in out)
    return next((value for stand_in, value in swapped if stand_in is out), out)


class _Calls(TorchFunctionMode):
    """Sees the calls that Python makes, before composite operators fall apart."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is torch.ops.lensfx.opaque.default:
            with self:
                return opaque_of(args[0]).forward(*args[1:])
        if isinstance(func, HigherOrderOperator):
            if func._name != "cond":
                raise LensError(f"the operator {func._name} runs a program behind float64's back")
            with self:
                return (args[1] if args[0] else args[2])(*args[3])
        if name == "__get__":
            value = func(*args)
            return WIDER.get(value, value) if isinstance(value, torch.dtype) else value
        if name in ("tensor", "new_tensor", "as_tensor", "asarray"):
            return self._construct(name, func, args, kwargs)
        args, kwargs = self._spelled(name, func, args, kwargs)
        wide = name in LOOKS or name in WRAPPERS or name in RMS_NORMS or _is_free(func)
        out = kwargs.get("out")
        if not wide or (out is not None and not self.memory.is_outside(out)):
            return func(*args, **kwargs)
        if out is None:
            return self.memory.call(func, args, kwargs)
        return self._put(out, self.memory.call(func, args, {**kwargs, "out": None}))

    def _put(self, out: Tensor, value: Tensor) -> Tensor:
        """Write to the outside tensor `out` what a composite would not, since the dtypes differ."""
        if out.shape != value.shape:
            raise _not_its_own(out)
        return out.copy_(value)

    def _construct(self, name: str, func: Any, args: Args, kwargs: Kwargs) -> Any:
        args = tuple(WIDER.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        dtype = kwargs.get("dtype") or (args[0].dtype if name == "new_tensor" else None)
        if dtype is not None:
            kwargs = {**kwargs, "dtype": WIDER.get(dtype, dtype)}
        out = func(*args, **kwargs)
        if name in ("tensor", "new_tensor"):
            self.memory.record(out, ())
        return out

    def _spelled(self, name: str, func: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a call, with nothing left to take from a smaller dtype."""
        if name == "__set__" and func.__self__ is torch.Tensor.data:
            if self.memory.is_outside(args[0]):
                raise _not_its_own(args[0])
        if name == "__setitem__" and isinstance(args[2], (float, complex)):
            return (*args[:2], torch.tensor(args[2])), kwargs
        given = kwargs.get("eps", args[3] if len(args) > 3 else None)
        if name not in RMS_NORMS or given is not None:
            return args, kwargs
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        narrow = self.memory.narrow or any(t.dtype in WIDER for t in tensors)
        # The kernels compute in float32 for all smaller dtypes, and take their eps from there.
        eps = torch.finfo(torch.float32 if narrow else torch.float64).eps
        return args[:3], {**kwargs, "eps": eps}


class Float64:
    """Within the block every operator computes in float64, and nothing outside it changes.

    Every floating tensor is widened at each use, every dtype argument that names a smaller float
    names float64, the default dtype is float64, autocast and gradients are off. So casts to
    a smaller dtype and back change nothing, and a float32 norm inside a bfloat16 model is the
    norm. A weight is widened at each use and dropped: only what is written to is held twice.

    `overrides` maps outside tensors, mostly parameters, to what is read in their place by every
    alias of them: ties, views, detached copies. `dtype` is what the program was written for, where
    its tensors do not show it: that decides the eps of an `rms_norm` that is given none.

    Raises: LensError, in the block, where bits of a float are read as an integer, where an outside
    tensor would get other data or another size, and for operators that run programs, but `cond`.
    """

    def __init__(
        self, overrides: Mapping[Tensor, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._overrides, self._narrow = dict(overrides or {}), dtype in WIDER
        self._memory = _Memory(self._narrow)
        self._stack = ExitStack()

    def __enter__(self) -> Float64:
        if any(isinstance(mode, _Operators) for mode in _get_current_dispatch_mode_stack()):
            raise LensError("a Float64 block is open already, and they do not nest")
        memory = self._memory = _Memory(self._narrow)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            memory.override(self._overrides)
            stack.callback(memory.restore_shapes)
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
            # A cast that is cached on one side of the border would be read on the other.
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
            for mode in (torch._C._DisableAutocast(), _Operators(memory), _Calls(memory)):
                stack.enter_context(mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def read(self, tree: T) -> T:
        """What the block made of each tensor in `tree`, floats in float64; within it or after it.

        An output can be an outside tensor: an input that was written to and returned, or a weight.
        """
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return cast(T, pytree.tree_map_only(Tensor, self._memory.widen, tree))
