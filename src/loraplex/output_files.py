"""Files that loraplex writes: whole or not at all, and never in the place of what it didn't write."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loraplex.errors import OutputError

MARK = "made with loraplex"
_LOOKED_AT = 4096  # bytes at either end of a file
_MARKING = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}


def has_mark(path: Path) -> bool:
    """Whether a file says near its beginning or its end that loraplex wrote it, as its pictures and results do."""
    return MARK.encode() in _ends_of(path)


def check_replaceable(path: Path, is_ours: Callable[[Path], bool] = has_mark) -> None:
    """Raise OutputError where something is at `path` that loraplex didn't write."""
    try:
        if not os.path.lexists(path) or (path.is_file() and is_ours(path)):
            return
    except OSError as error:
        raise unwritable(path, error) from error
    raise OutputError(
        f"{str(path)!r} exists, and it is not known to be of loraplex, so it is not replaced. Choose another path, or "
        "move it away."
    )


@contextmanager
def whole_file(
    path: str | Path, is_ours: Callable[[Path], bool] = has_mark, *, token: str | None = None
) -> Iterator[Path]:
    """Yield a temporary path, of the same suffix, that takes the place of `path` when the block ends without error.

    Whatever happens, `path` has the old content or the new. Killed writers leave their temporary file; with a `token`
    there is one at most, and one writer at a time. Raises OutputError, also for an OSError in the block.
    """
    path = Path(path)
    check_replaceable(path, is_ours)
    temporary = path.with_name(f".{token or secrets.token_hex(4)}.{path.name}")
    try:
        temporary.unlink(missing_ok=True)  # not to write through a link
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush_to_disk(temporary)
        check_replaceable(path, is_ours)  # something may have appeared meanwhile
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except (OSError, ValueError) as error:  # the second for a name that no file can have, or a suffix of no format
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError, ValueError):  # it was moved into place, or never made
            temporary.unlink()


def resolved(path: str | Path) -> Path:
    """The path to write to, without links. Raises OutputError where they lead nowhere."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise unwritable(Path(path), error) from error


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure of matplotlib in the format of the suffix, marked where the format has room for it."""
    with whole_file(path) as temporary:
        word = _MARKING.get(temporary.suffix.removeprefix(".").lower())
        figure.savefig(temporary, dpi=dpi, metadata=None if word is None else {word: MARK})


def flush_to_disk(path: Path) -> None:
    """Return when a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block, an OSError becomes an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> OutputError:
    """What to raise for a path that can't be written."""
    return OutputError(f"{str(path)!r} can't be written: {error}. Choose a place with room that you may write to.")


def _ends_of(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_LOOKED_AT)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOOKED_AT))
        return first + file.read(_LOOKED_AT)
