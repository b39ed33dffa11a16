"""The default passes on one architecture: what each did, and how equal the result is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

import lensfx
from lensfx.verify import UpToLogitShift, check, prove

from .architectures import Architecture
from .builder import build
from .trial import SHAPES, Record, said

BOUND = 1e-12


def passed(architecture: Architecture) -> Iterator[Record]:
    """What is known so far, after each step, so that a step that never ends leaves the others."""
    record: Record = {"name": architecture.class_name, "task": architecture.task}
    yield record | {"outcome": "not built", "why": "no time left"}
    try:
        built = build(architecture)
    except Exception as error:
        yield record | {"outcome": "not built", "why": said(error)}
        return
    yield record | {"outcome": "not captured", "why": "no time left"}
    given = built.inputs(*SHAPES[0])
    try:
        start = time.process_time()
        program = lensfx.capture(built.model, **given)
        record["seconds"] = time.process_time() - start
    except Exception as error:
        yield record | {"outcome": "not captured", "why": said(error)}
        return
    yield record | {"outcome": "failed", "why": "no time left"}
    yield record | rewritten(built.model, program, given)


def rewritten(model: torch.nn.Module, program: lensfx.Program, given: dict[str, Any]) -> Record:
    """What the default passes did to a captured program, and how far it is from the model."""
    start = time.process_time()
    try:
        after = lensfx.Pipeline.default().run(program)
    except Exception as error:
        return {"outcome": "failed", "why": said(error)}
    record: Record = {"passes": time.process_time() - start, "did": {}}
    for report in after.reports:
        reasons = Counter(r.reason for r in report.refused)
        record["did"][report.name] = [len(report.fired), len(report.refused), dict(reasons)]
    try:
        start = time.process_time()
        proved = prove(after)
        record["proof"] = time.process_time() - start
        moved = tuple(k for entry in after.journal for k in entry.shifted)
        contract = UpToLogitShift(moved) if moved else None
        error = check(model, after, up_to=contract, inputs=[((), given)]).error
    except lensfx.ContractError as broken:
        return record | {"outcome": "broken", "why": str(broken)}
    except Exception as failed:
        return record | {"outcome": "failed", "why": said(failed)}
    worst = max(proved.worst, error)
    record |= {"site": proved.worst, "model": error, "drift": proved.drift}
    return record | {"outcome": "proved" if worst <= BOUND else "conditioned"}
