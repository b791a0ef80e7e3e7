"""Which attention kernel training runs on: the results agree, the time differs."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from loraplex.residual.joining import own_implementation, set_own_implementation

# Eager attention keeps a matrix of this side for each head, row and block until the backward pass.
LONGEST_FOR_EAGER = 512  # tokens


@contextmanager
def fast_attention(base: PreTrainedModel, longest: int) -> Iterator[None]:
    """Inside the block, short records on a CPU are trained with eager attention.

    torch's fused attention has a slow backward pass there: for bfloat16 rows of 38 tokens after a prefix of 26, forward
    and backward take four times as long (torch 2.13, benchmarks/training.py).
    """
    before = own_implementation(base)
    if base.device.type != "cpu" or before != "sdpa" or longest > LONGEST_FOR_EAGER:
        yield
        return
    set_own_implementation(base, "eager")
    try:
        yield
    finally:
        set_own_implementation(base, before)
