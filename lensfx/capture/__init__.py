"""From a model and an example call to a Program in normal form."""

from lensfx.capture.empty import empty_weights
from lensfx.capture.export import capture, recapture
from lensfx.capture.hf import empty_cache

__all__ = ["capture", "empty_cache", "empty_weights", "recapture"]
