"""Token sequences on which an induction head has something to do."""

from __future__ import annotations

import torch
from torch import Tensor


def repeated_tokens(batch: int, half: int, *, vocab: int = 64, seed: int = 0) -> Tensor:
    """Return uniformly random tokens followed by the same tokens again, `[batch, 2 * half]`.

    Nothing in the first half can be predicted; from the second token of the second half on,
    everything can, by looking up what followed the current token before. The draw depends on
    the arguments only and leaves the global random state alone.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocab, (batch, half), generator=generator)
    return torch.cat([first, first], dim=1)
