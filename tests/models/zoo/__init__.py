"""Models of the transformers library built tiny from their config classes alone.

Nothing here names an architecture: sizes come from the names and types of config fields, inputs
from the signature of forward, and what does not fit is found by trying.
"""

from .architectures import Architecture, architectures
from .builder import Built, NotBuiltError, build
from .trial import trial

__all__ = ["Architecture", "Built", "NotBuiltError", "architectures", "build", "trial"]
