"""How long a server's event loop was held up while something was done."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.server.tiny_server import Running

_TICK_S = 0.005
# In a process of its own: what it reads and writes must not hold the server's interpreter.
_CLIENT = """
import sys, urllib.request, urllib.error
url, path, key = sys.argv[1:]
headers = {"content-type": "application/json"} | ({"authorization": "Bearer " + key} if key else {})
try:
    with urllib.request.urlopen(urllib.request.Request(url, open(path, "rb").read(), headers), timeout=100) as answer:
        print(answer.status, len(answer.read()))
except urllib.error.HTTPError as error:
    print(error.code, len(error.read()))
"""


class HeldClock:
    """How long a thread was held up, less the time in which threads of this process waited for processors.

    On a machine with nothing else to do that is the time that passed. On a busy one another thread may hold the
    interpreter and wait for a processor meanwhile, which isn't what the tests are about.
    """

    def __init__(self) -> None:
        self._last = self._now()

    def lap_s(self) -> float:
        """Since the call before."""
        before, self._last = self._last, self._now()
        return self._last[0] - before[0] - max(0.0, self._last[1] - before[1])

    @staticmethod
    def _now() -> tuple[float, float]:
        """A clock, and the time that all threads have spent in run queues (0 where the system doesn't tell)."""
        waited_ns = 0
        for schedule in Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError):  # a thread that has ended
                waited_ns += int(schedule.read_text().split()[1])
        return time.perf_counter(), waited_ns / 1e9


class Gap:
    """The longest time between two ticks of a task that this process held it up."""

    largest_s = 0.0


@contextmanager
def largest_gap(server: Running) -> Iterator[Gap]:
    gap, loop = Gap(), server.server._loop

    async def tick() -> None:
        clock = HeldClock()
        while True:
            await asyncio.sleep(_TICK_S)
            gap.largest_s = max(gap.largest_s, clock.lap_s() - _TICK_S)

    ticking = asyncio.run_coroutine_threadsafe(tick(), loop)
    try:
        yield gap
    finally:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(5 * _TICK_S), loop).result()  # the tick that was late has come
        ticking.cancel()


def post(server: Running, path: str, body: bytes, folder: Path, key: str = "") -> tuple[int, int]:
    """Status and length of the answer."""
    file = folder / "body"
    file.write_bytes(body)
    command = [sys.executable, "-c", _CLIENT, f"{server.url}{path}", str(file), key]
    status, length = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    return int(status), int(length)
