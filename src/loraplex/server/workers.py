"""Threads for what would hold up the event loop, shared fairly between those who ask."""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
_NICENESS = 10  # gets a tenth of a processor that the engine wants too


class Workers:
    """A pool of threads, of which one owner (a key, or without keys an address) has at most half at a time.

    Work whose caller was cancelled before it began is never begun. Used on one event loop.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=_give_way)
        self._share = max(1, num_threads // 2)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """The work's result; an owner's place is free again when the work has ended, not when its caller has left."""
        turn = self._turns.get(owner)
        if turn is None:
            turn = self._turns[owner] = asyncio.Semaphore(self._share)
        await turn.acquire()
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        future.add_done_callback(lambda done: _release(turn, loop))
        return await asyncio.wrap_future(future)  # cancelling it cancels what hasn't begun


def _give_way() -> None:
    """Let the scheduler of Linux run the engine's threads first where processors are scarce.

    There each thread has a niceness of its own; elsewhere it is the whole process's, which stays as it is.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _release(turn: asyncio.Semaphore, loop: asyncio.AbstractEventLoop) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and all turns with it
        loop.call_soon_threadsafe(turn.release)
