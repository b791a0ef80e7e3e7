"""A mixture as the loop trains it: the loss of its rows, regularizers, and the mean scalings for the log."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from loraplex.training.core.bars import counting_progress
from loraplex.training.core.trainer import Loss
from loraplex.training.forward.fast_passes import fast_passes
from loraplex.training.mixture.hidden_states import HiddenStates
from loraplex.training.mixture.losses import MixtureLosses, Sums
from loraplex.training.mixture.state import MixtureState

logger = logging.getLogger(__name__)


class MixtureTask:
    """One mixture, in one process."""

    def __init__(self, base: PreTrainedModel, state: MixtureState) -> None:
        self.states = [state]
        self._base = base
        self._state = state
        self.hidden_states = HiddenStates(
            base,
            state.mixture,
            state.experts,
            budget_bytes=state.config.hidden_cache_bytes,
            tokens_per_forward=state.config.run.tokens_per_forward,
        )
        self.losses = MixtureLosses(base, state, self.hidden_states)

    @contextmanager
    def running(self) -> Iterator[None]:
        needed, config = self._state.data.needed(), self._state.config
        with fast_passes(self._base, max(len(example.ids) for example in needed)):
            with counting_progress("scaling pass", enabled=config.run.progress) as on_progress:
                self.hidden_states.fill(needed, on_progress)
            kept, megabytes = self.hidden_states.num_kept, self.hidden_states.num_bytes / 1e6
            logger.info("the scaling pass of %d texts is kept in %.1f MB", kept, megabytes)
            if kept < (distinct := len({example.inputs for example in needed})):
                logger.warning(
                    "%d texts don't fit hidden_cache_bytes=%d and are computed in every step",
                    *(distinct - kept, config.hidden_cache_bytes),
                )
            yield

    def accumulate_gradients(self, active: Sequence[int]) -> list[Loss]:
        state, size = self._state, self._state.config.steps.batch_size
        step = state.progress.step
        rows = state.data.examples_of_step(step)
        num_answers = sum(len(row.example.answer) for row in rows)
        sums, number = self.losses.no_sums(), 0
        for first in range(0, len(rows), size):
            micro_batch = rows[first : first + size]
            number = self.losses.accumulate_gradients(micro_batch, 1 / num_answers, sums, step, number)
        terms = self.losses.accumulate_regularizers(rows)
        means = named(sums.scalings.sum(dim=0) / sums.num_tokens.sum(), state.mixture.experts)
        num_tokens = sum(len(row.example.ids) for row in rows)
        return [Loss(float(sums.losses.sum()) / num_answers, num_tokens, {"scalings": means} | terms)]

    def evaluate(self, due: Sequence[int]) -> list[Loss]:
        held_out, experts = self._state.data.held_out, self._state.mixture.experts
        sums = self.losses.evaluate(held_out)
        num_tokens = sum(len(row.example.ids) for row in held_out)
        loss = float(sums.losses.sum() / sums.num_answers.sum())
        return [Loss(loss, num_tokens, {"sources": by_source(sums, self._state.data.names, experts)})]


def by_source(sums: Sums, sources: Sequence[str], experts: Sequence[str]) -> dict[str, Any]:
    """Loss and mean scalings of each source that was evaluated."""
    return {
        name: {
            "eval_loss": float(sums.losses[number] / sums.num_answers[number]),
            "scalings": named(sums.scalings[number] / sums.num_tokens[number], experts),
        }
        for number, name in enumerate(sources)
        if sums.num_tokens[number] > 0
    }


def named(means: Tensor, experts: Sequence[str]) -> dict[str, float]:
    """Mean scalings by expert, as the log has them."""
    return {name: round(float(mean), 6) for name, mean in zip(experts, means, strict=True)}
