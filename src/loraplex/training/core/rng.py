"""Random numbers that depend on a job's seed and on what they are for, never on what was drawn before.

So a job draws the same whatever its neighbours do, and a resumed run has no generator to restore.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for; each purpose has its own stream."""

    WEIGHTS = 0
    ORDER = 1
    SPLIT = 2
    DROPOUT = 3
    GATES_BEFORE_USER = 4


def generator(seed: int, purpose: Purpose, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for `purpose`; counters (epoch, step, row ...) tell its uses apart."""
    words = np.random.SeedSequence([seed, purpose, *counters]).generate_state(2, np.uint32)
    # 63 bits: torch takes negative seeds for unsigned ones.
    return torch.Generator(device).manual_seed((int(words[0]) << 31) ^ int(words[1]))
