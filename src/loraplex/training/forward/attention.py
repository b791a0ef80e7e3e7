"""Which attention kernel training runs on: the results agree, the time differs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loraplex.layers.attention_interface import AttentionFront, AttentionOutput, Behind, FrontHandle, causal_mask

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
    front = FrontHandle(base, _FRONT)
    token = _trains_short.set(True)
    try:
        yield
    finally:
        _trains_short.reset(token)
        front.remove()


def attend(
    former: Behind,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> AttentionOutput:
    """query [rows, heads, queries, dim], key and value [rows, kv_heads, keys, dim] -> [rows, queries, heads, dim]."""
    if not _trains_short.get() or former.own is not sdpa_attention_forward or _FRONT.unknown_terms(options):
        return former(module, query, key, value, attention_mask, **options)
    scaling, is_causal = options.get("scaling"), options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = causal_mask(query, key)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        logits = _masked(logits, attention_mask)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


_FRONT = AttentionFront(place=1, attend=attend)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask
