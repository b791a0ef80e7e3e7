"""Progress: bars where somebody watches, else a line of the log every few steps."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex.training.core.train_state import TrainState

OnStep = Callable[[Sequence[TrainState]], None]
LOG_STEPS = 10
LOG_SECONDS = 2.0

logger = logging.getLogger(__name__)


@contextmanager
def training_progress(states: Sequence[TrainState], *, enabled: bool) -> Iterator[OnStep]:
    """Yield what to call after each step; it draws on a terminal, and logs elsewhere."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield _log_steps() if enabled else lambda states: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} (held out {task.fields[held_out]}), {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks = [
            bars.add_task(state.name, total=state.num_steps, loss="-", held_out="-", speed="-") for state in states
        ]

        def draw(states: Sequence[TrainState]) -> None:
            for task, state in zip(tasks, states, strict=True):
                done = state.progress
                bars.update(
                    task,
                    completed=done.step,
                    loss=_last(done.train_losses),
                    held_out=_last(done.eval_losses),
                    speed=f"{done.num_tokens / done.seconds:.0f}" if done.seconds else "-",
                )

        draw(states)
        yield draw


def _log_steps() -> OnStep:
    """A line for the first step, for every evaluation and the end, and between them every few steps and seconds."""
    told_at = 0.0

    def tell(states: Sequence[TrainState]) -> None:
        nonlocal told_at
        step, now = max(state.progress.step for state in states), time.monotonic()
        is_first = told_at == 0.0
        evaluated = any(state.progress.eval_steps[-1:] == [step] for state in states)
        is_due = step % LOG_STEPS == 0 and now - told_at >= LOG_SECONDS
        if is_first or evaluated or is_due or all(state.is_finished for state in states):
            told_at = now
            logger.info("step %d of %d: %s", step, max(state.num_steps for state in states), _losses(states))

    return tell


def _losses(states: Sequence[TrainState]) -> str:
    """The last losses of each, and the tokens/s of all."""
    told = [
        f"{state.name} {_last(state.progress.train_losses)} (held out {_last(state.progress.eval_losses)})"
        for state in states
    ]
    seconds = max(state.progress.seconds for state in states)
    speed = [f"{sum(state.progress.num_tokens for state in states) / seconds:.0f} tokens/s"] if seconds else []
    return ", ".join(["loss " + "; ".join(told), *speed])


def _last(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.3f}" if losses else "-"


@contextmanager
def counting_progress(description: str, *, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what to call with how many of how many are done; it draws only on a terminal."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
