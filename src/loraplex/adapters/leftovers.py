"""What a writer has beside the folder that it writes, and what is left of it when the writer is killed.

For the folder `name` these are `.name.TOKEN.tmp` (half written, or to be removed), `.name.TOKEN.old` (a whole folder
that was moved aside) and `.name.TOKEN.lock`. A living writer holds a lock on the last, which ends with its process.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIXES = (".tmp", ".old", ".lock")


def is_leftover(path: Path) -> bool:
    """Whether the name is one of a writer's own, which never is an adapter."""
    return path.name.startswith(".") and path.suffix in _SUFFIXES


@contextmanager
def claim_temporary(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `folder` that others leave alone until the block ends; then it is removed."""
    while True:
        token = secrets.token_hex(4)
        with _lock(_beside(folder, token, ".lock")) as is_ours:
            if not is_ours:  # another process took it for a dead writer's before it was locked
                continue
            temporary = _beside(folder, token, ".tmp")
            temporary.mkdir()
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return


def restore_replaced(folder: Path) -> None:
    """If nothing is at `folder` because a writer was killed between its two renames, bring the old one back."""
    if os.path.exists(folder) or not os.path.isdir(folder.parent):
        return
    # OSError: another process restores it, or this one may not write here; then nothing is at `folder` for it.
    with suppress(OSError):
        for token in _tokens(folder, ".old"):
            with _lock(_beside(folder, token, ".lock")) as is_dead:
                if is_dead and not folder.exists():
                    _beside(folder, token, ".old").rename(folder)


def restore_all_replaced(root: Path) -> None:
    """The same for every folder below `root`."""
    for parent, folders, _ in os.walk(root):  # which doesn't mind folders that go meanwhile
        matches = [re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.old", folder) for folder in folders]
        for match in matches:
            if match is not None:
                restore_replaced(Path(parent) / match[1])


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of `folder` left behind."""
    for token in _tokens(folder, *_SUFFIXES):
        with _lock(_beside(folder, token, ".lock")) as is_dead:
            if is_dead:
                for suffix in (".tmp", ".old"):
                    shutil.rmtree(_beside(folder, token, suffix), ignore_errors=True)


def _tokens(folder: Path, *suffixes: str) -> list[str]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.([0-9a-f]{{8}})(\.\w+)")
    matches = [pattern.fullmatch(path.name) for path in folder.parent.iterdir()]
    return sorted({match[1] for match in matches if match is not None and match[2] in suffixes})


def _beside(folder: Path, token: str, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{token}{suffix}")


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether the lock is ours, and so no living process has it; then the file is removed in the end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if os.fstat(descriptor).st_nlink == 0:  # whoever had the lock has removed it meanwhile
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
