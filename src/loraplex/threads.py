"""Threads beside the one that computes: the engine's.

OpenMP keeps worker threads for every thread that has computed in parallel. GNU's runtime counts all of them; where they
are more than the processors, none waits a moment for the next parallel loop: each goes to sleep at once, and every loop
of whoever still computes wakes them through the kernel, which makes decoding some 1.7 times as slow on two processors
(libgomp's gomp_throttled_spin_count_var). So a thread beside the engine's computes alone, or gives its workers back.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SOFT = 1  # omp_pause_soft
_NICENESS = 10  # gets a tenth of a processor that the engine wants too


def give_back_workers() -> None:
    """End the calling thread's workers, which wait for nothing now; its next parallel loop makes new ones."""
    for library in _runtimes():
        library.omp_pause_resource_all(_SOFT)


def compute_alone() -> None:
    """From now on the calling thread's loops have no workers; for threads that stand beside a computing one."""
    _limit(1)


def stand_beside() -> None:
    """As the first thing of a thread that works beside the engine's: it computes alone, and gives way.

    Linux has a niceness for each thread; elsewhere it is the whole process's, which stays as it is.
    """
    compute_alone()
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


@contextmanager
def computing_alone() -> Iterator[None]:
    """The same inside the block."""
    before = torch.get_num_threads()
    compute_alone()
    try:
        yield
    finally:
        _limit(before)


@contextmanager
def workers_given_back() -> Iterator[None]:
    """Behind the block, or behind a function that this decorates, the calling thread has no workers."""
    try:
        yield
    finally:
        give_back_workers()


def _limit(num_threads: int) -> None:
    torch.get_num_threads()  # the first time, torch itself sets the number for this thread
    for library in _runtimes():
        library.omp_set_num_threads(num_threads)
    set_mkl = _mkl_setter()  # whose number is another one
    if set_mkl is not None:
        set_mkl(1 if num_threads == 1 else 0)  # 0: as many as all threads have
    give_back_workers()


@cache
def _runtimes() -> list[Any]:
    """GNU's OpenMP runtimes of this process: that of torch, and another one where the kernels were linked to it."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # no Linux
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    found = [library for path in sorted(paths) if (library := _opened(path)) is not None]
    return [library for library in found if hasattr(library, "omp_pause_resource_all")]  # since GCC 9


def _opened(path: str) -> Any | None:
    """A library that is loaded already."""
    try:
        return ctypes.CDLL(path, mode=getattr(os, "RTLD_NOLOAD", 0))
    except OSError:
        return None


@cache
def _mkl_setter() -> Any | None:
    """What sets the number of a thread's workers in MKL, where torch has that inside."""
    library = _opened(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return getattr(library, "MKL_Set_Num_Threads_Local", None)
