"""wrap: the one call from a model to a lens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import nn

from lensfx.capture import capture
from lensfx.errors import PipelineError
from lensfx.graph.threads import one_at_a_time
from lensfx.report.report import Report
from lensfx.rewrite.pipeline import Pipeline
from lensfx.rewrite.rule import Pass
from lensfx.run.lens import Lens
from lensfx.run.variants import checked
from lensfx.verify.prove import Level

__all__ = ["wrap"]


@one_at_a_time
def wrap(
    model: nn.Module,
    *args: Any,
    passes: str | Iterable[Pass] | None = "default",
    verify: str | bool = "fast",
    opaque: Sequence[Any] = (),
    strict: bool = False,
    cache: bool = False,
    **kwargs: Any,
) -> Lens:
    """The model as a lens, captured on one example call, rewritten, and proved equivalent.

    `passes="default"` brings the graph to canonical form, folds norms and centres the
    unembedding; `None` only inserts hook points, so every value is bitwise the model's; a tuple
    runs exactly those passes, then inserts hook points. `verify="fast"` proves every pass on two
    small calls, "full" over all hard inputs and weights and with gradients, as
    `lensfx.verify.prove(lens.program)` does later; False skips the proof, and the check of the
    structure against numbers. The model is left as it was. The lens reads its very parameters
    where no pass changed them; a folded weight is a new parameter of the lens, so gradients and
    later changes of the original do not meet it.

    A call off the captured path, of other sizes or in training mode is captured when it comes.
    `opaque`, `strict` and `cache` are those of `capture`.

    Raises: CaptureError, PipelineError, and ContractError if a pass breaks its contract.
    """
    level = _level(verify)
    pipeline = Pipeline(_chosen(passes))
    options: dict[str, Any] = {"opaque": opaque, "strict": strict, "cache": cache}
    program = pipeline.run(capture(model, *args, **options, **kwargs))
    return Lens(program, Report.of(program) if level is None else checked(program, level))


def _level(verify: str | bool) -> Level | None:
    found = {True: "fast", False: None, "fast": "fast", "full": "full"}
    if not isinstance(verify, (str, bool)) or verify not in found:
        raise PipelineError(
            f"verify={verify!r} is unknown", hint="verify='fast', verify='full' or verify=False"
        )
    return cast("Level | None", found[verify])


def _chosen(passes: str | Iterable[Pass] | None) -> tuple[Pass, ...]:
    *others, hooks = Pipeline.default().passes
    if passes is None:
        return (hooks,)
    if isinstance(passes, str):
        if passes != "default":
            raise PipelineError(f"passes={passes!r} is unknown", hint="passes='default' or None")
        return (*others, hooks)
    if not isinstance(passes, Iterable):
        raise PipelineError(f"passes={passes!r} is no list of passes", hint=f"passes=({passes!r},)")
    given = tuple(passes)
    return given if any(isinstance(p, type(hooks)) for p in given) else (*given, hooks)
