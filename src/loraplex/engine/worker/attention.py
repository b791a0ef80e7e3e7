"""Attention over a packed batch: every token sees the keys and values of its own sequence, and nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraplex.engine.kv.kv_cache import AttentionTerms, gather_blocks
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.kernels.packed_weight import TILE_TOKENS


def packed_attention(
    batch: InputBatch,
    module: nn.Module,
    query: Tensor,  # [tokens, heads, head_dim]
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,
) -> Tensor:  # [tokens, heads, head_dim]
    """softmax(scale * q k^T, soft-capped, causal, windowed) v for every token; new keys and values are kept."""
    if batch.stand_in is not None:
        return batch.stand_in(batch, module, query, key, value)
    keys, values = batch.cache.layers[module]
    terms = batch.cache.shapes[module].terms
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    single = out[: batch.num_single]
    if batch.is_native:
        where = (batch.table.values, batch.rows, batch.positions)
        native_ops.store_tokens(key, keys, *where)
        native_ops.store_tokens(value, values, *where)
        if batch.num_single:
            native_ops.attend_single(query.contiguous(), single, keys, values, *where, terms)
    else:
        blocks, places = batch.slots
        keys[blocks, :, places] = key
        values[blocks, :, places] = value
        if batch.num_single:
            single.copy_(attend_single(batch, query[: batch.num_single], keys, values, terms))
    is_compiled = batch.is_native and native_ops.attends_prompts(query.dtype, keys.dtype)
    for first, chunk in batch.prompt_chunks():
        rows = slice(first, first + chunk.count)
        if is_compiled and chunk.count >= TILE_TOKENS:
            place = (batch.table.values, chunk.kv.row, chunk.start)
            native_ops.attend_prompt(query[rows].contiguous(), out[rows], keys, values, *place, terms)
        elif is_compiled:
            where = (batch.table.values, batch.rows[rows], batch.positions[rows])
            native_ops.attend_single(query[rows].contiguous(), out[rows], keys, values, *where, terms)
        else:
            out[rows] = attend_chunk(chunk, query[rows], keys, values, terms)
    if batch.attention is not None:
        batch.attention.attend(module, query, keys, values, out, terms)
    return out


def attend_single(
    batch: InputBatch,
    query: Tensor,  # [single, heads, head_dim]
    keys: Tensor,  # [blocks, kv_heads, block_tokens, head_dim]
    values: Tensor,
    terms: AttentionTerms,
) -> Tensor:  # [single, heads, head_dim]
    """Single tokens of many sequences, each over its own length, in one masked product."""
    num_single = len(query)
    positions, rows = batch.positions[:num_single], batch.rows[:num_single]
    blocks = batch.table.values[rows, : batch.num_key_blocks].long()  # beyond a sequence's end: any block, masked
    k = keys[blocks].transpose(1, 2).flatten(2, 3)  # [single, kv_heads, tokens, head_dim]
    v = values[blocks].transpose(1, 2).flatten(2, 3)
    seen = terms.seen(positions.unsqueeze(1), torch.arange(k.shape[2], device=query.device))
    unseen = ~seen[:, None, :, None]  # memory that was never written may hold NaN
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    if terms.sinks is not None:
        return _attend(query.unsqueeze(2), k, v, seen[:, None, None], terms).squeeze(2)
    # The queries that share a key head side by side, as if they followed each other: with a mask, fused attention takes
    # shared heads in no other form.
    grouped = query.unflatten(1, (k.shape[1], -1))  # [single, kv_heads, groups, head_dim]
    return _attend(grouped, k, v, seen[:, None, None], terms).flatten(1, 2)


def attend_chunk(
    chunk: ScheduledChunk,
    query: Tensor,  # [count, heads, head_dim]
    keys: Tensor,
    values: Tensor,
    terms: AttentionTerms,
) -> Tensor:  # [count, heads, head_dim]
    """Some tokens of one sequence, over all tokens before them and one another."""
    size = keys.shape[2]
    first = terms.first_seen(chunk.start) // size  # block
    blocks = chunk.kv.blocks[first : -(-chunk.stop // size)]
    k, v = (gather_blocks(pool, blocks)[:, : chunk.stop - first * size] for pool in (keys, values))
    q = query.transpose(0, 1).unsqueeze(0)
    sees_all = chunk.start == 0 and terms.first_seen(chunk.stop - 1) == 0
    if sees_all and terms.softcap is None and terms.sinks is None:
        return _attend(q, k.unsqueeze(0), v.unsqueeze(0), None, terms)[0].transpose(0, 1)
    positions = torch.arange(chunk.start, chunk.stop, device=query.device).unsqueeze(1)
    seen = terms.seen(positions, torch.arange(first * size, chunk.stop, device=query.device))
    return _attend(q, k.unsqueeze(0), v.unsqueeze(0), seen[None, None], terms)[0].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, terms: AttentionTerms) -> Tensor:
    """q [rows, heads, queries, dim], k and v [rows, kv_heads, keys, dim], seen [rows or 1, 1, queries, keys].

    Without `seen`, query i sees the keys up to i.
    """
    if terms.softcap is None and terms.sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=terms.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    assert seen is not None, "an attention with a soft cap or sinks needs to be told what is seen"
    groups = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (k.shape[1], groups)).float()  # [rows, kv_heads, groups, queries, head_dim]
    logits = q @ k.float().unsqueeze(2).transpose(-1, -2) * terms.scale
    if terms.softcap is not None:
        logits = torch.tanh(logits / terms.softcap) * terms.softcap
    logits = logits.masked_fill(~seen.unsqueeze(2), float("-inf"))
    if terms.sinks is not None:
        sinks = terms.sinks.to(logits).view(1, k.shape[1], groups, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float().unsqueeze(2)).flatten(1, 2).to(v.dtype)
