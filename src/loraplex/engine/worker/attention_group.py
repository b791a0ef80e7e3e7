"""Parts of packed passes whose attention is computed again, side by side, because they ask for something."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.engine.kv.kv_cache import AttentionTerms
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.engine.worker.row_plans import RowPlans
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.plan import LayerPlan


class RowGroup:
    """The rows of some plans in one packed pass: parts of equally many tokens."""

    def __init__(self, plans: RowPlans, parts: Sequence[int], batch: InputBatch) -> None:
        self.plans = plans
        self.parts = tuple(parts)  # their places in the batch, in the order of the plans' rows
        self._batch = batch
        chosen = [batch.parts[part] for part in parts]
        device = batch.positions.device
        firsts = torch.tensor([batch.offsets[part] for part in parts], device=device)
        self.tokens = firsts.unsqueeze(1) + torch.arange(chosen[0].count, device=device)  # [rows, count]
        self.num_keys = max(part.stop for part in chosen)
        self._start = min(part.start for part in chosen)

    def weights(
        self, plan: LayerPlan, num_heads: int, query: Tensor, keys: Tensor, terms: AttentionTerms
    ) -> AttentionWeights:
        """The weights of the rows that a plan is about; query [tokens, heads, dim], keys are all blocks."""
        assert terms.sinks is None, "residuals, captures and steering are refused where an attention has sinks"
        first = self._first_block(terms)
        first_key = first * self._batch.cache.block_tokens
        tokens = self.tokens[plan.sequences]
        positions = self._batch.positions[tokens].unsqueeze(2)  # [rows, count, 1]
        places = torch.arange(first_key, self.num_keys, device=query.device)
        seen = terms.seen(positions, places)
        return AttentionWeights(
            query[tokens].transpose(1, 2),
            self._gather(keys, plan.sequences, first),
            seen.unsqueeze(1),
            sequences=plan.sequences,
            scaling=terms.scale,
            softcap=terms.softcap,
            is_causal=True,
            log_strength=plan.log_strength(num_heads, first_key, self.num_keys - first_key),
            first_key=first_key,
        )

    def values(self, rows: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:  # [rows, kv_heads, keys, dim]
        """The values that some rows attend to, 0 beyond a track's end, where memory may hold anything."""
        first = self._first_block(terms)
        gathered = self._gather(values, rows, first)
        if len(self.parts) == 1:
            return gathered
        places = torch.arange(first * self._batch.cache.block_tokens, self.num_keys, device=values.device)
        beyond = places > self._batch.positions[self.tokens[rows, -1:]]  # [rows, keys]
        return gathered.masked_fill(beyond[:, None, :, None], 0)

    def _first_block(self, terms: AttentionTerms) -> int:
        return terms.first_seen(self._start) // self._batch.cache.block_tokens

    def _gather(self, pool: Tensor, rows: Tensor, first: int) -> Tensor:  # [rows, kv_heads, keys, dim]
        size = self._batch.cache.block_tokens
        tracks = self._batch.rows[self.tokens[rows, 0]]
        blocks = self._batch.table.values[tracks, first : -(-self.num_keys // size)].long()
        return pool[blocks].transpose(1, 2).flatten(2, 3)[:, :, : self.num_keys - first * size]
