"""Norms with a divisor that is given: what they are called, what they read, and the given number.

A number kept from one call is read through an operator that compares the sizes of the call with
its own, since broadcasting would hide that it belongs to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lensfx.analysis.norms import NORMS
from lensfx.analysis.structure import structure
from lensfx.errors import GuardError, PipelineError
from lensfx.graph.compiled import probe
from lensfx.graph.names import native_name
from lensfx.graph.node import argument, arguments, dtype_of, is_op, is_weight, module_path, shape_of
from lensfx.graph.program import Program, copy_graph
from lensfx.graph.views import same_size
from lensfx.rewrite import At

__all__ = [
    "divisor",
    "divisors_in",
    "fitted",
    "norm_inputs",
    "norm_names",
    "norms_at",
    "read_kept",
]

Names = Mapping[fx.Node, tuple[str, ...]]

_LIBRARY = torch.library.Library("lensfx", "FRAGMENT")
_LIBRARY.define("frozen(Tensor value, SymInt[] sizes, str site) -> Tensor")


@torch.library.impl(_LIBRARY, "frozen", "CompositeExplicitAutograd")
def _frozen(value: torch.Tensor, sizes: Iterable[int], site: str) -> torch.Tensor:
    given = list(sizes)
    if not value.is_meta and list(value.shape) != given:
        raise GuardError(
            f"{site} is frozen at a call of sizes {list(value.shape)[:-1]}, and this one has "
            f"{given[:-1]}",
            at=site,
            hint="call it with inputs of those sizes, or freeze it at this call",
        )
    return value.clone()


@torch.library.impl(_LIBRARY, "frozen", "Meta")
def _frozen_nowhere(value: torch.Tensor, sizes: Iterable[int], site: str) -> torch.Tensor:
    return value.new_empty(list(sizes))


# The value itself, if the sizes of the call are those it was kept at; else a GuardError.
_read: Any = torch.ops.lensfx.frozen.default


def read_kept(at: At, x: fx.Node, kept: fx.Node, site: str) -> fx.Node:
    """A read of `kept`, one number for each row of `x`; an error where `x` has other sizes."""
    rows = [
        at.call(torch.ops.aten.sym_size.int, x, i) if isinstance(size, torch.SymInt) else size
        for i, size in enumerate((shape_of(x) or ())[:-1])
    ]
    return at.call(_read, kept, [*rows, 1], site)


def norm_names(program: Program) -> dict[fx.Node, tuple[str, ...]]:
    """What each norm that is one operator can be called: node, native, module and hook names."""
    norms = [n for n in program.graph.nodes if is_op(n, *NORMS) and not is_weight(n)]
    names = {n: [n.name, native_name(n), module_path(n)] for n in norms}
    for point in structure(program).points if norms else ():
        if point.part == "scale" and point.node in names:
            names[point.node] += [point.name, point.name.rpartition(".")[0]]
    return {n: tuple(dict.fromkeys(filter(None, found))) for n, found in names.items()}


def norms_at(names: Names, at: Sequence[str], done: Iterable[Sequence[str]]) -> list[fx.Node]:
    """The norms that the names in `at` stand for, or all; a name may be of a module around one.

    Raises: PipelineError for a name that is of no norm, nor of one that was frozen before.
    """
    for name in at:
        if not any(_is_named(name, own) for own in (*names.values(), *done)):
            raise _unknown(name, names)
    return [n for n, own in names.items() if not at or any(_is_named(name, own) for name in at)]


def divisors_in(scales: Mapping[str, torch.Tensor], names: Names) -> dict[fx.Node, torch.Tensor]:
    """What `scales` has for each norm.

    Raises: PipelineError if that is nothing for any of them.
    """
    known = set(scales)
    found = {n: scales[k] for n, own in names.items() for k in own if k in known}
    if names and not found:
        raise _unknown(next(iter(known), ""), names)
    return found


def _is_named(name: str, own: Sequence[str]) -> bool:
    return any(known == name or known.startswith(f"{name}.") for known in own)


def _unknown(name: str, names: Names) -> PipelineError:
    there = ", ".join(own[-2 if len(own) > 3 else -1] for own in names.values()) or "none at all"
    return PipelineError(
        f"there is no norm at {name!r}", hint=f"choose from the norms that there are: {there}"
    )


def norm_inputs(program: Program, norms: Iterable[fx.Node]) -> Callable[[], dict[str, Any]]:
    """A function that runs the example call and gives what each norm reads, by the norm's name."""
    wanted = {n.name: argument(n, "input") for n in norms}
    graph, _ = copy_graph(program.graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default):
        # Run in float64, the kernel would take another eps than in the dtype of this node.
        node.args, node.kwargs = (), {**arguments(node), "eps": _eps(node)}
    run, weights = probe(graph, [x.name for x in wanted.values()])
    tensors = [program.tensors[w] for w in weights]

    def read() -> dict[str, Any]:
        found = run(None, *(t.clone() for t in program.example), *tensors)
        values = found[len(found) - len(wanted) :]
        return dict(zip(wanted, values, strict=True))

    return read


def divisor(norm: fx.Node, x: torch.Tensor) -> torch.Tensor:
    """What a norm divides by where it reads `x`: [..., 1]."""
    x = x.double()
    if is_op(norm, torch.ops.aten.layer_norm.default):
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1, keepdim=True) + _eps(norm)).sqrt()


def _eps(norm: fx.Node) -> float:
    eps = argument(norm, "eps")
    if eps is not None:
        return float(eps)
    # Kernels compute in float32 for all smaller dtypes, and take their eps from there.
    wide = dtype_of(norm) == torch.float64
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def fitted(norm: fx.Node, scale: torch.Tensor | None) -> torch.Tensor | str:
    """A given divisor in float64 and in the shape that the norm needs, or why it is none."""
    if len(argument(norm, "normalized_shape")) != 1:
        return "it normalises over several axes, and a divisor is for the last one"
    if scale is None:
        return "no divisor was given for it"
    shape = [*(shape_of(argument(norm, "input")) or ())[:-1], 1]
    if len(shape) == 2 and scale.ndim > 2:
        scale = scale.reshape(-1, 1)
    dynamic = [isinstance(size, torch.SymInt) for size in shape]
    fits = len(shape) == scale.ndim and all(
        free or same_size(a, b) for a, b, free in zip(shape, scale.shape, dynamic, strict=True)
    )
    if not fits:
        return f"its divisor has the shape {list(scale.shape)}, and it needs {_shown(shape)}"
    scale = scale.detach().double()
    if not bool((scale.isfinite() & (scale != 0)).all()):
        return "its divisor is 0 or no number somewhere"
    return scale


def _shown(shape: Iterable[Any]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
