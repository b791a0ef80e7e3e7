"""Attention of single-token steps in the compiled kernel, where a routing asks for fast decoding.

torch's fused attention makes such steps slow where queries share keys and values: for one bfloat16 row and 500 keys of
3 heads it takes some seven times as long as this kernel (benchmarks/kernel_choice.py).
"""

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from loraplex.kernels.dispatch import native_runs
from loraplex.kernels.native import attend_rows_native
from loraplex.layers.attention.interface import AttentionCall, AttentionFunction, AttentionOutput, AttentionOwner
from loraplex.routing.routing import current_routing


def _run(call: AttentionCall) -> AttentionOutput:
    routing = current_routing()
    if routing is None or not routing.fast_decode or not _can_run(call):
        return call.run_inner()
    mask = None if call.mask is None else call.mask[:, 0, 0]
    out = attend_rows_native(call.query[:, :, 0].contiguous(), call.key, call.value, mask, call.scale)
    return out.unsqueeze(1), None


FAST_DECODE = AttentionFunction(name="fast decoding", owner=AttentionOwner.FAST_DECODE, run=_run)


def _can_run(call: AttentionCall) -> bool:
    """Whether it is one query a row, of what the kernel computes."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    return (
        call.own is sdpa_attention_forward
        and query.shape[2] == 1
        and native_runs(query.device, query.dtype)
        and not torch.is_grad_enabled()
        and not call.options.get("output_attentions")
        and not FAST_DECODE.unknown_terms(call.options)
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (len(query), 1, 1, key.shape[2])))
        and key.dtype == value.dtype == query.dtype
        and _is_dense(key)
        and _is_dense(value)
    )


def _is_dense(states: Tensor) -> bool:
    return states.stride(3) == 1 and states.stride(2) == states.shape[3]
