"""Which attention kernel training runs on: the results agree, the time differs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loraplex.layers.attention.interface import (
    AttentionCall,
    AttentionFunction,
    AttentionHandle,
    AttentionOutput,
    AttentionOwner,
    causal_mask,
)

# Attention by matrix products keeps a matrix of this side for each head, row and block until the backward pass.
LONGEST = 512  # tokens
_trains_short: ContextVar[bool] = ContextVar("loraplex_trains_short", default=False)


@contextmanager
def fast_attention(base: PreTrainedModel, longest: int) -> Iterator[None]:
    """Inside the block, short records on a CPU are trained with attention that is a product, a softmax and a product.

    torch's fused attention has a slow backward pass there: for bfloat16 rows of 38 tokens after a prefix of 26, forward
    and backward take four times as long (torch 2.13, benchmarks/training.py). Passes of other threads keep torch's.
    """
    if base.device.type != "cpu" or longest > LONGEST:
        yield
        return
    handle = AttentionHandle(base, _SHORT)
    token = _trains_short.set(True)
    try:
        yield
    finally:
        _trains_short.reset(token)
        handle.remove()


def _run(call: AttentionCall) -> AttentionOutput:
    if not _trains_short.get() or call.own is not sdpa_attention_forward or _SHORT.unknown_terms(call.options):
        return call.run_inner()
    mask = call.mask
    if mask is None and call.is_causal and call.query.shape[2] > 1:
        mask = causal_mask(call.query, call.key)
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.repeat_interleave(groups, dim=1), call.value.repeat_interleave(groups, dim=1)
    logits = call.query @ key.transpose(2, 3) * call.scale
    if mask is not None:
        logits = _masked(logits, mask)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(call.query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


_SHORT = AttentionFunction(name="training", owner=AttentionOwner.TRAINING, run=_run)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask
