"""The loss of every answer token in one forward pass, and the gradients of all jobs' adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.routing.routing import use_routing
from loraplex.routing.rows import RowRouting
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.sharding import same_number
from loraplex.training.data.examples import Example
from loraplex.training.forward.attention import use_packed
from loraplex.training.forward.batch import (
    RowBatch,
    TrainingRouting,
    TrainingRow,
    cut_batches,
    forward_cost,
    make_batch,
    shared_prefix_lengths,
)
from loraplex.training.forward.checkpointing import checkpointable_layers, checkpointed
from loraplex.training.forward.packed_rows import PackedRowsRouting, pack_batches
from loraplex.training.forward.prefix import SharedPrefixes
from loraplex.training.forward.reft_rows import ReftRows
from loraplex.training.forward.residual_rows import ResidualRows


class RowScores(NamedTuple):
    """What rows have come to, each by itself."""

    losses: Tensor  # [rows]  summed over the tokens that count
    num_right: Tensor  # [rows]  of those tokens


class LossComputer:
    """Runs rows of many jobs through the base model with their adapters."""

    def __init__(
        self,
        base: PreTrainedModel,
        num_jobs: int,
        *,
        tokens_per_forward: int,
        share_prefixes: bool,
        residuals: ResidualRows | None = None,
        interventions: ReftRows | None = None,
        checkpointing: bool = False,
        packing: bool = False,
        sharded_over: ProcessGroup | None = None,  # processes that run every pass together
    ) -> None:
        """Raises ConfigError for `checkpointing` of a model that can't."""
        self._packing = packing
        self._sharded_over = sharded_over
        self._base = base
        self._checkpointed = checkpointable_layers(base) if checkpointing else []
        self._residuals, self._interventions = residuals, interventions
        self._num_jobs = num_jobs
        self._tokens_per_forward = tokens_per_forward
        # With checkpointing a cache would grow again in the backward pass; a sharded base runs as a whole only.
        self._share_prefixes = share_prefixes and not checkpointing and (sharded_over is None or packing)

    def accumulate_gradients(
        self, rows: Sequence[TrainingRow], bank: WeightProvider, loss_scales: Tensor
    ) -> Tensor:  # [jobs]
        """Add the gradients of every job's summed weighted loss times its scale [jobs]; return the summed losses."""
        sums = torch.zeros(self._num_jobs, device=self._base.device)
        prefixes, batches = self._prepare(rows, bank)
        for batch in batches:
            with checkpointed(self._checkpointed, generators_of(batch, bank) if self._checkpointed else []):
                logits = self._token_logits(batch, bank, prefixes)
                losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
            if batch.weights is not None:
                losses = losses * batch.weights
            if batch.is_filler:
                losses = losses * 0
            (losses * loss_scales[batch.jobs]).sum().backward()
            sums.index_add_(0, batch.jobs, losses.detach())
        if prefixes is not None:
            prefixes.backward()
        return sums

    @torch.no_grad()
    def score(self, rows: Sequence[TrainingRow], bank: WeightProvider) -> RowScores:
        """Every row's summed loss, and how many of its tokens that count are the most likely ones."""
        number = {id(row): index for index, row in enumerate(rows)}
        device = self._base.device
        scores = RowScores(torch.zeros(len(rows), device=device), torch.zeros(len(rows), device=device))
        prefixes, batches = self._prepare(rows, bank)
        for batch in batches:
            logits = self._token_logits(batch, bank, prefixes)
            if batch.is_filler:
                continue
            index = torch.tensor([number[id(row)] for row in batch.rows], device=device)[batch.output_records]
            losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
            scores.losses.index_add_(0, index, losses)
            scores.num_right.index_add_(0, index, (logits.argmax(dim=-1) == batch.targets).float())
        return scores

    def _token_logits(self, batch: RowBatch, bank: WeightProvider, prefixes: SharedPrefixes | None) -> Tensor:
        with nullcontext() if self._interventions is None else self._interventions.use(batch):
            return token_logits(self._base, batch, bank, prefixes, self._residuals)

    def _prepare(
        self, rows: Sequence[TrainingRow], bank: WeightProvider
    ) -> tuple[SharedPrefixes | None, Iterator[RowBatch]]:
        lengths = shared_prefix_lengths(rows) if self._share_prefixes else {}
        num_saved = sum(lengths[row.prefix_group] for row in rows) - sum(lengths.values()) if lengths else 0
        if num_saved <= (0 if self._packing else forward_cost(self._base.device)):
            lengths = {}
        device, most = self._base.device, self._tokens_per_forward
        if self._packing:
            return None, self._together(pack_batches(rows, lengths, most, device, self._base.dtype))
        prefixes = SharedPrefixes(self._base, rows, lengths, bank, self._residuals) if lengths else None
        return prefixes, self._together(cut_batches(rows, lengths, most, device))

    def _together(self, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
        """As many batches on every process, where they run the base model together."""
        ranks, device = self._sharded_over, self._base.device
        if ranks is None:
            return batches
        row = TrainingRow(0, 0, Example((0, 0), (1,), "filler"))
        filler = make_batch([row], {}, device)._replace(is_filler=True)
        return iter(same_number(list(batches), filler, ranks, device))


def generators_of(batch: RowBatch, bank: WeightProvider) -> list[torch.Generator]:
    """Those that the rows' dropout draws from."""
    found = [bank.dropout(row.slot)[1] for row in batch.rows]
    return [generator for generator in found if generator is not None]


def token_losses(
    base: PreTrainedModel,
    batch: RowBatch,
    bank: WeightProvider,
    prefixes: SharedPrefixes | None,
    residuals: ResidualRows | None = None,
) -> Tensor:  # [outputs]  float32
    """The cross-entropy of every token that counts, each row through its own slot or residual."""
    logits = token_logits(base, batch, bank, prefixes, residuals)
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


def token_logits(
    base: PreTrainedModel,
    batch: RowBatch,
    bank: WeightProvider,
    prefixes: SharedPrefixes | None,
    residuals: ResidualRows | None = None,
) -> Tensor:  # [outputs, vocabulary]
    """The logits before every token that counts, each row through its own slot or residual."""
    if batch.packed is not None:
        with use_packed(batch.packed):
            return answer_logits(base, batch, PackedRowsRouting(batch, bank))
    routing = TrainingRouting(batch.spans, batch.padded_length, bank)
    if residuals is None:
        return answer_logits(base, batch, routing, prefixes)
    state = None if prefixes is None else prefixes.responses_for(batch)
    with residuals.use(base, [row.job for row in batch.rows], state):
        return answer_logits(base, batch, routing, prefixes)


def routed_losses(
    base: PreTrainedModel, batch: RowBatch, routing: RowRouting, prefixes: SharedPrefixes | None = None
) -> Tensor:  # [outputs]  float32
    """The cross-entropy of every token that counts, under a routing that knows both layouts of the batch."""
    logits = answer_logits(base, batch, routing, prefixes)
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


def answer_logits(
    base: PreTrainedModel, batch: RowBatch, routing: RowRouting, prefixes: SharedPrefixes | None = None
) -> Tensor:  # [outputs, vocabulary]
    """The logits before every token that counts, under a routing that knows both layouts of the batch."""
    with (
        use_routing(routing),
        _outputs_selected(base, batch.output_rows, batch.output_positions) as was_selected,
    ):
        logits = base(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=None if prefixes is None else prefixes.cache_for(batch),
            use_cache=prefixes is not None,
        ).logits
    selected: Tensor = logits[0] if was_selected else logits[batch.output_rows, batch.output_positions]
    return selected


@contextmanager
def _outputs_selected(base: PreTrainedModel, rows: Tensor, positions: Tensor) -> Iterator[list[bool]]:
    """Let the output layer see only the positions that count, as [1, outputs, hidden]; yields whether it did.

    What a model does to its logits afterwards (scaling, soft-capping) it does to each alone. The output layer
    of a chat model is a fifth of the work of a small model, and one token in ten counts.
    """
    calls: list[bool] = []

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(True)
        return (args[0][rows, positions].unsqueeze(0), *args[1:])

    output = base.get_output_embeddings()
    assert output is not None, "a base model without an output layer was not refused"
    handle = output.register_forward_pre_hook(select)
    try:
        yield calls
    finally:
        handle.remove()
