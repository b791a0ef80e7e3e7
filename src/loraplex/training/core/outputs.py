"""What a run writes into its output folder: none of it is an input, and nothing that somebody else wrote is touched."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from loraplex.errors import ConfigError
from loraplex.output_files import check_replaceable, unwritable
from loraplex.training.core.checkpoint import FILE, is_checkpoint

DIVERGED = ".diverged"  # what the folder of last good weights is called after the name
_MAX_LINE = 1 << 16  # bytes of a log's first line, with room to spare


class JobPaths(NamedTuple):
    """Everything that a job or a mixture called `name` leaves."""

    folder: Path
    diverged: Path
    log: Path
    plot: Path


def job_paths(output: Path, name: str) -> JobPaths:
    return JobPaths(
        folder=output / name,
        diverged=output / f"{name}{DIVERGED}",
        log=output / f"{name}.jsonl",
        plot=output / f"{name}.png",
    )


def check_outputs(output: Path, names: Sequence[str], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise before anything is written: ConfigError for an output that is an input (`inputs`: paths by what they are),
    OutputError for a file of somebody else in the place of a log, a plot or the checkpoint.
    """
    written = [output / FILE, *(path for name in names for path in job_paths(output, name))]
    given = [(what, path) for what, paths in inputs.items() for path in paths]
    for path in written:
        for what, taken in given:
            if _overlap(path, taken):
                raise ConfigError(
                    f"the run would write to {str(path)!r}, but {what} is {str(taken)!r}. Choose another output "
                    "folder, or another name."
                )
    check_replaceable(output / FILE, is_checkpoint)
    for name in names:
        check_replaceable(job_paths(output, name).log, _is_log)
        check_replaceable(job_paths(output, name).plot)


def _overlap(written: Path, given: Path) -> bool:
    """Whether one is the other or lies in it; links are followed."""
    try:
        if written.exists() and given.exists() and written.samefile(given):  # hard links too
            return True
        one, other = written.resolve(), given.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a symbolic link to itself
        raise unwritable(written, error) from error
    return one == other or (given.exists() and (one.is_relative_to(other) or other.is_relative_to(one)))


def _is_log(path: Path) -> bool:
    """Whether a file begins as a job's log does; one without a line is."""
    with path.open("rb") as file:
        line = file.readline(_MAX_LINE)
    try:
        entry = json.loads(line or b'{"step": 0}')
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and "step" in entry
