"""Which attention kernel training runs on: the results agree, the time differs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
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
from loraplex.training.forward.packed_rows import PackedLayout

# Attention by matrix products keeps a matrix of this side for each head, row and block until the backward pass.
LONGEST = 512  # tokens
_packed: ContextVar[PackedLayout | None] = ContextVar("loraplex_packed", default=None)
_trains_short: ContextVar[bool] = ContextVar("loraplex_trains_short", default=False)


@contextmanager
def fast_attention(base: PreTrainedModel, longest: int, *, packing: bool = False) -> Iterator[None]:
    """Inside the block, short records on a CPU are trained with attention that is a product, a softmax and a product.

    torch's fused attention has a slow backward pass there: for bfloat16 rows of 38 tokens after a prefix of 26, forward
    and backward take four times as long (torch 2.13, benchmarks/training.py). Passes of other threads keep torch's.
    Packed rows (packed_rows.py) are taken apart, on any device.
    """
    is_short = base.device.type == "cpu" and longest <= LONGEST
    if not (is_short or packing):
        yield
        return
    handle = AttentionHandle(base, _SHORT)
    token = _trains_short.set(is_short)
    try:
        yield
    finally:
        _trains_short.reset(token)
        handle.remove()


@contextmanager
def use_packed(layout: PackedLayout) -> Iterator[None]:
    """Inside the block attention knows the rows of a pack, where `fast_attention` stands in front of the model's."""
    token = _packed.set(layout)
    try:
        yield
    finally:
        _packed.reset(token)


def _run(call: AttentionCall) -> AttentionOutput:
    layout = _packed.get()
    if call.own is not sdpa_attention_forward or _SHORT.unknown_terms(call.options):
        return call.run_inner()
    if layout is not None:
        return _run_packed(call, layout), None
    if not _trains_short.get():
        return call.run_inner()
    mask = call.mask
    if mask is None and call.is_causal and call.query.shape[2] > 1:
        mask = causal_mask(call.query, call.key)
    return _product(call.query, call.key, call.value, mask, call.scale).transpose(1, 2).contiguous(), None


def _product(
    query: Tensor,  # [rows, heads, queries, size]
    key: Tensor,  # [rows, key heads, keys, size]
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:  # [rows, heads, queries, size]
    """Heads that share keys stand below each other in one product: keys and values are not repeated."""
    rows, heads, queries, size = query.shape
    together = (rows, key.shape[1], -1)
    logits = (query.reshape(*together, size) @ key.transpose(2, 3) * scale).view(rows, heads, queries, -1)
    if mask is not None:
        logits = _masked(logits, mask)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights.reshape(*together, key.shape[2]) @ value).view(rows, heads, queries, -1)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by torch's fused attention, which keeps no matrix of queries and keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _run_packed(call: AttentionCall, layout: PackedLayout) -> Tensor:  # [1, tokens, heads, size]
    """Every group of rows by itself: gathered, attended, and put back in its place."""
    attend = _product if _trains_short.get() else _fused
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (call.query, call.key, call.value))
    parts = []
    for group in layout.groups:
        rows = query[group.queries].transpose(1, 2)
        keys, values = key[group.keys].transpose(1, 2), value[group.keys].transpose(1, 2)
        attended = attend(rows, keys, values, group.mask, call.scale).transpose(1, 2)  # [rows, padded, heads, size]
        parts.append(attended.flatten(0, 1)[group.sources])
    return torch.cat(parts)[layout.order].unsqueeze(0)


_SHORT = AttentionFunction(name="training", owner=AttentionOwner.TRAINING, run=_run)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask
