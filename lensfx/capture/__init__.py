"""From a model and an example call to a Program in normal form."""

from lensfx.capture.empty import empty_weights
from lensfx.capture.export import capture, recapture

__all__ = ["capture", "empty_weights", "recapture"]
