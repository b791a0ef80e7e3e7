"""One adapter on one run of tokens: what the torch kernels take."""

from typing import NamedTuple

import torch
from torch import Tensor


class LoraSegment(NamedTuple):
    """The tokens [start, stop) of a packed batch go through one adapter."""

    start: int
    stop: int
    lora_a: Tensor  # [rank, in]; [rank, vocab] for an embedding
    lora_b: Tensor  # [rank, out]
    gates: Tensor | float  # [stop - start], [stop - start, rank] or one for all; LoRA scaling included
    dropout: float = 0.0  # on x, as PEFT's lora_dropout; training only
    generator: torch.Generator | None = None  # each adapter draws its own dropout
