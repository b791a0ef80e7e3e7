"""A bar for each job, where somebody watches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex.training.job_state import JobState

OnStep = Callable[[Sequence[JobState]], None]


@contextmanager
def training_progress(states: Sequence[JobState], *, enabled: bool) -> Iterator[OnStep]:
    """Yield what to call after each step; it draws only on a terminal."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield lambda states: None
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
            bars.add_task(state.job.name, total=state.data.num_steps, loss="-", held_out="-", speed="-")
            for state in states
        ]

        def draw(states: Sequence[JobState]) -> None:
            for task, state in zip(tasks, states, strict=True):
                done = state.progress
                bars.update(
                    task,
                    completed=done.step,
                    loss=f"{done.train_losses[-1]:.3f}" if done.train_losses else "-",
                    held_out=f"{done.eval_losses[-1]:.3f}" if done.eval_losses else "-",
                    speed=f"{done.num_tokens / done.seconds:.0f}" if done.seconds else "-",
                )

        draw(states)
        yield draw
