"""The loop of a mixture's training."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loraplex.errors import TrainingError
from loraplex.training.core.checkpoint import save_checkpoint
from loraplex.training.core.logs import JobLog
from loraplex.training.mixture.data import Sourced
from loraplex.training.mixture.losses import MixtureLosses, Sums
from loraplex.training.mixture.state import MixtureState

logger = logging.getLogger(__name__)


class MixtureTrainer:
    """Takes steps, evaluates and writes checkpoints until the state is finished."""

    def __init__(self, state: MixtureState, losses: MixtureLosses, log: JobLog, identity: Mapping[str, Any]) -> None:
        self._state = state
        self._losses = losses
        self._log = log
        self._identity = identity

    def run(self, on_step: Callable[[Sequence[MixtureState]], None]) -> None:
        """Train to the end; `on_step` sees the state after each step."""
        state = self._state
        while not state.is_finished:
            try:
                self.step()
                if state.evaluates_now:
                    self._evaluate()
            except TrainingError as error:
                self._stop(error)
            finished = state.progress.finished is not None
            if finished:
                state.restore_best()
            if finished or state.progress.step % state.config.checkpoint_every == 0:
                self._checkpoint()
            on_step([state])

    def step(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        state = self._state
        rows = state.data.examples_of_step(state.progress.step)
        num_answers = sum(len(row.example.answer) for row in rows)
        sums, number = self._losses.no_sums(), 0
        for micro_batch in _parts(rows, state.config.batch_size):
            number = self._losses.accumulate_gradients(micro_batch, 1 / num_answers, sums, state.progress.step, number)
        terms = self._losses.accumulate_regularizers(rows)
        loss, rate = float(sums.losses.sum()) / num_answers, state.learning_rate
        num_tokens = sum(len(row.example.ids) for row in rows)
        norm = state.update(loss, num_tokens)
        entry = {"step": state.progress.step, "loss": loss, "learning_rate": rate, "grad_norm": norm}
        means = self._named(sums.scalings.sum(dim=0) / sums.num_tokens.sum())
        self._log.write(entry | {"tokens": num_tokens, "scalings": means} | terms)
        state.progress.seconds += time.perf_counter() - started

    def _stop(self, error: TrainingError) -> None:
        """Tell that it diverged; it is finished, with its last good weights."""
        logger.error("%s", error)
        found = self._state.progress.divergence
        assert found is not None, "training was stopped that didn't diverge"
        self._log.write(found.as_json())

    def _evaluate(self) -> None:
        sums = self._losses.evaluate(self._state.data.held_out)
        loss = float(sums.losses.sum() / sums.num_answers.sum())
        self._state.record_evaluation(loss)
        entry = {"step": self._state.progress.step, "eval_loss": loss}
        self._log.write(entry | {"sources": self._by_source(sums)})

    def _by_source(self, sums: Sums) -> dict[str, Any]:
        """Loss and mean scalings of each source that was evaluated."""
        report = {}
        for number, name in enumerate(self._state.data.names):
            if sums.num_tokens[number] > 0:
                report[name] = {
                    "eval_loss": float(sums.losses[number] / sums.num_answers[number]),
                    "scalings": self._named(sums.scalings[number] / sums.num_tokens[number]),
                }
        return report

    def _named(self, means: Tensor) -> dict[str, float]:
        return {name: round(float(mean), 6) for name, mean in zip(self._state.mixture.experts, means, strict=True)}

    def _checkpoint(self) -> None:
        """Save everything, the log first: the checkpoint counts its bytes."""
        self._log.sync()
        save_checkpoint(Path(self._state.config.output), [self._state], [self._log], self._identity)


def _parts(rows: Sequence[Sourced], size: int) -> list[Sequence[Sourced]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]
