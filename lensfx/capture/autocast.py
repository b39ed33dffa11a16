"""Autocast regions written out: every cast that autocast makes becomes a node of its own.

What autocast does to an operator is found by running it on its fake arguments, once with autocast
on and once on arguments that are cast beforehand: the two must run the same kernels on the same
dtypes. No operator is known by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lensfx.capture.patching import patched
from lensfx.errors import CaptureError
from lensfx.graph.node import module_path, op_name, where

__all__ = ["SWITCHES", "Autocast", "flat_regions"]

aten = torch.ops.aten
# What opens and closes regions in a graph that was exported under `flat_regions`.
SWITCHES = (
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
)
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
_COMPOSITE = "CompositeImplicitAutograd"


@contextlib.contextmanager
def flat_regions() -> Iterator[None]:
    """Export inside leaves the entry and the exit of each region in the graph, as it traced them.

    Made into operators, regions lose a no_grad that is inside an autocast, and with it the
    gradients; and an autocast falls into parts, each with casts of its own.
    """
    with contextlib.ExitStack() as stack:
        for module, name in _REGION_PASSES:
            kept = {name: lambda graph, signature: (graph, signature)}
            stack.enter_context(patched(module, **kept))
        yield


_REGION_PASSES = (
    (replace_autocast_with_hop_pass, "replace_autocast_with_hop_pass"),
    (replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass"),
)


class Autocast:
    """The autocast regions that are open while a graph is copied, and the casts made in them.

    `tensors` holds what the get_attr nodes of the copy name. A float32 leaf is cast once between
    the entry of the outermost region and its end, as autocast's cache does it: with one cast for
    each reader the gradient would be the same sum in another order.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._open: list[tuple[str, torch.dtype | None, bool]] = []
        self._leaves: dict[tuple[Any, torch.dtype], fx.Node] = {}

    def enter(self, device: str, dtype: torch.dtype | None, enabled: bool) -> None:
        """What is copied from here on belongs to a region with these settings."""
        self._open.append((device, dtype, enabled))

    def leave(self) -> None:
        """The innermost region is at its end."""
        self._open.pop()
        if not self._open:
            self._leaves.clear()

    def write_out(self, node: fx.Node) -> None:
        """Put before a copied node what autocast does to its arguments, as nodes.

        Raises: CaptureError where no cast of the arguments gives what autocast computes.
        """
        if not any(enabled for _, _, enabled in self._open) or not self._may_act_on(node):
            return
        flat, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in flat]
        operator: Any = node.target
        wanted = _Run(operator, values, spec, regions=self._open)
        if wanted.error is None and _Run(operator, values, spec).does(wanted):
            return
        if wanted.error is None and not operator._schema.is_mutable:
            for target, extra, casts in _candidates(node, wanted.casts):
                tried = _Run(target, values, spec, casts=casts, extra=extra)
                if tried.does(wanted) and _fits(tried.result, node.meta["val"]):
                    for i, dtype in casts.items():
                        flat[i] = self._cast(flat[i], dtype, node)
                    args, kwargs = pytree.tree_unflatten(flat, spec)
                    node.target, node.args, node.kwargs = target, args, {**kwargs, **extra}
                    return
        raise CaptureError(
            f"what autocast does inside {op_name(node)} cannot be written as casts of its inputs",
            at=where(node),
            hint="write the casts out around it: x.to(torch.bfloat16)",
        ).inside(module_path(node)) from wanted.error

    def _may_act_on(self, node: fx.Node) -> bool:
        """Whether autocast has a rule for the operator, or for one that it is composed of."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        given = [n.meta.get("val") for n in node.all_input_nodes]
        if not (_holds_floats(given) and _holds_floats(node.meta.get("val"))):
            return False
        keys = [
            _COMPOSITE,
            *(f"Autocast{_KEYS.get(d, d.upper())}" for d, _, on in self._open if on),
        ]
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return any(has(node.target.name(), key) for key in keys)

    def _cast(self, value: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        key = (self._leaf(value), dtype)
        if key[0] is not None and key in self._leaves:
            return self._leaves[key]
        with reader.graph.inserting_before(reader):
            cast = reader.graph.call_function(aten.to.dtype, (value, dtype))
        cast.meta = {**reader.meta, "val": value.meta["val"].detach().to(dtype)}
        if key[0] is not None:
            self._leaves[key] = cast
        return cast

    def _leaf(self, value: fx.Node) -> Any:
        """What tells a float32 leaf from others; None for what autocast does not cache."""
        if value.meta["val"].dtype != torch.float32:
            return None
        if value.op == "get_attr":
            return id(self._tensors[str(value.target)])
        # An input that wants a gradient is a leaf wherever the graph is run for its own sake.
        return value if value.op == "placeholder" else None


_KEYS = {"cpu": "CPU", "cuda": "CUDA", "privateuseone": "PrivateUse1"}


class _Run(TorchDispatchMode):
    """What an operator runs on fake arguments: its kernels, and the casts of its own arguments.

    A value stands for itself and all its views: a cast of a view is a view of the cast.
    """

    def __init__(
        self,
        target: Any,
        values: Sequence[Any],
        spec: pytree.TreeSpec,
        *,
        regions: Sequence[tuple[str, torch.dtype | None, bool]] = (),
        casts: Mapping[int, torch.dtype] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.kernels: list[Any] = []
        self.casts: dict[int, torch.dtype] = {}
        self.result: Any = None
        self.error: Exception | None = None
        # By identity: which argument a tensor is a view of, the dtypes it went through, itself.
        self._known: dict[int, tuple[int | None, tuple[torch.dtype, ...], torch.Tensor]] = {}
        given = [self._given(i, v, (casts or {}).get(i)) for i, v in enumerate(values)]
        args, kwargs = pytree.tree_unflatten(given, spec)
        with contextlib.ExitStack() as stack:
            # Composites in C++ read sizes as numbers, which would fix those that are symbols.
            stack.enter_context(enable_python_dispatcher())
            stack.enter_context(torch.no_grad())
            if not regions:
                stack.enter_context(torch._C._DisableAutocast())
            for device, dtype, enabled in regions:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
            stack.enter_context(self)
            try:
                self.result = target(*args, **kwargs, **(extra or {}))
            except Exception as error:
                self.error = error
        results = [r for r in pytree.tree_leaves(self.result) if isinstance(r, torch.Tensor)]
        self.kernels.append(tuple(self._chain(r) for r in results))

    def does(self, other: _Run) -> bool:
        """Whether both ran, the same kernels on the same dtypes."""
        return self.error is None and self.kernels == other.kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, noted as a kernel, a cast or a view."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CASTS and isinstance(out, torch.Tensor) and out.device == args[0].device:
            root, chain = self._seen(args[0])
            self._note(out, root, (*chain, out.dtype))
            if root is not None and len(chain) == 1:
                self.casts[root] = out.dtype
            return out
        if not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(out)):
            return out
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [v for v in leaves if isinstance(v, torch.Tensor)]
        plain = tuple(_plain(v) for v in leaves if not isinstance(v, torch.Tensor))
        if func.is_view:
            for made in pytree.tree_leaves(out):
                self._note(made, *self._seen(tensors[0]))
            self.kernels.append((func, plain))
        else:
            self.kernels.append((func, plain, tuple(self._chain(t) for t in tensors)))
        return out

    def _given(self, index: int, value: Any, dtype: torch.dtype | None) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # One tensor given twice is two arguments.
        given = value.detach() if dtype is None else value.detach().to(dtype)
        self._note(given, index, (value.dtype,) if dtype is None else (value.dtype, dtype))
        return given

    def _note(self, tensor: torch.Tensor, root: int | None, chain: tuple[torch.dtype, ...]) -> None:
        self._known[id(tensor)] = (root, chain, tensor)

    def _seen(self, tensor: torch.Tensor) -> tuple[int | None, tuple[torch.dtype, ...]]:
        root, chain, _ = self._known.get(id(tensor), (None, (tensor.dtype,), tensor))
        return root, chain

    def _chain(self, tensor: torch.Tensor) -> tuple[torch.dtype, ...]:
        return self._seen(tensor)[1]


def _candidates(
    node: fx.Node, casts: dict[int, torch.dtype]
) -> Iterator[tuple[Any, dict[str, Any], dict[int, torch.dtype]]]:
    """Ways to write an operator: its spellings, with all casts or without those of its own."""
    kinds = dict.fromkeys(casts.values())
    some = [{i: d for i, d in casts.items() if d == kind} for kind in kinds if len(kinds) > 1]
    for target, extra in _spellings(node):
        for chosen in (casts, *some, *([{}] if casts else ())):
            yield target, extra, chosen


def _spellings(node: fx.Node) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The operator as it stands, and told the dtype to compute in, by any overload that asks it.

    Autocast asks reductions for a float32 result instead of casting what they read.
    """
    yield node.target, {}
    target: Any = node.target
    dtype = getattr(node.meta["val"], "dtype", None)
    names = {a.name for a in target._schema.arguments}
    packet = target.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        asked = {a.name for a in overload._schema.arguments}
        if asked == names | {"dtype"} and not overload._schema.is_mutable:
            given = node.args[: len(target._schema.arguments)]
            if "dtype" not in node.kwargs and len(given) == len(node.args):
                yield overload, {"dtype": dtype}


def _plain(value: Any) -> str:
    """A number or a flag as text; torch spells a known fraction in more than one way."""
    if isinstance(value, torch.SymFloat) and value.node.expr.is_number:
        return repr(float(value.node.expr))
    return str(value)


def _holds_floats(values: Any) -> bool:
    leaves = pytree.tree_leaves(values)
    return any(
        isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in leaves
    )


def _fits(made: Any, traced: Any) -> bool:
    """Whether two results have the same tensors by dtype and rank."""
    ours, theirs = (
        [(v.dtype, v.ndim) for v in pytree.tree_leaves(r) if isinstance(v, torch.Tensor)]
        for r in (made, traced)
    )
    return ours == theirs
