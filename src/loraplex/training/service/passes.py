"""Forward and backward passes over rows of many adapters, with a loss of its own for each row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.errors import ConfigError
from loraplex.routing.routing import use_routing
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import (
    TrainingRouting,
    TrainingRow,
    TrainingSlot,
    TrainingWeightProvider,
    cut_sizes,
    forward_cost,
    make_batch,
)
from loraplex.training.forward.checkpointing import checkpointable_layers, checkpointed
from loraplex.training.forward.fast_passes import fast_passes
from loraplex.training.service.datums import Datum
from loraplex.training.service.losses import ChosenLoss


@dataclass(frozen=True, eq=False)
class LossRow:
    """A datum on its way through one adapter."""

    slot: int  # of the adapter, among those of the pass
    datum: Datum
    loss: ChosenLoss


@dataclass(frozen=True, eq=False)
class RowResult:
    """What a pass gave for a row."""

    logprobs: Tensor  # as the datum's targets, float32, on the CPU
    loss: float


class TrainingPasses:
    """Runs rows through the base model, each with its adapter; the rows of all adapters share padded batches."""

    def __init__(self, base: PreTrainedModel, tokens_per_forward: int) -> None:
        self._base = base
        self._tokens_per_forward = tokens_per_forward
        self._layers = _layers_of(base)

    def run(
        self, rows: Sequence[LossRow], adapters: Sequence[Mapping[int, SlotWeights]], *, backward: bool
    ) -> list[RowResult]:
        """Each row's log probabilities and loss; with `backward`, its gradients are added to its adapter's."""
        bank = TrainingWeightProvider([TrainingSlot(weights) for weights in adapters])
        results: dict[int, RowResult] = {}
        longest = max((len(row.datum.tokens) for row in rows), default=0)
        with torch.set_grad_enabled(backward), fast_passes(self._base, longest):
            for group in self._groups(rows):
                found = self._run_group([rows[index] for index in group], bank, backward=backward)
                results.update(zip(group, found, strict=True))
        return [results[index] for index in range(len(rows))]

    def _groups(self, rows: Sequence[LossRow]) -> Iterator[list[int]]:
        """Rows of similar length together, those of one adapter side by side."""
        lengths = [len(row.datum.tokens) for row in rows]
        order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
        first = 0
        cost = forward_cost(self._base.device)
        for size in cut_sizes([lengths[index] for index in order], self._tokens_per_forward, cost):
            yield sorted(order[first : first + size], key=lambda index: (rows[index].slot, index))
            first += size

    def _run_group(self, rows: Sequence[LossRow], bank: TrainingWeightProvider, *, backward: bool) -> list[RowResult]:
        logits = self._logits(rows, bank)
        results, losses = [], []
        for own, row in zip(logits, rows, strict=True):
            logprobs = target_logprobs(own[: len(row.datum.tokens)], row.datum.targets.to(own.device))
            inputs = {name: tensor.to(own.device) for name, tensor in row.datum.inputs.items()}
            loss = row.loss(logprobs, inputs)
            losses.append(loss)
            results.append(RowResult(logprobs.detach().cpu(), float(loss.detach())))
        if backward:
            torch.stack(losses).sum().backward()
        return results

    def _logits(self, rows: Sequence[LossRow], bank: TrainingWeightProvider) -> Tensor:  # [rows, padded, vocabulary]
        """Of rows; one that is longer than a pass keeps what its layers are given, and computes them again."""
        batch = make_batch(
            [TrainingRow(row.slot, row.slot, _example(row.datum)) for row in rows], {}, self._base.device
        )
        again = self._layers if batch.padded_length > self._tokens_per_forward else []
        with use_routing(TrainingRouting(batch.spans, batch.padded_length, bank)), checkpointed(again, []):
            logits: Tensor = self._base(input_ids=batch.input_ids, use_cache=False).logits
        return logits


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:  # [tokens, vocabulary], [tokens] or [tokens, k]
    """The targets' log probabilities, in float32."""
    logits = logits.float()
    if targets.ndim == 1:
        return -F.cross_entropy(logits, targets, reduction="none")
    return torch.log_softmax(logits, dim=-1).gather(1, targets)


def _layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """The layers that can run again in the backward pass; none in some models."""
    try:
        return checkpointable_layers(base)
    except ConfigError:
        return []


def _example(datum: Datum) -> Example:
    """As make_batch takes it: the tokens and one more, which is predicted and never read."""
    return Example((*datum.tokens, 0), tuple(range(1, len(datum.tokens) + 1)), "")
