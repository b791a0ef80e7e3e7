"""The compiled operators of packed passes; `native_available` says whether they can run."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from loraplex.engine.kv.kv_cache import AttentionTerms
from loraplex.kernels.packed_weight import has_fast_packed_product


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


def attends_prompts(*dtypes: torch.dtype) -> bool:
    """Whether prompts have a compiled attention: on tiles; without them torch's is the faster one."""
    return all(dtype == torch.bfloat16 for dtype in dtypes) and has_fast_packed_product()


def attend_prompt(
    query: Tensor,  # [count, heads, dim]
    out: Tensor,  # [count, heads, dim], filled
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    row: int,
    start: int,
    terms: AttentionTerms,
) -> None:
    """Attention of tokens that follow each other in the sequence of `row`, from the position `start` on; bfloat16."""
    mask_rule = (terms.mask_rule.window or 0, terms.mask_rule.chunk or 0)
    sinks = None if terms.sinks is None else terms.sinks.float().contiguous()
    where = (table, row, start)
    _operator("attend_prompt_")(query, out, keys, values, *where, terms.scale, *mask_rule, terms.softcap or 0.0, sinks)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary positions in place: query and key [tokens, heads, dim], cos and sin [tokens, dim] (arXiv 2104.09864)."""
    _operator("rotate_")(query, key, cos, sin)


def decode_layers(
    x: Tensor,  # [tokens, hidden]
    layers: Tensor,
    constants: Tensor,
    cache_sizes: tuple[int, int],  # blocks, and tokens of one
    rotary: list[Tensor],  # cosines and sines [tokens, dim] of each kind in turn, float32
    rotary_kinds: list[int],  # by layer
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    adapter_table: Tensor,
    scalings: Tensor,
    segments: Tensor,
    gates: Tensor,  # [1 or modules, ..]
    routing: Sequence[Tensor],
    vectors: Sequence[Tensor] = (),  # InterventionPass.addresses
    asked: Sequence[Tensor] = (),  # AskedRows.tensors
    experts: Sequence[Tensor] = (),  # ExpertTable.all, where adapters adapt stacked experts
    experts_width: int = 0,
) -> Tensor:  # [tokens, hidden]
    """A run of decoder layers for one token of each sequence; layers and constants come from layer_record.py."""
    where = (table, rows, positions)
    adapters = (adapter_table, scalings, segments, gates, routing)
    described = (layers, constants, *cache_sizes, rotary, rotary_kinds)
    return _operator("decode_layers")(
        x.contiguous(), *described, *where, *adapters, vectors, asked, experts, experts_width
    )


def attend_steered(
    query: Tensor,  # [tokens, heads, dim]
    out: Tensor,  # [tokens, heads, dim], of steered rows filled
    keys: Tensor,
    values: Tensor,
    where: tuple[Tensor, Tensor, Tensor],  # table, rows and positions
    terms: AttentionTerms,
    asked: tuple[Tensor, Tensor],  # AskedRows.tensors of one layer
) -> None:
    """Attention of the tokens whose rows steer it."""
    table, groups = asked
    _operator("attend_steered_")(query, out, keys, values, *where, *_shown(terms), table[:, 0].contiguous(), groups)


def add_links(
    x: Tensor,  # [tokens, hidden]  what the attention block reads
    out: Tensor,  # [tokens, hidden]  its output, changed
    query: Tensor,  # [tokens, heads, dim]  as it attended
    keys: Tensor,
    where: tuple[Tensor, Tensor, Tensor],  # table, rows and positions
    terms: AttentionTerms,
    asked: tuple[Tensor, Tensor],  # AskedRows.tensors of one layer
) -> None:
    """Add the linked residuals of the tokens' rows; what later tokens need is kept."""
    table, groups = asked
    _operator("add_links_")(x, out, query, keys, *where, *_shown(terms), table[:, 0].contiguous(), groups)


def _shown(terms: AttentionTerms) -> tuple[float, int, int, float]:
    """Scale, window, chunk and soft cap as operators take them; 0 is none."""
    assert terms.sinks is None, "residuals and steering are refused where an attention has sinks"
    return terms.scale, terms.mask_rule.window or 0, terms.mask_rule.chunk or 0, terms.softcap or 0.0
