"""Shared prefixes: what rows of a job start with is computed once, and its keys and values serve all of them.

Causal attention lets later tokens see the prefix only through its keys and values, so one pass over it and
the sum of the rows' gradients are exact.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from loraplex.residual.cache import ResidualState
from loraplex.routing.routing import use_routing
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.forward.batch import PrefixGroup, RowBatch, TrainingRouting, TrainingRow, prefix_span
from loraplex.training.forward.residual_rows import PrefixResidualStates, ResidualRows


class SharedPrefixes:
    """The keys and values of several groups' prefixes, padded on the right to the longest."""

    def __init__(
        self,
        base: PreTrainedModel,
        rows: Sequence[TrainingRow],
        lengths: Mapping[PrefixGroup, int],
        bank: WeightProvider,
        residuals: ResidualRows | None = None,
    ) -> None:
        first_of = {row.prefix_group: row for row in reversed(rows)}
        groups = [group for group in sorted(first_of) if lengths[group] > 0]
        longest = max(lengths.values())
        # A group without a prefix borrows any other's, of which its attention mask shows it nothing.
        self._index_of = dict.fromkeys(first_of, 0) | {group: index for index, group in enumerate(groups)}
        ids = [first_of[group].example.inputs[: lengths[group]] for group in groups]
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in ids], device=base.device)
        firsts = [first_of[group] for group in groups]
        spans = [prefix_span(row, longest) for row in firsts]
        residuals, state = residuals or ResidualRows(), ResidualState()
        with use_routing(TrainingRouting(spans, longest, bank)), residuals.use(base, [job for job, _ in groups], state):
            cache = base.base_model(input_ids=padded, use_cache=True).past_key_values
        self._states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        # Batches end their backward passes here, so that each can free its memory before the next runs.
        self._responses = PrefixResidualStates(residuals, groups, state)
        self._leaves = [state.detach().requires_grad_(state.requires_grad) for state in self._states]

    def cache_for(self, batch: RowBatch) -> DynamicCache:
        """A cache that starts every row of the batch with its prefix."""
        index = torch.tensor([self._index_of[row.prefix_group] for row in batch.rows], device=batch.input_ids.device)
        cache = DynamicCache()
        for layer in range(len(self._leaves) // 2):
            keys, values = self._leaves[2 * layer], self._leaves[2 * layer + 1]
            cache.update(keys.index_select(0, index), values.index_select(0, index), layer)
        return cache

    def responses_for(self, batch: RowBatch) -> ResidualState:
        """What residuals computed of each row's prefix."""
        return self._responses.state_for([row.prefix_group for row in batch.rows])

    def backward(self) -> None:
        """Carry the gradients that the batches left at the prefixes on to the adapters."""
        pairs = [*zip(self._states, self._leaves, strict=True), *self._responses.pairs]
        graded = [(state, leaf.grad) for state, leaf in pairs]
        used = [(state, grad) for state, grad in graded if state.requires_grad and grad is not None]
        if used:
            torch.autograd.backward([state for state, _ in used], [grad for _, grad in used])
