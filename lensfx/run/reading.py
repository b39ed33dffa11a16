"""What a run is asked for and what went wrong in it: names to keep, where to stop, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lensfx.analysis import Structure
from lensfx.analysis.structure.points import block_prefix
from lensfx.errors import GuardError, HookError, LensError
from lensfx.graph.choice import OtherPathError
from lensfx.run.hooks import HookFunction, HookPoint
from lensfx.run.names import NameFilter, Names
from lensfx.run.variants import Variant

__all__ = ["collector", "kept", "path_changed", "scalar", "stop_name"]


def stop_name(found: Structure, names: Names, layer: int | None) -> str | None:
    """The name of the stream before a block of the main stream; None for no layer.

    Raises: LensError if there is no such block, or no stream.
    """
    if layer is None:
        return None
    prefix = block_prefix(found.streams, len(found.streams) - 1) if found.streams else ""
    if f"{prefix}.0.hook_resid_pre" not in names.places:
        raise LensError(
            "stop_at_layer needs a residual stream, and none was found in this model",
            hint="look at lens.report for where the search ended",
        )
    count = len(found.blocks)
    index = layer + count if layer < 0 else layer
    if not 0 <= index <= count:
        raise LensError(
            f"stop_at_layer={layer}, but there are {count} blocks", hint="print(lens.structure)"
        )
    if index == count:
        return f"{prefix}.{count - 1}.hook_resid_post"
    return f"{prefix}.{index}.hook_resid_pre"


def path_changed(error: OtherPathError, hooked: bool) -> GuardError:
    """Why a run left the path that was found for it."""
    if hooked:
        return GuardError(
            f"a hook changes the path: what decides it is {error.value!r} under these hooks",
            at=error.site,
            hint="edit behind that line, or pass an input that takes the other path",
        )
    return GuardError(
        "this call took one path when it was looked at and takes another now: what decides it is "
        f"{error.value!r}",
        at=error.site,
        hint="run the model twice on this call; if it agrees with itself, wrap it with passes=None",
    )


def kept(variant: Variant, wanted: NameFilter, stop: str | None) -> list[str]:
    """The names to keep; those behind the stop are left out, or refused if they were written out.

    Raises: UnknownNameError, LensError.
    """
    names = variant.names.resolve(wanted)
    if stop is None:
        return names
    upstream = variant.runs.upstream(stop)
    inside = [n for n in names if variant.names.places[n].node in upstream]
    explicit = wanted is not None and not callable(wanted)
    if explicit and len(inside) < len(names):
        late = next(n for n in names if n not in inside)
        raise LensError(
            f"{late} is not computed before {stop}, where this run stops",
            hint="ask for a later stop_at_layer, or for names before it",
        )
    return inside


def collector(
    variant: Variant, names: Sequence[str], grads: dict[str, torch.Tensor]
) -> dict[str, HookFunction]:
    """Backward hooks that keep the gradients of these names, of those that the outputs rest on."""

    def collect(grad: torch.Tensor, hook: HookPoint) -> None:
        # A leaf behind the value may keep this very tensor as its `grad` and add to it later.
        grads[hook.name] = grad.detach().clone()

    live = variant.runs.upstream_of_outputs()
    return {n: collect for n in names if variant.names.places[n].node in live}


def scalar(out: Any) -> torch.Tensor:
    """The one scalar result that gradients start from.

    Raises: HookError if there is none, or several.
    """
    flat = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    scalars = [t for t in flat if t.ndim == 0 and t.requires_grad]
    if len(scalars) != 1:
        raise HookError(
            f"incl_bwd needs one scalar result to start from; this call has {len(scalars)}",
            hint="call with labels or targets so that the model returns a loss",
        )
    return scalars[0]
