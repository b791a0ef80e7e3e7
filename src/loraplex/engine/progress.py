"""A progress bar over requests."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """Counts finished requests and new tokens; shows them if it has somewhere to."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task("requests", total=total, tokens=0)
        self._num_tokens = 0

    def update(self, num_tokens: int, is_finished: bool) -> None:
        self._num_tokens += num_tokens
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=int(is_finished), tokens=self._num_tokens)


@contextmanager
def progress_bar(total: int, *, show: bool) -> Iterator[Bar]:
    if not show:
        yield Bar(None, total)
        return
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[tokens]} tokens")) as progress:
        yield Bar(progress, total)
