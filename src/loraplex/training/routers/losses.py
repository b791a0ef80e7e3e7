"""The loss of a mixture's rows, and the gradients of its linear router."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.training.core.rng import Purpose, generator
from loraplex.training.forward.batch import RowBatch, TrainingRow, cut_batches
from loraplex.training.forward.loss import answer_logits
from loraplex.training.mixture.data import Sourced
from loraplex.training.mixture.losses import Sums, add_to, empty_sums, is_token_of
from loraplex.training.mixture.routing import ExpertsRouting
from loraplex.training.routers.gating_terms import ChoiceCounts, Counts, GatingTerms
from loraplex.training.routers.routing import GatingListener, router_routing
from loraplex.training.routers.state import RouterState
from loraplex.training.routers.teacher import logit_kl


class StepLoss(NamedTuple):
    """What the rows of a step, or those held out, have come to."""

    value: float  # what is made small, without regularizers
    sums: Sums
    terms: dict[str, float]  # of teacher and regularizers, without their weights


class _Pass(NamedTuple):
    """One forward pass."""

    losses: Tensor  # [outputs]  cross-entropy
    terms: dict[str, Tensor]  # shares of means
    mean_gates: Tensor  # [rows, padded, experts]


class RouterLosses:
    """Runs rows through a mixture whose router is in training."""

    def __init__(self, base: PreTrainedModel, state: RouterState) -> None:
        self._base = base
        self._state = state
        config = state.config
        self._regularizer_weights = {
            "load_balance": config.load_balance_weight,
            "sparsity": config.sparsity_weight,
            "z_loss": config.router.z_loss_weight,
        }
        taught = {"gate_kl": config.router.gate_kl_weight, "logit_kl": config.router.logit_kl_weight}
        self._teacher_weights = taught if state.teacher is not None else {}

    @property
    def follows_base(self) -> bool:
        """Whether gradients flow through the base model; a teacher's gates need each layer's input only."""
        through = self._state.config.router.answer_weight + self._teacher_weights.get("logit_kl", 0)
        return through > 0 or any(self._regularizer_weights.values())

    def accumulate_gradients(self, rows: Sequence[Sourced], step: int) -> StepLoss:
        """Add the gradients of a step's rows, which are computed a micro-batch at a time."""
        size = self._state.config.steps.batch_size
        micro_batches = [rows[first : first + size] for first in range(0, len(rows), size)]
        batches = [batch for part in micro_batches for batch in self._batches(part)]
        fractions = self._fractions(batches, step) if self._regularizer_weights["load_balance"] else {}
        return self._run_all(batches, _counts(rows), step=step, fractions=fractions)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Sourced]) -> StepLoss:
        """The same without gradients, dropout and regularizers."""
        return self._run_all(list(self._batches(rows)), _counts(rows), step=None, fractions={})

    def _run_all(
        self, batches: Sequence[RowBatch], counts: Counts, *, step: int | None, fractions: Mapping[int, Tensor]
    ) -> StepLoss:
        sums, terms = self._no_sums(), dict[str, float]()
        for number, batch in enumerate(batches):
            found = self._run(batch, counts, None if step is None else (step, number), fractions)
            if step is not None:
                total = self._total(found, counts)
                total.backward()
            add_to(sums, batch, found.losses.detach(), found.mean_gates)
            for name, term in found.terms.items():
                terms[name] = terms.get(name, 0.0) + float(term.detach())
        answers = float(sums.losses.sum()) / counts.num_answers
        value = self._state.config.router.answer_weight * answers
        value += sum(weight * terms[name] for name, weight in self._teacher_weights.items() if weight > 0)
        return StepLoss(value, sums, terms)

    def _total(self, found: _Pass, counts: Counts) -> Tensor:
        weights = self._teacher_weights | self._regularizer_weights
        parts = [weight * found.terms[name] for name, weight in weights.items() if weight > 0]
        if self._state.config.router.answer_weight > 0:
            parts.append(self._state.config.router.answer_weight * found.losses.sum() / counts.num_answers)
        return torch.stack(parts).sum()

    def _run(
        self, batch: RowBatch, counts: Counts, draw: tuple[int, int] | None, fractions: Mapping[int, Tensor]
    ) -> _Pass:
        """`draw` tells the draws of dropout apart, None is without, and an evaluation."""
        router, teacher, trains = self._state.router, self._state.teacher, draw is not None
        with_logits = self._teacher_weights.get("logit_kl", 0) > 0
        lesson = None if teacher is None else teacher.lesson(batch, with_logits=with_logits)
        regularizers = frozenset(name for name, weight in self._regularizer_weights.items() if weight > 0 and trains)
        listener = GatingTerms(
            router,
            is_token_of(batch),
            counts,
            lesson=lesson,
            regularizers=regularizers,
            fractions=fractions,
            trains=trains,
        )
        with nullcontext() if self.follows_base else torch.no_grad():
            logits = answer_logits(self._base, batch, self._routing(batch, listener, draw))
            losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        terms = dict(listener.terms)
        if lesson is not None and lesson.logits is not None:
            terms["logit_kl"] = logit_kl(lesson.logits, logits).sum() / counts.num_answers
        return _Pass(losses, terms, listener.mean_gates.view(*batch.input_ids.shape, -1))

    @torch.no_grad()
    def _fractions(self, batches: Sequence[RowBatch], step: int) -> dict[int, Tensor]:
        """Of each LoRA layer, which fraction of the step's tokens prefers each expert: known before the gradients."""
        choices = ChoiceCounts(self._state.experts.num_experts)
        for number, batch in enumerate(batches):
            choices.begin(is_token_of(batch))
            answer_logits(self._base, batch, self._routing(batch, choices, (step, number)))
        return choices.fractions()

    def _routing(self, batch: RowBatch, listener: GatingListener, draw: tuple[int, int] | None) -> ExpertsRouting:
        state, bank = self._state, None
        dropout = state.config.expert_dropout
        if draw is not None and dropout > 0:
            source = generator(state.config.seed, Purpose.DROPOUT, *draw, device=self._base.device)
            bank = state.experts.bank_with_dropout(dropout, source)
        num_rows, length = batch.input_ids.shape
        selected = batch.output_rows * length + batch.output_positions
        return router_routing(state.experts, state.router, num_rows, length, selected, listener, bank=bank)

    def _no_sums(self) -> Sums:
        return empty_sums(len(self._state.data.names), self._state.experts.num_experts, self._base.device)

    def _batches(self, rows: Sequence[Sourced]) -> Iterator[RowBatch]:
        training_rows = [TrainingRow(source, 0, example) for source, example in rows]
        return cut_batches(training_rows, {}, self._state.config.run.tokens_per_forward, self._base.device)


def _counts(rows: Sequence[Sourced]) -> Counts:
    return Counts(
        num_tokens=sum(len(row.example.inputs) for row in rows),
        num_answers=sum(len(row.example.answer) for row in rows),
    )
