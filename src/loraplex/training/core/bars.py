"""Progress bars, where somebody watches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loraplex.training.core.train_state import TrainState

OnStep = Callable[[Sequence[TrainState]], None]


@contextmanager
def training_progress(states: Sequence[TrainState], *, enabled: bool) -> Iterator[OnStep]:
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
            bars.add_task(state.name, total=state.num_steps, loss="-", held_out="-", speed="-") for state in states
        ]

        def draw(states: Sequence[TrainState]) -> None:
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
