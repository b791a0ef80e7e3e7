"""Passes of training as fast as this machine runs them."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.fused_modules import fused_modules


@contextmanager
def fast_passes(base: PreTrainedModel, longest: int, *, packing: bool = False) -> Iterator[None]:
    """Inside the block the base runs by compiled operators, and attention by what rows of `longest` tokens allow."""
    with fast_attention(base, longest, packing=packing), fused_modules(base):
        yield
