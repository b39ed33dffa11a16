"""From a model and an example call to a Program in normal form."""

from lensfx.capture.export import capture

__all__ = ["capture"]
