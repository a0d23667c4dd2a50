"""Where every random number of a run comes from: the seed and a position, never what was drawn before.

So a run that is taken up again goes on as if nothing had happened, and no result depends on how many processes load the
images.
"""

import random

import numpy as np
import torch


def mixed(*numbers: int) -> int:
    """Return a seed of 32 bits that follows from all numbers and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Set the generators of Python, numpy and torch, those of devices that are in use included."""
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which takes milliseconds for devices that are not there.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
