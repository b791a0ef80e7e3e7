"""The loop: every unfinished job takes a step at a time, and their rows share the forward passes."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.errors import TrainingError
from loraplex.training.adapters.job_state import JobState
from loraplex.training.config import TrainConfig
from loraplex.training.core.checkpoint import save_checkpoint
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.logs import JobLog
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.data.batches import TrainingRow
from loraplex.training.data.dataset import invocation_start
from loraplex.training.data.examples import Example
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.routing import FrozenSlot, TrainingSlot, TrainingWeightProvider

logger = logging.getLogger(__name__)


class Trainer:
    """Trains job states together; what a job learns doesn't depend on the others."""

    def __init__(
        self,
        states: Sequence[JobState],
        losses: LossComputer,
        logs: Sequence[JobLog],
        config: TrainConfig,
        identity: Mapping[str, Any],
        ranks: ProcessGroup,
    ) -> None:
        self._states = states
        self._losses = losses
        self._logs = logs
        self._config = config
        self._identity = identity
        self._ranks = ranks
        self._output = Path(config.output)
        self._device = states[0].parameters.flat.device

    def run(self, on_step: Callable[[Sequence[JobState]], None]) -> None:
        """Train until every job is finished; `on_step` sees the states after each step."""
        while active := [index for index, state in enumerate(self._states) if not state.is_finished]:
            self.step(active)
            self._evaluate([index for index in active if self._states[index].evaluates_now])
            finished = [index for index in active if self._states[index].is_finished]
            for index in finished:
                self._states[index].restore_best()
            step = max(self._states[index].progress.step for index in active)
            # The checkpoint comes before adapters: a folder with adapters can always be gone on with.
            if finished or step % self._config.checkpoint_every == 0:
                self.checkpoint()
            for index in finished:
                self.write(index)
            on_step(self._states)

    def checkpoint(self) -> None:
        """Save everything, logs first: the checkpoint counts their bytes."""
        for log in self._logs:
            log.sync()
        if self._ranks.is_first:
            save_checkpoint(self._output, self._states, self._logs, self._identity)
        self._ranks.wait()

    def step(self, active: Sequence[int]) -> None:
        """One optimizer step of the jobs in `active`."""
        started = time.perf_counter()
        examples = {index: self._examples(index) for index in active}
        num_answers = {index: sum(len(e.answer) for e in examples[index]) for index in active}
        scales = torch.zeros(len(self._states))
        for index in active:
            scales[index] = 1 / num_answers[index]
        sums = torch.zeros(len(self._states), device=self._device)
        for micro_batch in self._micro_batches(examples):
            rows, bank = self._rows(micro_batch, with_dropout=True)
            sums += self._losses.accumulate_gradients(rows, bank, scales.to(self._device))
        losses = (self._ranks.add_up(sums).cpu() * scales).tolist()
        for index in active:
            self._update(index, losses[index], sum(len(example.ids) for example in examples[index]))
        seconds = time.perf_counter() - started
        for index in active:
            self._states[index].progress.seconds += seconds

    def _update(self, index: int, loss: float, num_tokens: int) -> None:
        state = self._states[index]
        gradient = state.parameters.flat.grad
        assert gradient is not None, "the flat gradient is never freed"
        gradient.copy_(self._ranks.add_up(gradient))
        rate = state.learning_rate
        try:
            norm = state.update(loss, num_tokens, self._ranks.any)
        except TrainingError as error:
            self._stop(index, error)
            return
        self._logs[index].write(
            {
                "step": state.progress.step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": num_tokens,
            }
        )

    def _examples(self, index: int) -> list[Example]:
        state = self._states[index]
        return state.data.examples_of_step(state.progress.step)

    def _micro_batches(self, examples: Mapping[int, Sequence[Example]]) -> list[list[tuple[int, int, Example]]]:
        """(job, number in the step, example) of each micro-batch: the n-th of every job together."""
        batches: list[list[tuple[int, int, Example]]] = []
        for index, of_job in examples.items():
            size = self._states[index].job.batch_size
            for number, example in enumerate(of_job):
                while len(batches) <= number // size:
                    batches.append([])
                batches[number // size].append((index, number, example))
        return [self._ranks.share(batch) for batch in batches]

    def _rows(
        self, batch: Sequence[tuple[int, int, Example]], *, with_dropout: bool
    ) -> tuple[list[TrainingRow], TrainingWeightProvider]:
        """Rows with the slots that they go through; with dropout every row has its own, which draws for it alone."""
        slots = [TrainingSlot(state.slot_weights) for state in self._states]
        frozen: list[list[FrozenSlot]] = []
        for state in self._states:
            members = range(len(slots), len(slots) + len(state.frozen.loras))
            frozen.append([FrozenSlot(n, lora.weight) for n, lora in zip(members, state.frozen.loras, strict=True)])
            slots += [TrainingSlot(lora.slot_weights) for lora in state.frozen.loras]
        rows = []
        for index, number, example in batch:
            state, slot = self._states[index], index
            dropout = state.job.lora_dropout if with_dropout else 0.0
            if dropout:
                counters = (state.progress.step, number)
                draw = generator(state.job.seed, Purpose.DROPOUT, *counters, device=self._device)
                slot = len(slots)
                slots.append(TrainingSlot(state.slot_weights, dropout, draw))
            first = _first_adapted(state, example)
            rows.append(TrainingRow(index, slot, example, bool(dropout), first, frozen[index]))
        return rows, TrainingWeightProvider(slots)

    def _evaluate(self, due: Sequence[int]) -> None:
        if not due:
            return
        held_out = [(index, 0, example) for index in due for example in self._states[index].data.held_out]
        rows, bank = self._rows(self._ranks.share(held_out), with_dropout=False)
        sums: Tensor = self._ranks.add_up(self._losses.evaluate(rows, bank)).cpu()
        for index in due:
            state = self._states[index]
            loss = float(sums[index]) / sum(len(example.answer) for example in state.data.held_out)
            try:
                state.record_evaluation(loss)
            except TrainingError as error:
                self._stop(index, error)
                continue
            self._logs[index].write({"step": state.progress.step, "eval_loss": loss})

    def _stop(self, index: int, error: TrainingError) -> None:
        """Tell of a job that diverged; it is finished, and the others go on."""
        logger.error("%s The other jobs go on.", error)
        found = self._states[index].progress.divergence
        assert found is not None, "a job was stopped that didn't diverge"
        self._logs[index].write(found.as_json())

    def write(self, index: int) -> None:
        """Write a finished job's adapter."""
        state = self._states[index]
        if self._ranks.is_first:
            state.write(self._output / state.folder_name)


def _first_adapted(state: JobState, example: Example) -> int:
    invocation = state.job.invocation
    if invocation is None:
        return 0
    start = invocation_start(example.ids, invocation)
    assert start is not None, f"{example.place} lacks the invocation, which was checked when it was read"
    return start
