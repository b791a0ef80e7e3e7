"""Residuals, captures and steering inside packed passes: only chunks that ask for them are looked at."""

from collections.abc import Container, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from loraplex.engine.kv.kv_cache import AttentionTerms
from loraplex.engine.kv.residual_cache import BlockStates, ResidualCache
from loraplex.engine.sched.captures import SequenceAttention
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.asked_rows import AskedRowCache, AskedRows
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.errors import AdapterError, EngineError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.hooks import layer_number
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.plan import LayerPlan, RowPlans
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.rows import RowAttention


class RowGroup:
    """The rows of some plans in one packed pass: parts of equally many tokens."""

    def __init__(self, plans: RowPlans, chunks: Sequence[int], batch: InputBatch, cache: ResidualCache) -> None:
        self.plans = plans
        self.chunks = tuple(chunks)  # their places in the batch, in the order of the plans' rows
        self._batch, self._cache = batch, cache
        chosen = [batch.chunks[chunk] for chunk in chunks]
        device = batch.positions.device
        firsts = torch.tensor([batch.offsets[chunk] for chunk in chunks], device=device)
        self.tokens = firsts.unsqueeze(1) + torch.arange(chosen[0].count, device=device)  # [rows, count]
        self.num_keys = max(chunk.stop for chunk in chosen)
        self._start = min(chunk.start for chunk in chosen)

    def plan(self, layer: int, query: Tensor) -> LayerPlan | None:
        """What to do at a layer."""
        return self.plans.plan(layer, query, len(self.chunks))

    @cached_property
    def states(self) -> BlockStates:
        """u of the rows' tokens."""
        batch, last = self._batch, self.tokens[:, -1]
        blocks, places = batch.slots
        return BlockStates(
            self._cache,
            (blocks[self.tokens], places[self.tokens]),
            batch.table.values[batch.rows[last], : -(-self.num_keys // batch.cache.block_tokens)].long(),
            batch.positions[last] + 1,
            self.num_keys,
            self.plans.ranks,
        )

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
            shares=plan.shares(first_key, self.num_keys - first_key),
            first_key=first_key,
        )

    def values(self, rows: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:  # [rows, kv_heads, keys, dim]
        """The values that some rows attend to, 0 beyond a sequence's end, where memory may hold anything."""
        first = self._first_block(terms)
        gathered = self._gather(values, rows, first)
        if len(self.chunks) == 1:
            return gathered
        places = torch.arange(first * self._batch.cache.block_tokens, self.num_keys, device=values.device)
        beyond = places > self._batch.positions[self.tokens[rows, -1:]]  # [rows, keys]
        return gathered.masked_fill(beyond[:, None, :, None], 0)

    def _first_block(self, terms: AttentionTerms) -> int:
        return terms.first_seen(self._start) // self._batch.cache.block_tokens

    def _gather(self, pool: Tensor, rows: Tensor, first: int) -> Tensor:  # [rows, kv_heads, keys, dim]
        size = self._batch.cache.block_tokens
        kvs = self._batch.rows[self.tokens[rows, 0]]
        blocks = self._batch.table.values[kvs, first : -(-self.num_keys // size)].long()
        return pool[blocks].transpose(1, 2).flatten(2, 3)[:, :, : self.num_keys - first * size]


class AttentionRows:
    """Makes the scope of each packed pass; keeps u, and what was planned for rows that were decoded together."""

    def __init__(self, linked: LinkedAttention, pool: ResidualCache) -> None:
        self.responses = pool
        self._linked = linked
        self._asked = AskedRowCache(pool)
        self._together: RowPlans | None = None  # of several rows

    def scope(self, batch: InputBatch) -> "ForwardContext | None":
        """The scope of a pass; None if no part of it asks for anything."""
        if not batch.asking:
            self.forget_rows()
            return None
        asked = None
        asking: Mapping[int, SequenceAttention] = batch.asking
        if batch.is_native:
            asked = self._asked.of(batch, self._linked.layers.num_heads)
            asking = {chunk: own for chunk, own in asking.items() if own.stands_alone}
        together, alone = _side_by_side(asking, batch.num_single)
        self._together = self._plans_together([batch.asking[chunk].row for chunk in together])
        chosen = [] if self._together is None else [(self._together, together)]
        chosen += [(asking[chunk].plans, [chunk]) for chunk in alone]
        groups = [RowGroup(plans, chunks, batch, self.responses) for plans, chunks in chosen]
        return ForwardContext(groups, self._linked.layers, asked, batch)

    def forget_rows(self) -> None:
        """No request runs: keep nothing of the last ones."""
        self._together = None
        self._asked.forget()

    def _plans_together(self, rows: Sequence[RowAttention]) -> RowPlans | None:
        if self._together is not None and self._together.rows == tuple(rows):
            return self._together
        return RowPlans(rows, failures={}) if rows else None


class PendingLayer:
    """What a layer's residuals need, between attention and its block's output."""

    def __init__(self) -> None:
        self.groups: list[tuple[RowGroup, LayerPlan, AttentionWeights]] = []
        # Of rows that the compiled kernel computes: the query [tokens, heads, dim], all keys, and the terms.
        self.compiled: tuple[Tensor, Tensor, AttentionTerms] | None = None


class ForwardContext:
    """What the attention layers do in one packed pass besides attending.

    The compiled kernel computes the rows that ask for residuals and steering alone, inside of decoder layers, or here
    in layers that run module by module, with the same bits; groups of rows run through torch.
    """

    def __init__(
        self, groups: list[RowGroup], layers: AttentionLayers, asked: AskedRows | None, batch: InputBatch
    ) -> None:
        self._groups, self._layers, self._asked, self._batch = groups, layers, asked, batch
        self.pending: dict[int, PendingLayer] = {}  # by layer
        self._attended: set[int] = set()

    def attend(
        self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, terms: AttentionTerms
    ) -> None:
        """Capture, steer (in `out` [tokens, heads, dim]) and note the weights that residuals need."""
        layer = layer_number(module)
        if layer is None:
            return
        self._attended.add(layer)
        if self._asked is not None:
            self._attend_compiled(layer, query, keys, values, out, terms)
        for group in self._groups:
            plan = group.plan(layer, query)
            if plan is None:
                continue
            weights = group.weights(plan, self._layers.num_heads[layer], query, keys, terms)
            plan.capture(weights)
            if plan.links:
                self.pending.setdefault(layer, PendingLayer()).groups.append((group, plan, weights))
            if plan.steered:
                places = plan.steered_places
                rows = plan.sequences[places]
                heard = weights.apply(group.values(rows, values, terms), places)  # [rows, heads, count, dim]
                out[group.tokens[rows]] = heard.transpose(1, 2).to(out.dtype)

    def _attend_compiled(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, terms: AttentionTerms
    ) -> None:
        assert self._asked is not None, "no row is computed by the compiled kernel"
        if layer in self._asked.layers_with_steering:
            tensors = self._asked.tensors((layer,))
            native_ops.attend_steered(query.contiguous(), out, keys, values, self._where, terms, tensors)
        if layer in self._asked.layers_with_links:
            self.pending.setdefault(layer, PendingLayer()).compiled = (query.contiguous(), keys, terms)

    @property
    def _where(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self._batch.table.values, self._batch.rows, self._batch.positions)

    def add_residuals(self, layer: int, x: Tensor, output: Tensor) -> Tensor:
        """A block's output [1, tokens, hidden] with the residuals of the chunks that have some."""
        pending = self.pending.pop(layer)
        for group, plan, weights in pending.groups:
            residual = plan.residual(x[0][group.tokens], weights, group.states)  # [rows, count, hidden]
            tokens = group.tokens[plan.sequences].flatten()
            output = output.index_add(1, tokens, residual.flatten(0, 1).unsqueeze(0).to(output.dtype))
        if pending.compiled is not None:
            assert self._asked is not None, "no row is computed by the compiled kernel"
            query, keys, terms = pending.compiled
            output = output.clone(memory_format=torch.contiguous_format)
            tensors = self._asked.tensors((layer,))
            native_ops.add_links(x[0].contiguous(), output[0], query, keys, self._where, terms, tensors)
        return output

    def interrupts(self, module: nn.Module) -> bool:
        """Whether a layer with this attention module must run module by module; also with one that isn't known."""
        layer = layer_number(module)
        return layer is None or any(group.plans.concerns(layer) for group in self._groups)

    def compiled(self, modules: Sequence[nn.Module], apart: Container[int]) -> Sequence[Tensor]:
        """What the compiled call of layers with these attention modules does for rows, but for those at places `apart`.

        Nothing where no row asks for anything there.
        """
        numbers = tuple(layer_number(module) for module in modules)
        self._attended.update(n for place, n in enumerate(numbers) if n is not None and place not in apart)
        if self._asked is None or self._asked.layers.isdisjoint(numbers):
            return ()
        return self._asked.tensors(numbers)

    def finish(self) -> dict[int, AdapterError]:
        """The chunks that failed, by place in the batch, once the pass has run. Raises EngineError."""
        asked = {layer for layer in self._layers.layers if any(group.plans.concerns(layer) for group in self._groups)}
        asked |= frozenset() if self._asked is None else self._asked.layers
        if self.pending or not asked <= self._attended:
            raise EngineError(
                "the base model's attention was given back (registry.linked.detach) while a pass needed it. Detach "
                "when no request is running; this one can be asked again."
            )
        return {
            group.chunks[row]: error for group in self._groups for row, error in (group.plans.failures or {}).items()
        }


def _side_by_side(asking: Mapping[int, SequenceAttention], num_single: int) -> tuple[list[int], list[int]]:
    """The asking chunks that are computed together (single tokens without captures and functions), and the others."""
    together = [chunk for chunk, asked in asking.items() if chunk < num_single and not asked.stands_alone]
    if len(together) < 2:
        return [], list(asking)
    together.sort(key=lambda chunk: id(asking[chunk]))  # the same order in the next pass, whoever goes first there
    return together, [chunk for chunk in asking if chunk not in together]
