"""One architecture through capture: what came out, as a flat record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lensfx

from .architectures import Architecture
from .builder import Built, build

Record = dict[str, Any]
SHAPES = ((2, 9), (3, 7))


def trial(architecture: Architecture) -> Iterator[Record]:
    """What is known so far, after each step, so that a step that never ends leaves the others."""
    record: Record = {"name": architecture.class_name, "task": architecture.task}
    yield record | {"outcome": "not built", "why": "no time left"}
    try:
        built = build(architecture)
    except Exception as error:
        yield record | {"outcome": "not built", "why": said(error)}
        return
    record |= {"inputs": str(built.plan), "rules": str(built.rules)}
    yield record | {"outcome": "failed", "why": "no time left"}
    yield record | captured(built)


def captured(built: Built) -> Record:
    """How capture of a built model went: outcome, why, seconds, nodes, axes, gradients."""
    start = time.process_time()
    try:
        program = lensfx.capture(built.model, **built.inputs(*SHAPES[0]))
    except lensfx.LensError as error:
        why = {"why": error.headline, "at": error.at, "cause": cause_of(error)}
        return {"outcome": "refused", **why, "seconds": time.process_time() - start}
    except Exception as error:
        why = {"why": said(error), "cause": cause_of(error)}
        return {"outcome": "failed", **why, "seconds": time.process_time() - start}
    record: Record = {
        "seconds": time.process_time() - start,
        "nodes": len(program.graph.nodes),
        "specialised": [a.label for a in program.guards.specialised],
        "dynamic": len(program.guards.dynamic),
        "relations": list(program.guards.relations)[:4],
        "guards": len(program.guards.relations),
        "notes": list(program.source.notes),
    }
    return record | _compared(built, program)


def _compared(built: Built, program: Any) -> Record:
    model = built.model
    if (difference := _difference(model, program, built.inputs(*SHAPES[0]))) is not None:
        return {"outcome": "wrong", "why": f"at the example's shape: {difference}"}
    record: Record = {"outcome": "captured", "gradients": _gradients(model, program, built)}
    try:
        other = built.inputs(*SHAPES[1])
        with torch.no_grad():
            model(**other)
    except Exception as error:
        return record | {"other_shape": f"the model fails there: {said(error)}"}
    try:
        difference = _difference(model, program, other)
    except lensfx.LensError as error:
        return record | {"other_shape": error.headline}
    if difference is not None:
        return record | {"outcome": "wrong", "why": f"at another shape: {difference}"}
    return record | {"other_shape": "bitwise"}


def _difference(model: nn.Module, program: Any, given: dict[str, Any]) -> str | None:
    """How program and model differ on a call, or None if they agree bitwise."""
    with torch.no_grad():
        want, got = _seeded(model, given), _seeded(program, given)
    wanted, want_spec = pytree.tree_flatten(want)
    result, got_spec = pytree.tree_flatten(got)
    if want_spec != got_spec:
        return "another type of result"
    for k, (a, b) in enumerate(zip(wanted, result, strict=True)):
        if isinstance(a, torch.Tensor) and not same(a, b):
            return f"output {k} differs by {relative_error(a, b):.1e}"
        if not isinstance(a, torch.Tensor) and type(a) in (int, float, str) and a != b:
            return f"output {k} is {b!r}, not {a!r}"
    return None


def _seeded(function: Any, given: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(**pytree.tree_map_only(torch.Tensor, torch.clone, given))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are alike bitwise, NaN counted as equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def _gradients(model: nn.Module, program: Any, built: Built) -> str:
    """How the parameters' gradients compare: bitwise, a relative error, or why there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    given = built.inputs(*SHAPES[0])
    try:
        want = _gradient(model, given, parameters)
    except Exception as error:
        return f"the model has none: {said(error)}"
    try:
        got = _gradient(program, given, parameters)
    except Exception as error:
        return f"fails: {said(error)}"
    pairs = list(zip(want, got, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        zero = all(
            x is None or not bool(x.any())
            for a, b in pairs
            if (a is None) != (b is None)
            for x in (a, b)
        )
        if not zero:
            return "missing"
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if all(same(a, b) for a, b in both):
        return "bitwise"
    # Against the largest of all: a gradient that is zero but for rounding has no size of its own.
    size = max(float(a.double().abs().max()) for a, _ in both if a.numel())
    error = max(float((a.double() - b.double()).abs().max()) for a, b in both if a.numel())
    return f"{error / max(size, 1e-30):.1e}"


def _gradient(function: Any, given: dict[str, Any], parameters: list[Any]) -> list[Any]:
    out = pytree.tree_leaves(_seeded(function, given))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for value in out:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad:
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            total = total + (value.nan_to_num(0.0, 0.0, 0.0) * noise).sum()
    return list(torch.autograd.grad(total, parameters, allow_unused=True))


def said(error: BaseException) -> str:
    """An error on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def cause_of(error: BaseException) -> str:
    """The innermost error behind an error, with the last line of the library's code."""
    import traceback

    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "transformers" in f.filename] or frames
    last = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno} {own[-1].line}" if own else ""
    return f"{said(error)} | {last}"
