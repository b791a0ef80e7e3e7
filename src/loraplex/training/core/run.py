"""A run around the loop: it goes on from its checkpoint or begins, trains, draws, and tells what became of each."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterExistsError, TrainingError
from loraplex.output_files import writing
from loraplex.training.core.bars import training_progress
from loraplex.training.core.checkpoint import FILE, load_checkpoint
from loraplex.training.core.config import TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.outputs import job_paths
from loraplex.training.core.plots import plot_losses
from loraplex.training.core.results import TrainResult
from loraplex.training.core.stopping import stop_requests
from loraplex.training.core.trackers import Trackers, tracking
from loraplex.training.core.train_state import TrainState
from loraplex.training.core.trainer import Trainer, TrainingTask

logger = logging.getLogger(__name__)


def run_task(
    task: TrainingTask, config: TrainConfig, ranks: ProcessGroup, identity: Mapping[str, Any], *, after_divergence: str
) -> list[TrainResult]:
    """Train every state to its end, from the checkpoint in the output folder if there is one, and write it.

    `identity` tells runs apart; `after_divergence` says how to go on. Raises CheckpointError, AdapterExistsError,
    OutputError, and in the end TrainingError, with all results, where something diverged.
    """
    output = Path(config.output)
    states = task.states
    log_bytes = _resume_or_start(output, states, identity, config, ranks)
    finished = [index for index, state in enumerate(states) if state.is_finished]
    with _tracking(states, output, identity, config, ranks) as trackers:
        trainer = Trainer(
            task,
            log_bytes,
            ranks,
            output=output,
            checkpoint_every=config.checkpoint_every,
            identity=identity,
            trackers=trackers,
        )
        for index in finished:  # before the run was interrupted
            trainer.write(index)
        if len(finished) < len(states):
            show = config.progress and ranks.is_first
            with task.running(), stop_requests() as stop, training_progress(states, enabled=show) as on_step:
                trainer.run(on_step, stop)
    if config.plots and ranks.is_first:
        for state in (state for state in states if state.progress.train_losses):
            plot_losses(state, job_paths(output, state.name).plot)
    ranks.wait()
    results = [_result(state, output) for state in states]
    if any(state.has_diverged for state in states):
        raise TrainingError(f"{_divergences(states, output)} {after_divergence}", results)
    return results


def _tracking(
    states: Sequence[TrainState], output: Path, identity: Mapping[str, Any], config: TrainConfig, ranks: ProcessGroup
) -> AbstractContextManager[Trackers]:
    going_on = [state.progress.step for state in states if not state.is_finished]
    enabled = ranks.is_first and bool(going_on)
    first = min(going_on, default=0) + 1
    names = [state.name for state in states]
    return tracking(config.trackers, output, names, identity, enabled=enabled, first_step=first)


def _resume_or_start(
    output: Path, states: Sequence[TrainState], identity: Mapping[str, Any], config: TrainConfig, ranks: ProcessGroup
) -> list[int]:
    """Restore the states from a checkpoint, or prepare an empty output folder; the bytes of each log to keep."""
    goes_on = config.resume and (output / FILE).exists()
    log_bytes = load_checkpoint(output, states, identity) if goes_on else [0] * len(states)
    for state in states:
        paths = job_paths(output, state.name)
        if paths.folder.exists() and not goes_on:
            if config.resume:
                raise AdapterExistsError(
                    f"{str(paths.folder)!r} exists already, and there is no checkpoint to go on from. Choose another "
                    "output folder, or pass resume=False to train it anew and replace it."
                )
            state.check_replaceable(paths.folder)
        if paths.diverged.exists():
            state.check_replaceable(paths.diverged)
    ranks.wait()
    if goes_on:
        logger.info("going on from %s at step %d", output / FILE, max(s.progress.step for s in states))
        return log_bytes
    if ranks.is_first:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            (output / FILE).unlink(missing_ok=True)
    ranks.wait()
    return log_bytes


def _divergences(states: Sequence[TrainState], output: Path) -> str:
    """What diverged, and where its last good weights are."""
    told = [
        f"{state.divergence_message()}. Its last good weights, of step {state.progress.divergence.last_good_step}, are "
        f"in {str(job_paths(output, state.name).diverged)!r}."
        for state in states
        if state.progress.divergence is not None
    ]
    if len(told) < len(states):
        told.append("The other jobs are done and written.")
    return " ".join(told)


def _result(state: TrainState, output: Path) -> TrainResult:
    progress, paths = state.progress, job_paths(output, state.name)
    assert progress.finished is not None, f"{state.name!r} is returned before it is finished"
    return TrainResult(
        name=state.name,
        folder=paths.diverged if state.has_diverged else paths.folder,
        log=paths.log,
        num_steps=progress.step,
        finished=progress.finished,
        train_losses=tuple(progress.train_losses),
        eval_steps=tuple(progress.eval_steps),
        eval_losses=tuple(progress.eval_losses),
        eval_exact=tuple(progress.eval_exact),
        best_step=progress.best_step,
        num_tokens=progress.num_tokens,
        num_truncated=state.num_truncated,
        seconds=progress.seconds,
        divergence=progress.divergence,
        zero_gradient_since=progress.zero_gradient_since,
    )
