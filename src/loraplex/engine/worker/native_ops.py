"""The compiled operators of packed passes; `native_available` says whether they can run."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from loraplex.engine.kv.kv_cache import AttentionTerms


@cache
def _operator(name: str) -> Any:
    """The operator itself: finding it by name costs some microseconds, and a step calls it for every layer."""
    return getattr(torch.ops.loraplex, name).default


def store_tokens(states: Tensor, pool: Tensor, table: Tensor, rows: Tensor, positions: Tensor) -> None:
    """Put new keys or values [tokens, kv_heads, dim] into the blocks of their sequences."""
    _operator("store_tokens_")(states, pool, table, rows, positions)


def attend_single(
    query: Tensor,  # [tokens, heads, dim]
    out: Tensor,  # [single, heads, dim], filled
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    terms: AttentionTerms,
) -> None:
    """Attention of the first tokens, each over its own sequence."""
    mask_rule = (terms.mask_rule.window or 0, terms.mask_rule.chunk or 0)
    sinks = None if terms.sinks is None else terms.sinks.float().contiguous()
    where = (table, rows, positions)
    _operator("attend_single_")(query, out, keys, values, *where, terms.scale, *mask_rule, terms.softcap or 0.0, sinks)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), or (1 + weight) * ..."""
    return _operator("rms_norm")(x, weight, eps, plus_one)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions in place: query and key [tokens, heads, dim], cos and sin [tokens, dim] (arXiv 2104.09864)."""
    _operator("rotate_")(query, key, cos, sin)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in gate's memory."""
    _operator("gated_silu_")(gate, up)
    return gate


def decode_layers(
    x: Tensor,  # [tokens, hidden]
    layers: Tensor,
    constants: Tensor,
    sizes: list[int],
    cos: Tensor,  # [tokens, head_dim]
    sin: Tensor,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    adapter_table: Tensor,
    scalings: Tensor,
    segments: Tensor,
    gates: Tensor,  # [1 or modules, ..]
    is_packed: bool,  # all weights of the layers
    int8_groups: Tensor | None,  # [layers * modules]  where all weights are 8-bit integers
) -> Tensor:  # [tokens, hidden]
    """A run of decoder layers for one token of each sequence; the first three come from engine/layer_stack.py."""
    where = (table, rows, positions)
    adapters = (adapter_table, scalings, segments, gates)
    held = (is_packed, int8_groups)
    return _operator("decode_layers")(x.contiguous(), layers, constants, sizes, cos, sin, *where, *adapters, *held)
