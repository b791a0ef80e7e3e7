"""Steered and captured attention inside vLLM: keys and values of the rows that ask, and their weights beside vLLM's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context

from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.capture import CaptureBuffer
from loraplex.vllm_plugin.batch_rows import BatchRow
from loraplex.vllm_plugin.model_blocks import ModelBlocks
from loraplex.vllm_plugin.row_steering import RowSteering
from loraplex.vllm_plugin.second_cache import SecondCache

PREFIX = "loraplex_attention."  # of the copies' names


@dataclass(frozen=True)
class AttentionRow:
    """A row of the batch that runs now, and what it asks of attention."""

    number: int  # of the row in the batch
    row: BatchRow
    layers: frozenset[int]
    steering: RowSteering
    buffer: CaptureBuffer | None


class AttentionReader:
    """Keeps keys and values of the rows that ask, in memory that vLLM's blocks are given for, and reads them.

    A copy of each attention layer makes vLLM allocate that memory with every block; the copy itself never attends. So
    chunks, preemption and blocks that come and go hold for it as they do for vLLM's own keys.
    """

    def __init__(self, registry: Any, blocks: ModelBlocks, layers: Sequence[int]) -> None:
        """Register the copies; before vLLM asks the layers for their caches."""
        self._blocks = blocks
        chosen = {blocks.attention[number].layer_name: blocks.attention[number] for number in layers}
        self._cache = SecondCache(registry, chosen, PREFIX)
        self.layers = tuple(layers)
        self.num_heads = blocks.num_heads
        self.heads = blocks.heads  # of this worker
        self.rows: Sequence[AttentionRow] = ()  # of the pass that runs now

    def attach(self) -> None:
        for layer in self.layers:
            self._blocks.attention[layer].register_forward_hook(_ReaderHook(self, layer))

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Keep the rows' keys and values, compute their weights, and put steered rows' attention into the output."""
        rows = [wanted for wanted in self.rows if layer in wanted.layers]
        if not rows:
            return
        own = self._blocks.attention[layer]
        copied = self._cache.copies[own.layer_name]
        context = get_forward_context()
        slots, metadata = context.slot_mapping[copied.layer_name], context.attn_metadata[copied.layer_name]
        kept = copied.kv_cache  # [blocks, KV heads, block size, 2 * head size]
        block_size = kept.shape[2]
        query, output = (x.view(len(x), own.num_heads, own.head_size) for x in (query, output))
        key, value = (x.view(len(x), own.num_kv_heads, own.head_size) for x in (key, value))
        for wanted in rows:
            tokens = wanted.row.tokens
            where = slots[tokens]
            kept[where // block_size, :, where % block_size] = torch.cat([key[tokens], value[tokens]], dim=-1)
            num_keys = wanted.row.first_position + tokens.stop - tokens.start
            table = metadata.block_table[wanted.number, : -(-num_keys // block_size)]
            both = kept[table.long()].transpose(0, 1).flatten(1, 2)[:, :num_keys]  # [KV heads, keys, 2 * head size]
            self._run_row(wanted, layer, query[tokens], both, output[tokens])

    def _run_row(self, wanted: AttentionRow, layer: int, query: Tensor, both: Tensor, output: Tensor) -> None:
        own, impl = self._blocks.attention[layer], self._blocks.attention[layer].impl
        num_queries, num_keys = len(query), both.shape[1]
        weights = AttentionWeights(
            query.transpose(0, 1).unsqueeze(0),
            both[..., : own.head_size].unsqueeze(0),
            _mask(num_queries, num_keys, own.sliding_window, query.device),
            sequences=torch.zeros(1, dtype=torch.int64, device=query.device),
            scaling=impl.scale,
            softcap=impl.logits_soft_cap or None,
            is_causal=True,
            log_strength=wanted.steering.log_strength(layer, num_keys),
            shares=wanted.steering.shares(layer, num_keys),
        )
        if wanted.steering.reaches(layer):
            heard = weights.apply(both[..., own.head_size :].unsqueeze(0).to(torch.float32))
            output.copy_(heard[0].transpose(0, 1).to(output.dtype))
        if wanted.buffer is not None and layer in wanted.buffer.layers:
            whole = _WholeHeads(weights, self._blocks.num_workers)
            wanted.buffer.keep(layer, cast(AttentionWeights, whole), 0)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys [1, 1, queries, keys] the last tokens see: those up to themselves, in a window if there is one."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    keys = torch.arange(num_keys, device=device)
    shown = keys <= queries
    if window is not None:
        shown &= keys > queries - window
    return shown.view(1, 1, num_queries, num_keys)


class _WholeHeads:
    """Weights of all heads where each worker has some: gathered for the queries that are kept."""

    def __init__(self, weights: AttentionWeights, num_workers: int) -> None:
        self._weights, self._num_workers = weights, num_workers
        self.first_key, self.num_keys = weights.first_key, weights.num_keys
        self.first_query, self.num_queries = weights.first_query, weights.num_queries

    def queries(self, start: int, stop: int, row: int) -> Tensor:  # [heads, stop - start, keys]
        """As AttentionWeights.queries."""
        own = self._weights.queries(start, stop, row)
        return own if self._num_workers == 1 else tensor_model_parallel_all_gather(own.contiguous(), dim=0)


class _ReaderHook:
    """A forward hook on an attention layer."""

    def __init__(self, reader: AttentionReader, layer: int) -> None:
        self._reader, self._layer = reader, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._reader.rows:
            query, key, value = args[:3]
            self._reader.run(self._layer, query, key, value, output)
