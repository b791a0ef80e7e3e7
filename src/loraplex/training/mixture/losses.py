"""The loss of a mixture's rows, and the gradients of its scaling head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.routing.layer_gates import LayerGates
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.forward.batch import RowBatch, TrainingRow, cut_batches
from loraplex.training.forward.loss import routed_losses
from loraplex.training.mixture.data import Sourced
from loraplex.training.mixture.hidden_states import HiddenStates
from loraplex.training.mixture.regularizers import load_balance, mean_entropy
from loraplex.training.mixture.routing import scaled_routing
from loraplex.training.mixture.state import MixtureState


class Sums(NamedTuple):
    """By source, over the rows so far."""

    losses: Tensor  # [sources]
    num_answers: Tensor  # [sources]
    scalings: Tensor  # [sources, experts]  of all tokens, means over the LoRA layers
    num_tokens: Tensor  # [sources]


def empty_sums(num_sources: int, num_experts: int, device: torch.device) -> Sums:
    """Sums of nothing."""
    zeros = torch.zeros(num_sources, device=device)
    return Sums(zeros, zeros.clone(), torch.zeros(num_sources, num_experts, device=device), zeros.clone())


class MixtureLosses:
    """Runs rows through a mixture whose scaling head is in training."""

    def __init__(self, base: PreTrainedModel, state: MixtureState, hidden_states: HiddenStates) -> None:
        self._base = base
        self._state = state
        self._hidden_states = hidden_states
        self._gates = LayerGates()

    def accumulate_gradients(self, rows: Sequence[Sourced], scale: float, sums: Sums, step: int, first: int) -> int:
        """Add the gradients of the summed loss times `scale`; `first` numbers the step's forward passes."""
        self._state.head.train()
        for batch in self._batches(rows):
            losses, scalings = self._run(batch, (step, first))
            (losses.sum() * scale).backward()
            add_to(sums, batch, losses.detach(), scalings.detach())
            first += 1
        self._state.head.eval()
        return first

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Sourced]) -> Sums:
        """The sums without dropout."""
        sums = self.no_sums()
        for batch in self._batches(rows):
            losses, scalings = self._run(batch, None)
            add_to(sums, batch, losses, scalings)
        return sums

    def accumulate_regularizers(self, rows: Sequence[Sourced]) -> dict[str, float]:
        """Add the gradients of the weighted load balance and sparsity of all tokens of a step; return the terms."""
        config = self._state.config
        weights = {"load_balance": config.load_balance_weight, "sparsity": config.sparsity_weight}
        if not any(weights.values()):
            return {}
        parts = []
        for batch in self._batches(rows):
            parts.append(self._hidden_states.of(batch)[is_token_of(batch)])
        scalings = self._state.head(torch.cat(parts))  # [tokens, layers, experts]
        terms = {"load_balance": load_balance(scalings), "sparsity": mean_entropy(scalings)}
        torch.stack([weight * terms[name] for name, weight in weights.items()]).sum().backward()
        return {name: float(terms[name].detach()) for name, weight in weights.items() if weight > 0}

    def no_sums(self) -> Sums:
        """Sums of nothing."""
        return empty_sums(len(self._state.data.names), self._state.experts.num_experts, self._base.device)

    def _batches(self, rows: Sequence[Sourced]) -> Iterator[RowBatch]:
        training_rows = [TrainingRow(source, 0, example) for source, example in rows]
        return cut_batches(training_rows, {}, self._state.config.run.tokens_per_forward, self._base.device)

    def _run(
        self, batch: RowBatch, counters: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:  # [outputs], [rows, padded, experts]
        """Losses and the mean scalings of each token; `counters` tell the draws of dropout apart, None is without."""
        state, experts = self._state, self._state.experts
        hidden = self._hidden_states.of(batch)
        with nullcontext() if counters is None else _random_from(self._draw(*counters)):
            scalings = state.head(hidden.flatten(0, 1)[None, None])  # [1, 1, tokens, layers, experts]
        self._gates.set(state.mixture.gates(scalings, torch.ones(1, device=hidden.device)))
        dropout, bank = state.config.expert_dropout, None
        if counters is not None and dropout > 0:
            bank = experts.bank_with_dropout(dropout, self._draw(*counters))
        num_rows, length = batch.input_ids.shape
        selected = batch.output_rows * length + batch.output_positions
        routing = scaled_routing(experts, self._gates, num_rows, length, selected, bank=bank)
        losses = routed_losses(self._base, batch, routing)
        with torch.no_grad():
            means = scalings[0, 0, :, 0] if scalings.stride(-2) == 0 else scalings[0, 0].mean(dim=1)
        return losses, means.view(*batch.input_ids.shape, experts.num_experts)

    def _draw(self, step: int, number: int) -> torch.Generator:
        return generator(self._state.config.seed, Purpose.DROPOUT, step, number, device=self._base.device)


def add_to(sums: Sums, batch: RowBatch, losses: Tensor, scalings: Tensor) -> None:
    """Add a batch's losses [outputs] and its tokens' mean scalings [rows, padded, experts]."""
    sums.losses.index_add_(0, batch.jobs, losses)
    sums.num_answers.index_add_(0, batch.jobs, torch.ones_like(losses))
    is_token = is_token_of(batch)
    sources = torch.tensor([row.job for row in batch.rows], device=losses.device)
    sums.scalings.index_add_(0, sources, (scalings * is_token.unsqueeze(-1)).sum(dim=1))
    sums.num_tokens.index_add_(0, sources, is_token.sum(dim=1).float())


def is_token_of(batch: RowBatch) -> Tensor:  # [rows, padded]
    """Where tokens are, and no padding."""
    lengths = torch.tensor([len(row.example.inputs) for row in batch.rows], device=batch.input_ids.device)
    return torch.arange(batch.padded_length, device=lengths.device) < lengths.unsqueeze(1)


@contextmanager
def _random_from(draw: torch.Generator) -> Iterator[None]:
    """Let nn.Dropout, which takes no generator, draw from a stream of its own inside the block."""
    with torch.random.fork_rng(devices=[draw.device] if draw.device.type == "cuda" else []):
        torch.manual_seed(draw.initial_seed())
        yield
