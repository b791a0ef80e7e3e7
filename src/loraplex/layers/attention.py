"""Attention of single-token steps in the compiled kernel, where a routing asks for fast decoding.

torch's fused attention makes such steps slow where queries share keys and values: for one bfloat16 row and 500 keys of
3 heads it takes some seven times as long as this kernel (benchmarks/kernel_choice.py).
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex.kernels.dispatch import native_runs
from loraplex.kernels.native import attend_rows_native
from loraplex.routing.rows import current_routing

_NAME = "sdpa"
# The terms of transformers' function that are not computed here, beside the scale; what else it is given, it ignores.
_UNKNOWN_TERMS = ("dropout", "position_bias", "cache", "softcap", "output_attentions")
_registering = threading.Lock()
_former = ALL_ATTENTION_FUNCTIONS[_NAME]

AttentionOutput = tuple[Tensor, Tensor | None]


def join_attention() -> None:
    """Stand in front of transformers' sdpa function; outside of a routing that decodes fast it is what it was.

    Under its own name, so that models, and what else stands in front of it, needn't know.
    """
    with _registering:
        if ALL_ATTENTION_FUNCTIONS[_NAME] is not attend:
            AttentionInterface.register(_NAME, attend)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> AttentionOutput:
    """query [rows, heads, queries, dim], key and value [rows, kv_heads, keys, dim] -> [rows, queries, heads, dim]."""
    routing = current_routing()
    if routing is None or not routing.fast_decode or not _can_attend(query, key, value, attention_mask, options):
        return _former(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling")
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    out = attend_rows_native(
        query[:, :, 0].contiguous(), key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    return out.unsqueeze(1), None


def _can_attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether it is one query a row, of what the kernel computes."""
    return (
        query.shape[2] == 1
        and native_runs(query.device, query.dtype)
        and not torch.is_grad_enabled()
        and not any(_is_set(options.get(term)) for term in _UNKNOWN_TERMS)
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (len(query), 1, 1, key.shape[2])))
        and key.dtype == value.dtype == query.dtype
        and _is_dense(key)
        and _is_dense(value)
    )


def _is_dense(states: Tensor) -> bool:
    return states.stride(3) == 1 and states.stride(2) == states.shape[3]


def _is_set(term: Any) -> bool:
    return term is not None and (isinstance(term, Tensor) or bool(term))
