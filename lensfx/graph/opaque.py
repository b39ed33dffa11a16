"""opaque: one operator that runs a module as it stands, where no graph of it can be had.

    lensfx::opaque(key, inputs, sizes, weights) -> [*outputs, *updated, *start]

`key` names an Opaque, which knows how to call the module. The operator writes to nothing: what
the module updates in place comes back as a value. `start` is what was there before: the old
values of the updated, then the random state. The backward is an operator of its own, which runs
the module once more from there and asks autograd.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lensfx.errors import GuardError, LensError
from lensfx.graph.opaque_call import Call, leaf, random_state

__all__ = [
    "Opaque",
    "OpaqueError",
    "Output",
    "Size",
    "is_opaque",
    "known_sizes",
    "lead_dtype",
    "opaque_of",
]

_Key = torch._C.DispatchKey


_LIVE: WeakValueDictionary[str, Opaque] = WeakValueDictionary()

_FORWARD = "(str key, Tensor[] inputs, SymInt[] sizes, Tensor[] weights) -> Tensor[]"
_BACKWARD = (
    "(str key, Tensor[] inputs, SymInt[] sizes, Tensor[] weights, Tensor state, "
    "Tensor?[] grads, bool[] wanted) -> Tensor[]"
)
_RETRY = "capture with an example of these sizes and values"


@dataclass(frozen=True)
class Size:
    """An output size: `factor` times the product of the known sizes numbered `of`, plus `more`.

    Known are the sizes of the inputs, axis by axis, and then the sizes that are given as such.
    """

    of: tuple[int, ...] = ()
    factor: int = 1
    more: int = 0

    def among(self, known: Sequence[Any]) -> Any:
        """The size, given all known sizes."""
        return math.prod((known[k] for k in self.of), start=self.factor) + self.more


@dataclass(frozen=True)
class Output:
    """What is declared of one output tensor; a size of None depends on the data.

    `order` lists the axes from the slowest in memory to the fastest.
    """

    sizes: tuple[Size | None, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    differentiable: bool = True


@dataclass(frozen=True, eq=False)
class Opaque:
    """One call of a module that is run as it stands: why, how, and what is declared of it.

    `results` are the flat results as `Call.leaves` are the arguments. `updates` numbers what the
    call changes in place, inputs first, then weights, and tells if that is differentiable;
    `reached` tells which inputs and weights a gradient can reach. `lead` is the float dtype that
    came in when the call was observed, `promised` are those that code may rely on. `state` is the
    room in bytes for the random state that a run starts from: whether a call draws may depend on
    its values.
    """

    path: str
    why: str
    call: Call
    spec: pytree.TreeSpec
    results: tuple[tuple[str, Any], ...]
    outputs: tuple[Output, ...]
    state: int
    updates: tuple[tuple[int, bool], ...] = ()
    reached: tuple[bool, ...] = ()
    lead: torch.dtype | None = None
    promised: set[torch.dtype | None] = field(default_factory=set, repr=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        # Compiled code is kept on disk by its text: a key stands for the same declaration always.
        declared = (self.outputs, self.updates, self.reached, self.lead, self.state)
        text = repr((_FORWARD, _BACKWARD, declared))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        key = free = f"{self.path}:{digest}"
        n = 0
        while free in _LIVE:
            n += 1
            free = f"{key}~{n}"
        object.__setattr__(self, "key", free)
        _LIVE[free] = self

    def declared(self, inputs: Sequence[Tensor], sizes: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The sizes of each output, None where they depend on the data."""
        known = known_sizes(inputs, sizes)
        return [tuple(s and s.among(known) for s in o.sizes) for o in self.outputs]

    def dtypes(self, tensors: Sequence[Tensor]) -> list[torch.dtype]:
        """The dtype of each output: one that came in with the call's floats follows them."""
        now = lead_dtype(tensors)
        return [_followed(o.dtype, self.lead, now) for o in self.outputs]

    def forward(
        self, inputs: Sequence[Tensor], sizes: Sequence[int], weights: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the operator returns: the outputs, what was updated, what it started from."""
        tensors = [*inputs, *weights]
        # A copy made outside would be made again in a compiled backward, after the update.
        start = [tensors[k].detach().clone() for k, _ in self.updates]
        state = random_state(self.call.sources(tensors)).ljust(self.state, b"\0")
        start.append(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        # Kernels give other last bits to operands that need no gradient.
        with torch.enable_grad():
            leaves = [leaf(t, t.is_floating_point()) for t in tensors]
            outputs, updated = self._run(self._given(leaves), sizes, len(inputs))
        made = []
        shapes, dtypes = self.declared(inputs, sizes), self.dtypes(tensors)
        # Code was compiled for these dtypes; a plain run takes what it gets, as autocast makes it.
        promised = lead_dtype(tensors) in self.promised and not _autocast(tensors)[2]
        for k, (value, output) in enumerate(zip(outputs, self.outputs, strict=True)):
            self._check(k, value, shapes[k], dtypes[k])
            # A copy, since the memory may be an input's, or one that the module keeps.
            dtype = dtypes[k] if promised else value.dtype
            empty = _empty(value.shape, dtype, value.device, output.order)
            made.append(empty.copy_(value.detach()))
        return [*made, *(u.detach().clone() for u in updated), *start]

    def _given(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        changed = [k for k, _ in self.updates]
        return [t.clone() if k in changed else t for k, t in enumerate(leaves)]

    def _run(
        self, given: Sequence[Tensor], sizes: Sequence[int], count: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The output tensors and the updated values of a run, checked to be as declared."""
        found, spec, left = self.call.run(given[:count], sizes, given[count:])
        if spec != self.spec:
            self._refuse(f"returned {spec}, not {self.spec} as when it was captured")
        tensors: list[Tensor] = []
        for k, (got, (kind, value)) in enumerate(zip(found, self.results, strict=True)):
            if kind == "tensor":
                if not isinstance(got, Tensor):
                    self._refuse(f"returned a {type(got).__name__} where it returned a tensor")
                tensors.append(got)
                continue
            if kind == "size":
                value = value.among(known_sizes(given[:count], sizes))
            if type(got) is not type(value) or got != value:
                self._refuse(f"returned {got!r} for result {k}, which was {value!r}")
        final = [*given[:count], *left]
        return tensors, [final[k] for k, _ in self.updates]

    def _check(self, k: int, value: Tensor, sizes: tuple[Any, ...], dtype: torch.dtype) -> None:
        shape = tuple(value.shape)
        fits = len(shape) == len(sizes)
        if not fits or any(w is not None and w != s for s, w in zip(shape, sizes, strict=True)):
            text = ", ".join("?" if s is None else str(s) for s in sizes)
            self._refuse(
                f"returned a tensor of sizes {shape} for output {k}, not ({text}) as declared"
            )
        if value.dtype != dtype and not (value.dtype.is_floating_point and dtype.is_floating_point):
            self._refuse(f"returned {value.dtype} for output {k}, which was {dtype}")

    def _refuse(self, what: str) -> NoReturn:
        raise OpaqueError(f"the opaque module {self.path} {what}", hint=_RETRY)

    def backward(
        self,
        inputs: Sequence[Tensor],
        sizes: Sequence[int],
        weights: Sequence[Tensor],
        state: Tensor,
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients of the wanted inputs and weights, from a second run."""
        tensors = [*inputs, *weights]
        leaves = [leaf(t, w) for t, w in zip(tensors, wanted, strict=True)]
        with self.call.undone(tensors, bytes(state.tolist())), torch.enable_grad():
            outputs, updated = self._run(self._given(leaves), sizes, len(inputs))
        asked = [t for t, w in zip(leaves, wanted, strict=True) if w]
        pairs = [
            (made.to(grad.dtype), grad)
            for made, grad in zip([*outputs, *updated], grads, strict=True)
            if grad is not None and made.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if pairs:
            ends, starts = zip(*pairs, strict=True)
            found = torch.autograd.grad(ends, asked, starts, allow_unused=True)
        return [_like(g, t) for g, t in zip(found, asked, strict=True)]


class OpaqueError(GuardError):
    """An opaque module does on this call what it did not do on any that was observed."""


def is_opaque(node: Any) -> bool:
    """Whether a node runs a module as it stands."""
    target = getattr(node, "target", None) if isinstance(node, fx.Node) else None
    return target is torch.ops.lensfx.opaque.default


def opaque_of(key: str) -> Opaque:
    """The call that a key names.

    Raises: LensError if no graph holds it any more.
    """
    found = _LIVE.get(key)
    if found is None:
        raise LensError(
            f"nothing is known of the opaque module {key}, its program is gone",
            hint="keep the program, or the graph's node.meta['opaque'], for as long as you run it",
        )
    return found


def known_sizes(inputs: Sequence[Tensor], sizes: Sequence[Any]) -> list[Any]:
    """All sizes that output sizes may be made of."""
    return [*(s for t in inputs for s in t.shape), *sizes]


def lead_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of the first floating tensor."""
    return next((t.dtype for t in tensors if t.is_floating_point()), None)


def _followed(seen: torch.dtype, lead: torch.dtype | None, now: torch.dtype | None) -> torch.dtype:
    if (
        lead is None
        or now is None
        or lead is now
        or not (seen.is_floating_point or seen.is_complex)
    ):
        return seen
    if seen.is_complex:
        return torch.promote_types(now, torch.complex32) if seen is lead.to_complex() else seen
    # An island of float32 stays one, unless all is computed in more.
    return now if seen is lead else torch.promote_types(seen, now)


def _autocast(tensors: Sequence[Tensor]) -> tuple[str, torch.dtype, bool]:
    kind = tensors[0].device.type if tensors else "cpu"
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


def _empty(sizes: Sequence[Any], dtype: torch.dtype, device: Any, order: Sequence[int]) -> Tensor:
    made = torch.empty([sizes[a] for a in order], dtype=dtype, device=device)
    return made.permute([order.index(a) for a in range(len(order))])


def _like(grad: Tensor | None, tensor: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(tensor)
    made = torch.empty_like(tensor)
    return made.copy_(grad)


@contextlib.contextmanager
def _below_nothing() -> Iterator[None]:
    """Autograd by dispatch key on again, which is off inside an operator, whatever grad mode is."""
    with contextlib.ExitStack() as stack:
        for key in (_Key.AutogradFunctionality, _Key.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


@torch.library.custom_op(
    "lensfx::opaque",
    mutates_args=(),
    schema=_FORWARD,
)
def _opaque(
    key: str, inputs: Sequence[Tensor], sizes: Sequence[int], weights: Sequence[Tensor]
) -> list[Tensor]:
    with _below_nothing():
        return opaque_of(key).forward(inputs, sizes, weights)


@torch.library.custom_op(
    "lensfx::opaque_backward",
    mutates_args=(),
    schema=_BACKWARD,
)
def _opaque_backward(
    key: str,
    inputs: Sequence[Tensor],
    sizes: Sequence[int],
    weights: Sequence[Tensor],
    state: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor]:
    with _below_nothing():
        return opaque_of(key).backward(inputs, sizes, weights, state, grads, wanted)


@_opaque.register_fake
def _(
    key: str, inputs: Sequence[Tensor], sizes: Sequence[Any], weights: Sequence[Tensor]
) -> list[Tensor]:
    opaque, tensors = opaque_of(key), [*inputs, *weights]
    opaque.promised.add(lead_dtype(tensors))
    device = tensors[0].device if tensors else torch.device("cpu")
    made = []
    for shape, dtype, output in zip(
        opaque.declared(inputs, sizes), opaque.dtypes(tensors), opaque.outputs, strict=True
    ):
        known = [torch.library.get_ctx().new_dynamic_size() if s is None else s for s in shape]
        made.append(_empty(known, dtype, device, output.order))
    made += [torch.empty_like(tensors[k]) for k, _ in (*opaque.updates, *opaque.updates)]
    return [*made, torch.empty(opaque.state, dtype=torch.uint8)]


@_opaque_backward.register_fake
def _(
    key: str,
    inputs: Sequence[Tensor],
    sizes: Sequence[Any],
    weights: Sequence[Tensor],
    state: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor]:
    pairs = zip([*inputs, *weights], wanted, strict=True)
    return [torch.empty_like(t) for t, w in pairs if w]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    key, given, sizes, weights = inputs
    opaque = ctx.opaque = opaque_of(key)
    ctx.sizes, ctx.count = sizes, len(given)
    tensors = [*given, *weights]
    carries = [o.differentiable for o in opaque.outputs] + [d for _, d in opaque.updates]
    start = output[len(carries) :]
    *before, state = start
    old = {k: t for (k, _), t in zip(opaque.updates, before, strict=True)}
    saved = [old.get(k, t) for k, t in enumerate(tensors)]
    ctx.save_for_backward(*saved, state)
    ctx.set_materialize_grads(False)
    carries += [False] * (len(output) - len(carries))
    ctx.mark_non_differentiable(*(t for t, c in zip(output, carries, strict=True) if not c))
    ctx.autocast = _autocast(tensors)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    first = ctx.count
    *tensors, state = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[1], *ctx.needs_input_grad[3]]
    wanted = [n and r for n, r in zip(needs, ctx.opaque.reached, strict=True)]
    carried = len(ctx.opaque.outputs) + len(ctx.opaque.updates)
    found: Iterator[Tensor] = iter(())
    if any(wanted) and any(g is not None for g in grads):
        given, weights = tensors[:first], tensors[first:]
        with torch.autocast(*ctx.autocast):
            asked = (ctx.opaque.key, given, ctx.sizes, weights, state, grads[:carried], wanted)
            found = iter(torch.ops.lensfx.opaque_backward(*asked))
    else:
        wanted = [False] * len(wanted)
    made = [next(found) if w else None for w in wanted]
    # Torch takes a list without sizes for one of tensors.
    sizes: list[Any] | None = None if len(ctx.sizes) else []
    return None, made[:first], sizes, made[first:]


_opaque.register_autograd(_backward, setup_context=_setup)
