"""Any PyTorch model as an fx graph that can be read, edited, rewritten and proved equivalent."""

from lensfx.capture import capture, empty_cache, empty_weights
from lensfx.errors import (
    CaptureError,
    ContractError,
    GuardError,
    HookError,
    LensError,
    PipelineError,
    RewriteError,
    UnknownNameError,
)
from lensfx.graph.bind import bind
from lensfx.graph.program import Program
from lensfx.rewrite.explain import explain
from lensfx.rewrite.pipeline import Pipeline
from lensfx.run import ActivationCache, HookPoint, Lens, wrap

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "CaptureError",
    "ContractError",
    "GuardError",
    "HookError",
    "HookPoint",
    "Lens",
    "LensError",
    "Pipeline",
    "PipelineError",
    "Program",
    "RewriteError",
    "UnknownNameError",
    "bind",
    "capture",
    "empty_cache",
    "empty_weights",
    "explain",
    "wrap",
]
