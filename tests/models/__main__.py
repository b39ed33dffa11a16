"""`python -m models`, from the folder tests: check that every model does what the tests assume."""

import sys

import torch

from . import selfcheck

torch.set_num_threads(1)
sys.exit(0 if selfcheck() else 1)
