"""Let the n-th call that touches a file fail, or be the process's last."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import loraplex

PACKAGE = str(Path(loraplex.__file__).parent)
_OURS = (PACKAGE, "pathlib", "shutil", "tempfile", "contextlib", "os.py", "safetensors", "glob")
_CALLS = frozenset(
    (
        *(
            "open",
            "read",
            "readinto",
            "readline",
            "write",
            "close",
            "flush",
            "fsync",
            "truncate",
            "stat",
            "fstat",
            "lstat",
        ),
        *("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "scandir", "listdir", "flock", "serialize_file"),
        *("chmod", "__enter__"),
    )
)


class Faults:
    """Counts the calls of file operations in this thread; the one with the number `at` ends as `act` says."""

    def __init__(self, at: int | None = None, act: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.names: list[str] = []
        self._at = at
        self._act = act

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "c_call" or not any(part in frame.f_code.co_filename for part in _OURS):
            return
        name = getattr(argument, "__name__", "")
        if name not in _CALLS:
            return
        self.count += 1
        self.names.append(name)
        if self.count - 1 == self._at and self._act is not None:
            act, self._act = self._act, None
            act()


@contextmanager
def faults(at: int | None = None, act: Callable[[], None] | None = None) -> Iterator[Faults]:
    found = Faults(at, act)
    sys.setprofile(found)
    try:
        yield found
    finally:
        sys.setprofile(None)


def count_calls(work: Callable[[], object]) -> int:
    with faults() as found:
        work()
    return found.count


def raising(code: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(code, os.strerror(code))

    return act


def killed_at(work: Callable[[], object], at: int) -> None:
    """Do the work in a process that ends, without another word, at a call."""
    child = os.fork()
    if child == 0:
        try:
            with faults(at, lambda: os._exit(9)):
                work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def points(count: int, most: int) -> list[int]:
    """Numbers of calls, spread over all of them."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)}) if count > most else list(range(count))
