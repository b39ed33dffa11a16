"""What is wrong with given weights, in words: names, shapes, dtypes, ties, all in one error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from lensfx.errors import RewriteError
from lensfx.graph.program import Program

__all__ = ["Problem", "is_empty", "misfit", "refuse", "refuse_missing", "untied", "without_values"]

_LISTED = 5
_MOST = 40
Problem = tuple[str, str]


def is_empty(tensor: Any) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor) or (isinstance(tensor, torch.Tensor) and tensor.is_meta)


def misfit(
    name: str, like: torch.Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype | None
) -> Problem | None:
    """What is wrong with a tensor of this shape and dtype; what is not known of it is right."""
    if shape is not None and shape != tuple(like.shape):
        return (
            f"{name} has the shape {shape} in the weights and {tuple(like.shape)} in the program",
            "capture a model built from the configuration that the weights belong to",
        )
    if dtype is not None and dtype != like.dtype:
        return (
            f"{name} is {dtype} in the weights and {like.dtype} in the program",
            f"capture the model in {dtype}, or give weights cast to {like.dtype}",
        )
    return None


def without_values(name: str, value: Any) -> Problem | None:
    """What is wrong with a value that is no tensor, or one without memory."""
    if not isinstance(value, torch.Tensor):
        return (
            f"{name} is of type {type(value).__name__} in the weights, not a tensor",
            "give the state dict itself, not what a training script saved around it",
        )
    if value.layout != torch.strided:
        return (f"{name} is sparse in the weights", "give it as a dense tensor: t.to_dense()")
    if is_empty(value):
        return (
            f"{name} holds no values in the weights either",
            "give a state dict, a checkpoint or a module whose tensors have memory",
        )
    return None


def untied(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> Iterator[Problem]:
    """The names that the model ties to the first one and the weights give other values."""
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        if not _same(tensors[0], tensor):
            yield (
                f"{names[0]} and {name} are one tensor in the model and differ in the weights",
                "capture a model in which they are not tied",
            )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or is_empty(a) or is_empty(b):
        return True
    if a.device == b.device and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    # By bytes, so that a NaN equals itself.
    first, second = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(first, second.to(first.device))


def refuse(program: Program, problems: Sequence[Problem]) -> None:
    """Raise one RewriteError for all problems, if there are any."""
    found = list(dict.fromkeys(problems))
    if not found:
        return
    headline, hint = found[0]
    lines: list[str] = []
    if len(found) > 1:
        headline = f"the weights are not those of {program.source.model}: {len(found)} do not fit"
        more = [f"{len(found) - _MOST} more"] if len(found) > _MOST else []
        lines = [*(text for text, _ in found[:_MOST]), *more]
        hint = "; ".join(dict.fromkeys(h for _, h in found))
    raise RewriteError(headline, at=lines, hint=hint)


def refuse_missing(program: Program, missing: list[str]) -> None:
    """Raise a RewriteError if weights that have to be given are not."""
    if not missing:
        return
    more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
    buffers = [n for n in missing if not _is_parameter(program, n)]
    if len(buffers) == len(missing):
        raise RewriteError(
            f"the weights do not hold {', '.join(buffers[:_LISTED])}{more}, buffers that the model "
            "computes when it is built",
            hint="build the model under lensfx.empty_weights(), which computes its buffers",
        )
    raise RewriteError(
        f"the weights do not hold {', '.join(missing[:_LISTED])}{more}",
        hint="name the weights as the model's state_dict does",
    )


def _is_parameter(program: Program | None, name: str) -> bool:
    while program is not None:
        if name in program.tensors:
            return isinstance(program.tensors[name], nn.Parameter)
        program = program.unfolded
    return False
