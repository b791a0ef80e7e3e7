"""Attention of single-token steps in the compiled kernel, where a routing asks for fast decoding.

torch's fused attention makes such steps slow where queries share keys and values: for one bfloat16 row and 500 keys of
3 heads it takes some seven times as long as this kernel (benchmarks/kernel_choice.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loraplex.kernels.dispatch import native_runs
from loraplex.kernels.native import attend_rows_native
from loraplex.layers.attention_interface import AttentionFront, AttentionOutput, Behind
from loraplex.routing.routing import current_routing


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
    routing = current_routing()
    decodes_fast = routing is not None and routing.fast_decode and former.own is sdpa_attention_forward
    if not decodes_fast or not _can_attend(query, key, value, attention_mask, options):
        return former(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    out = attend_rows_native(
        query[:, :, 0].contiguous(), key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return out.unsqueeze(1), None


# The innermost: it takes over transformers' sdpa function, which runs whatever isn't a step of fast decoding.
FAST_DECODE_FRONT = AttentionFront(place=0, attend=attend)


def _can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether it is one query a row, of what the kernel computes."""
    return (
        query.shape[2] == 1
        and native_runs(query.device, query.dtype)
        and not torch.is_grad_enabled()
        and not options.get("output_attentions")
        and not FAST_DECODE_FRONT.unknown_terms(options)
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (len(query), 1, 1, key.shape[2])))
        and key.dtype == value.dtype == query.dtype
        and _is_dense(key)
        and _is_dense(value)
    )


def _is_dense(states: Tensor) -> bool:
    return states.stride(3) == 1 and states.stride(2) == states.shape[3]
