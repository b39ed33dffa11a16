"""Run a program: hooks, caches, graphs specialised to a request."""

from lensfx.run.cache import ActivationCache
from lensfx.run.hooks import HookPoint
from lensfx.run.lens import Lens
from lensfx.run.wrap import wrap

__all__ = ["ActivationCache", "HookPoint", "Lens", "wrap"]
