"""What transformers knows of its own models: cache types, patches for export, cached calls.

Nothing is imported unless the program has imported transformers already. All of it comes from
`transformers.exporters`, which is maintained together with the models.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lensfx.capture.failures import quiet
from lensfx.capture.untouched import untouched
from lensfx.errors import CaptureError, GuardError
from lensfx.graph.guards import Guards
from lensfx.graph.program import Program
from lensfx.graph.threads import one_at_a_time

__all__ = [
    "CachedCalls",
    "admit",
    "cached_calls",
    "empty_cache",
    "exporter_patches",
    "register_outputs",
]

CACHE = "past_key_values"


@dataclass(frozen=True)
class CachedCalls:
    """The calls that generation with a cache consists of, as a user makes them.

    `many` adds several tokens to a filled cache. `trials` are calls like it at small sizes: of one
    token, one row, an empty cache, each with a full and with a padded mask.
    """

    many: dict[str, Any]
    trials: tuple[dict[str, Any], ...]


def library_models(model: nn.Module) -> list[Any]:
    """The transformers models within a module tree, itself included; none if it is not in use."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    return [m for m in model.modules() if isinstance(m, library.PreTrainedModel)]


def register_outputs(model: nn.Module) -> None:
    """Let torch see the tensors in every cache type that the model can take or return."""
    if found := library_models(model):
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        for part in {type(m): m for m in found}.values():
            register_cache_pytrees_for_model(part)


@contextlib.contextmanager
def exporter_patches(model: nn.Module) -> Iterator[None]:
    """Swap in the library's own export-safe variants of code that cannot be traced.

    To be held around the trace only: the variants are other arithmetic than the model's.
    """
    with contextlib.ExitStack() as stack:
        if library_models(model):
            from transformers.exporters.exporter_dynamo import reset_model_state
            from transformers.exporters.utils import apply_patches

            stack.enter_context(apply_patches("dynamo"))
            stack.enter_context(reset_model_state(model))
        yield


@one_at_a_time
def cached_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CachedCalls:
    """Example calls with a cache, from a call without one, made by the model's own generation.

    The cache grows by what a call adds; a sliding window is cut out by the mask alone.

    Raises: CaptureError if the model does not generate, or not from these arguments.
    """
    library: Any = model
    if not library_models(model)[:1] == [model] or not library.can_generate():
        raise CaptureError(
            f"{type(model).__name__} does not generate, so there is no cache to capture it with",
            hint="capture it without cache=True, or pass a model with a generate method",
        )
    register_outputs(model)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    given = {k: v for k, v in bound.arguments.items() if isinstance(v, torch.Tensor)}
    with quiet(), untouched(model, (args, kwargs)):
        return _calls(library, given)


def _calls(library: Any, given: dict[str, Any]) -> CachedCalls:
    single, several = (_generated(library, given, many) for many in (False, True))
    many, one, first = (
        _cleaned(library, call) for call in (several["decode"], single["decode"], single["prefill"])
    )
    # Generation marks the cache it is given, and a mark is another structure to torch.
    first = {**first, CACHE: _growing_cache(library)}
    filled = _filled(library, first)
    many, one = {**many, CACHE: filled}, {**one, CACHE: copy.deepcopy(filled)}
    empty = {**first, CACHE: _emptied(filled)}
    trials = [one, empty, _first_token(empty)]
    trials += [_first_row(call) for call in (many, *trials)]
    trials = [t for t in trials if t.keys() == many.keys()]
    return CachedCalls(many, (*trials, *map(_padded, trials)))


def _generated(model: Any, given: dict[str, Any], many: bool) -> dict[str, dict[str, Any]]:
    from transformers.exporters.utils import decompose_prefill_decode

    settings = copy.deepcopy(model.generation_config)
    settings.do_sample, settings.num_beams = False, 1
    # Neither chooses a token any more, and each warns when it is set in vain.
    settings.temperature = settings.top_p = settings.top_k = None
    start = {**given, CACHE: _growing_cache(model)}
    try:
        with torch.no_grad():
            parts = decompose_prefill_decode(model, start, settings, multi_token_decode=many)
    except Exception as error:
        # The model's code, on what may be no arguments for it.
        cause = error.__cause__ or error
        raise CaptureError(
            f"{type(model).__name__} does not generate from these arguments: {cause}",
            hint=f"pass what {type(model).__name__}.generate takes: {sorted(given)} were given",
        ) from error
    return {name: call for name, (_, call) in parts.items()}


def _filled(model: Any, first: Mapping[str, Any]) -> Any:
    call = copy.deepcopy(dict(first))
    with torch.no_grad():
        model(**call)
    return call[CACHE]


def _growing_cache(model: Any) -> Any:
    # Without a config every layer keeps all it has seen: a window's contents would depend on
    # how many tokens went by, which is a Python number in the cache and not in the graph.
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache()


def _cleaned(model: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded call as a user writes it: no empty arguments, and a mask to fill in."""
    kept = {k: v for k, v in call.items() if v is not None and k != "return_dict"}
    parameters = inspect.signature(model.forward).parameters
    if "attention_mask" in parameters and "attention_mask" not in kept and "input_ids" in kept:
        batch, length = kept["input_ids"].shape
        kept["attention_mask"] = torch.ones(
            batch, length + kept[CACHE].get_seq_length(), dtype=torch.int64
        ).to(kept["input_ids"].device)
    return kept


def _emptied(cache: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t[..., :0, :] if t.ndim > 2 else t, cache)


def _first_row(call: Mapping[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, lambda t: t[:1] if t.ndim else t, dict(call))


def _first_token(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call cut to its first new token; with an empty cache the mask is as long as that."""
    tokens = {k: v for k, v in call.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    return {**call, **{k: v[:, :1] for k, v in tokens.items()}}


def _padded(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with the first position masked in its last row, wherever another is left."""
    mask = call.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < 2:
        return dict(call)
    mask = mask.clone()
    mask[-1, 0] = 0
    return {**call, "attention_mask": mask}


def empty_cache(program: Program, batch: int = 1) -> Any:
    """A cache that holds nothing yet, of the kind a captured program takes.

    Raises: CaptureError if the program takes no cache.
    """
    signature = program.signature
    if CACHE not in signature.keywords:
        raise CaptureError(
            f"the program of {program.source.model} takes no cache",
            hint="capture the model with cache=True",
        )
    _, kwargs = signature.arguments(program.example)
    leaf = {id(t): i for i, t in enumerate(program.example)}
    free = {(a.leaf, a.axis) for a in program.guards.dynamic}

    def emptied(tensor: torch.Tensor) -> torch.Tensor:
        sizes = [
            (batch if axis == 0 else 0) if (leaf[id(tensor)], axis) in free else size
            for axis, size in enumerate(tensor.shape)
        ]
        return tensor.new_zeros(sizes)

    return pytree.tree_map_only(torch.Tensor, emptied, kwargs[CACHE])


@one_at_a_time
def admit(program: Program, model: nn.Module, calls: Sequence[Mapping[str, Any]]) -> Program:
    """The program with its lower bounds on sizes opened where it agrees with the model bitwise.

    Calls of the same sizes have to agree all together, and no sizes are let in at which a call
    was seen to differ.
    """
    bounds: dict[tuple[tuple[str, int], ...], bool] = {}
    seen: list[tuple[Sequence[torch.Tensor], bool]] = []
    for call in calls:
        try:
            tensors = program.signature.bind((), dict(call))
            opened = _opened(program.guards, _lows(program.guards, tensors))
            opened.check(tensors)
        except GuardError:
            continue
        with quiet(), untouched(model, call, program.mode.training):
            agrees = _agree(replace(program, guards=opened), model, call)
        lows = tuple(sorted(_lows(program.guards, tensors).items()))
        bounds[lows] = agrees and bounds.get(lows, True)
        seen.append((tensors, agrees))
    guards = program.guards
    for lows in (lows for lows, agrees in bounds.items() if agrees):
        wider = _opened(guards, dict(lows))
        if not any(_passes(wider, tensors) for tensors, agrees in seen if not agrees):
            guards = wider
    return replace(program, guards=guards)


def _lows(guards: Guards, tensors: Sequence[torch.Tensor]) -> dict[str, int]:
    """The symbols whose size here is below their bound, with that size."""
    found: dict[str, int] = {}
    for axis in guards.dynamic:
        size = tensors[axis.leaf].shape[axis.axis]
        if axis.symbol is not None and size < axis.low:
            found[axis.symbol] = size
    return found


def _opened(guards: Guards, lows: Mapping[str, int]) -> Guards:
    axes = tuple(replace(a, low=min(a.low, lows.get(a.symbol or "", a.low))) for a in guards.axes)
    return replace(guards, axes=axes, _passed=set())


def _passes(guards: Guards, tensors: Sequence[torch.Tensor]) -> bool:
    try:
        guards.check(tensors)
    except GuardError:
        return False
    return True


def _agree(program: Program, model: nn.Module, call: Mapping[str, Any]) -> bool:
    try:
        with torch.no_grad():
            # The model appends to the cache that it is given.
            got = pytree.tree_leaves(program(**copy.deepcopy(dict(call))))
            want = pytree.tree_leaves(model(**copy.deepcopy(dict(call))))
    except Exception:
        # The model's code, at sizes that it may reject.
        return False
    pairs = [(a, b) for a, b in zip(want, got, strict=True) if isinstance(a, torch.Tensor)]
    return all(torch.equal(a, b) for a, b in pairs)
