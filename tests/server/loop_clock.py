"""How long a server's event loop was held up while something was done."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.tiny_server import Running

_TICK_S = 0.002
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


class Gap:
    """The longest time between two ticks of a task, less what it meant to wait."""

    largest_s = 0.0


@contextmanager
def largest_gap(server: Running) -> Iterator[Gap]:
    gap, loop = Gap(), server.server._loop

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.perf_counter()
            gap.largest_s = max(gap.largest_s, now - last - _TICK_S)
            last = now

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
