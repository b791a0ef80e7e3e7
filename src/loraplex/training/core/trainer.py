"""The loop: batches, gradients, optimizer step, log, evaluation, checkpoint; whatever is trained."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from loraplex.errors import TrainingError
from loraplex.output_files import writing
from loraplex.training.core.checkpoint import FILE, save_checkpoint
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.outputs import job_paths
from loraplex.training.core.stopping import StopRequest
from loraplex.training.core.trackers import Trackers
from loraplex.training.core.train_state import TrainState

logger = logging.getLogger(__name__)


class Loss(NamedTuple):
    """What one state's records of a step, or those held out, have come to."""

    value: float  # the mean over all answer tokens, of all processes
    num_tokens: int  # of the records, without padding
    details: dict[str, Any]  # more for the log
    exact_match: float | None = None  # of an evaluation: the share of records answered exactly


class TrainingTask(Protocol):
    """What the loop trains: states, and how their records become losses and gradients."""

    @property
    def states(self) -> Sequence[TrainState]:
        """Each with a gradient, an optimizer and an end of its own; their order is that of the checkpoint."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Inside the block the base model takes the rows of steps and evaluations."""
        ...

    def accumulate_gradients(self, active: Sequence[int]) -> list[Loss]:
        """Add the gradients of the next step of every state in `active`, by this process's share of the rows."""
        ...

    def evaluate(self, due: Sequence[int]) -> list[Loss]:
        """The held-out loss of every state in `due`."""
        ...


class JobLog:
    """Appends lines to `<output>/<name>.jsonl`; a resumed run cuts off what its checkpoint doesn't know of.

    Raises OutputError where it can't be written.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path = path
        self._enabled = enabled
        self.num_bytes = 0

    def start(self, num_bytes: int) -> None:
        """Keep the first `num_bytes` of the file and go on from there."""
        self.num_bytes = num_bytes
        if not self._enabled:
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                self.num_bytes = min(num_bytes, file.tell())  # it may have been removed meanwhile
                file.truncate(self.num_bytes)

    def write(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry) + "\n").encode()
        self.num_bytes += len(line)
        if self._enabled:
            with writing(self.path), self.path.open("ab") as file:
                file.write(line)

    def sync(self) -> None:
        """Bring the lines to the disk: before the checkpoint that counts them."""
        if self._enabled:
            with writing(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())


class Trainer:
    """Trains the states of a task together; what one learns doesn't depend on the others."""

    def __init__(
        self,
        task: TrainingTask,
        log_bytes: Sequence[int],  # of each state's log, which the checkpoint knows of
        ranks: ProcessGroup,
        *,
        output: Path,
        checkpoint_every: int,
        identity: Mapping[str, Any],  # of the run: what its checkpoint belongs to
        trackers: Trackers | None = None,
    ) -> None:
        self._task = task
        self._states = task.states
        self._ranks = ranks
        self._output = output
        self._checkpoint_every = checkpoint_every
        self._identity = identity
        self._trackers = trackers or Trackers()
        self._logs = [JobLog(job_paths(output, state.name).log, enabled=ranks.is_first) for state in self._states]
        for log, num_bytes in zip(self._logs, log_bytes, strict=True):
            log.start(num_bytes)

    def run(self, on_step: Callable[[Sequence[TrainState]], None], stop: StopRequest) -> None:
        """Train until every state is finished; `on_step` sees the states after each step.

        Once `stop` came on any process, the step is saved and the run ends with what the signal raises.
        """
        while active := [index for index, state in enumerate(self._states) if not state.is_finished]:
            self.step(active)
            self._evaluate([index for index in active if self._states[index].evaluates_now])
            finished = [index for index in active if self._states[index].is_finished]
            for index in finished:
                self._states[index].restore_best()
            step = max(self._states[index].progress.step for index in active)
            # The checkpoint comes before adapters: a folder with adapters can always be gone on with.
            stops = self._ranks.any(stop.came)
            if finished or stops or step % self._checkpoint_every == 0:
                self._checkpoint()
            for index in finished:
                self.write(index)
            on_step(self._states)
            if stops and len(finished) < len(active):
                logger.warning("stopped after step %d; the same command goes on from %s", step, self._output / FILE)
                stop.end()

    def step(self, active: Sequence[int]) -> None:
        """One optimizer step of the states in `active`."""
        started = time.perf_counter()
        losses = self._task.accumulate_gradients(active)
        for index, loss in zip(active, losses, strict=True):
            self._update(index, loss)
        seconds = time.perf_counter() - started
        for index in active:
            self._states[index].progress.seconds += seconds

    def write(self, index: int) -> None:
        """Write a finished state's weights, once for all processes."""
        state = self._states[index]
        paths = job_paths(self._output, state.name)
        if self._ranks.is_first:
            state.write(paths.diverged if state.has_diverged else paths.folder)

    def _update(self, index: int, loss: Loss) -> None:
        state = self._states[index]
        gradient, rate = state.optimizer.gradient, state.optimizer.learning_rate
        gradient.copy_(self._ranks.add_up(gradient))
        try:
            norm = state.update(loss.value, loss.num_tokens, self._ranks.any)
        except TrainingError as error:
            self._stop(index, error)
            return
        entry = {"step": state.progress.step, "loss": loss.value, "learning_rate": rate, "grad_norm": norm}
        self._log(index, entry | {"tokens": loss.num_tokens} | loss.details)

    def _evaluate(self, due: Sequence[int]) -> None:
        for index, loss in zip(due, self._task.evaluate(due) if due else [], strict=True):
            state = self._states[index]
            try:
                state.record_evaluation(loss.value, loss.exact_match)
            except TrainingError as error:
                self._stop(index, error)
                continue
            self._log(index, {"step": state.progress.step, "eval_loss": loss.value} | loss.details)

    def _log(self, index: int, entry: Mapping[str, Any]) -> None:
        self._logs[index].write(entry)
        self._trackers.log(self._states[index].name, entry)

    def _stop(self, index: int, error: TrainingError) -> None:
        """Tell of a state that diverged; it is finished, and the others go on."""
        logger.error("%s%s", error, " The other jobs go on." if len(self._states) > 1 else "")
        found = self._states[index].progress.divergence
        assert found is not None, "a state was stopped that didn't diverge"
        self._logs[index].write(found.as_json())

    def _checkpoint(self) -> None:
        """Save everything, logs first: the checkpoint counts their bytes."""
        for log in self._logs:
            log.sync()
        if self._ranks.is_first:
            log_bytes = [log.num_bytes for log in self._logs]
            save_checkpoint(self._output, self._states, log_bytes, self._identity)
        self._ranks.wait()
