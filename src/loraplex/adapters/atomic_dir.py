"""Write a folder all or nothing: whatever happens, a reader finds the whole old one or the whole new one."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loraplex.adapters.leftovers import claim_temporary, remove_leftovers, restore_replaced
from loraplex.errors import AdapterExistsError
from loraplex.output_files import flush_to_disk, unwritable
from loraplex.validation import listed

_AT_FDCWD = -100  # paths are relative to the working directory
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # by the kernel, or the file system


@contextmanager
def atomic_folder(folder: Path, check_destination: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty temporary folder that takes `folder`'s name, files flushed, when the block ends without error.

    `check_destination` raises if something at `folder` must not be replaced; it is called before the block and
    again before the move. A process that is killed leaves the old folder or the new one, and perhaps a temporary
    beside it, which the next writer removes. Raises OutputError where the disk doesn't take it.
    """
    try:
        restore_replaced(folder)
        check_destination()
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        with claim_temporary(folder) as temporary:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                flush_to_disk(path)
            check_destination()  # something may have appeared meanwhile
            _move_into_place(temporary, folder)
            flush_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of the first
        raise unwritable(folder, error) from error


def _move_into_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
    elif not exchange(temporary, folder):
        _replace_by_two_renames(temporary, folder)


def _replace_by_two_renames(temporary: Path, folder: Path) -> None:
    """Where the file system can't exchange two folders. Between the renames nothing is at `folder`; `restore_replaced`
    brings the old one back if the process ends there.
    """
    old = temporary.with_suffix(".old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    old.rename(temporary)  # so that nobody restores what is half removed
    shutil.rmtree(temporary)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths of one file system, as renameat2(2) does; False where that can't be done in one step.

    Raises OSError for what rename would: a missing path, no permission.
    """
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """The function of the C library (Linux, glibc 2.28 or newer); None elsewhere."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function


def check_destination(folder: Path, what: str, replaceable: Collection[str], *, overwrite: bool) -> None:
    """Raise AdapterExistsError for a folder that is there, unless it may be overwritten and holds nothing but `what`.

    `replaceable` are the names of the files that such a folder has.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise AdapterExistsError(f"{str(folder)!r} exists already. Choose another folder, or pass overwrite=True.")
    others = {path.name for path in folder.iterdir()} - {*replaceable} if folder.is_dir() else {folder.name}
    if others:
        raise AdapterExistsError(
            f"{str(folder)!r} is not only {what}, it holds {listed(others)}, so it is not replaced. Choose another "
            "folder, or move these files away."
        )
