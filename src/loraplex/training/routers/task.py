"""A mixture with a linear router as the loop trains it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from loraplex.training.core.bars import counting_progress
from loraplex.training.core.trainer import Loss
from loraplex.training.forward.fast_passes import fast_passes
from loraplex.training.mixture.data import Sourced
from loraplex.training.mixture.task import by_source, named
from loraplex.training.routers.losses import RouterLosses, StepLoss
from loraplex.training.routers.state import RouterState


class RouterTask:
    """One mixture, in one process."""

    def __init__(self, base: PreTrainedModel, state: RouterState) -> None:
        self.states = [state]
        self._base = base
        self._state = state
        self.losses = RouterLosses(base, state)

    @contextmanager
    def running(self) -> Iterator[None]:
        state, needed = self._state, self._state.data.needed()
        with fast_passes(self._base, max(len(example.ids) for example in needed)):
            if state.teacher is not None:
                with counting_progress("the teacher's scaling pass", enabled=state.config.run.progress) as on_progress:
                    state.teacher.hidden_states.fill(needed, on_progress)
            yield

    def accumulate_gradients(self, active: Sequence[int]) -> list[Loss]:
        rows = self._state.data.examples_of_step(self._state.progress.step)
        found = self.losses.accumulate_gradients(rows, self._state.progress.step)
        means = named(found.sums.scalings.sum(dim=0) / found.sums.num_tokens.sum(), self._state.mixture.experts)
        return [self._loss(rows, found, {"gates": means})]

    def evaluate(self, due: Sequence[int]) -> list[Loss]:
        state = self._state
        found = self.losses.evaluate(state.data.held_out)
        sources = by_source(found.sums, state.data.names, state.mixture.experts)
        return [self._loss(state.data.held_out, found, {"sources": sources})]

    def _loss(self, rows: Sequence[Sourced], found: StepLoss, details: dict[str, Any]) -> Loss:
        num_answers = sum(len(row.example.answer) for row in rows)
        terms = {"answer_loss": float(found.sums.losses.sum()) / num_answers} if self._state.teacher else {}
        return Loss(found.value, sum(len(row.example.ids) for row in rows), details | terms | found.terms)
