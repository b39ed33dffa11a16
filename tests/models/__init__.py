"""Tiny models to test on, written the way other people write theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import (
    attentions,
    branching,
    containers,
    encdec,
    hf,
    library_masks,
    llamalike,
    moe,
    nanogpt,
    oddities,
    recurrent,
    untraceable,
    variants,
    vision,
    weights,
    xt,
    xt_more,
)
from .case import Case, Inputs, randomise
from .stranger import Stranger

__all__ = [
    "CASES",
    "STRANGERS",
    "TRAINED",
    "Case",
    "Inputs",
    "Stranger",
    "randomise",
    "selfcheck",
]

CASES: dict[str, Case] = {
    case.name: case
    for family in (hf, nanogpt, llamalike, encdec, xt, oddities)
    for case in family.CASES
}
# Apart, because one of these takes longer than all of the tiny models together.
TRAINED: dict[str, Case] = {case.name: case for case in hf.TRAINED}
# Models of all kinds, which are captured, but not folded, hooked and proved like the CASES.
STRANGERS: dict[str, Stranger] = {
    stranger.name: stranger
    for family in (
        variants,
        attentions,
        moe,
        recurrent,
        vision,
        containers,
        weights,
        branching,
        library_masks,
        untraceable,
        xt_more,
    )
    for stranger in family.STRANGERS
}


def selfcheck() -> bool:
    """Print one line for each model; true if all of them run, repeat and export."""
    total = len(CASES) + len(TRAINED)
    good = 0
    for case in (*CASES.values(), *TRAINED.values()):
        faults = _faults(case)
        good += not faults
        args, kwargs = case.inputs(2, 7, 0)
        spread = float(_tensors(_call(case.build(), args, kwargs))[0].float().std())
        print(f"{case.name:26} std {spread:7.3f}  {'; '.join(faults) or 'ok'}", flush=True)
    print(f"{good} of {total} ok")
    return good == total


def _faults(case: Case) -> list[str]:
    faults = []
    sizes = [(2, 7), (3, 11), (1, 5), (2, 1), (1, 1), (2, case.max_length)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = case.build().to(dtype)
        if model.training:
            faults.append("in training mode")
        for size in sizes:
            what = f"{dtype} at {size}"
            args, kwargs = case.inputs(*size, 0)
            try:
                outputs = _tensors(_call(model, args, kwargs))
                if not all(bool(output.isfinite().all()) for output in outputs):
                    faults.append(f"{what}: not finite")
            except Exception as error:
                faults.append(f"{what}: {_brief(error)}")
    if case.name in CASES:
        faults += _unmoved(case.build())
    args, kwargs = case.inputs(2, 7, 0)
    first = _tensors(_call(case.build(), args, kwargs))
    state = torch.get_rng_state()
    torch.manual_seed(12345)
    model = case.build()
    torch.set_rng_state(state)
    second = _tensors(_call(model, *case.inputs(2, 7, 0)))
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        faults.append("two builds differ")
    try:
        exported = torch.export.export(model, args, kwargs, strict=False)
        third = _tensors(_call(exported.module(), args, kwargs))
        if not all(torch.equal(a, b) for a, b in zip(first, third, strict=True)):
            faults.append("the exported graph gives other numbers")
    except Exception as error:
        faults.append(f"export: {_brief(error)}")
    return faults


def _unmoved(model: nn.Module) -> list[str]:
    """The parameters that still look initialised."""
    return [
        f"{name} is constant"
        for name, parameter in model.named_parameters()
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
    ]


@torch.no_grad()
def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
