"""SIGTERM under load: what was accepted finishes or is told so, what comes later gets 503."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
NUM_TOKENS = 40
NUM_REQUESTS = 16


class Served:
    """A server that was forked, and ends by a signal."""

    def __init__(self, forker: subprocess.Popen, pid: int, port: int) -> None:
        self._forker = forker
        self.pid, self.port = pid, port
        self.status: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises TimeoutError."""
        if self.status is None:
            if not select.select([self._forker.stdout], [], [], timeout_s)[0]:
                raise TimeoutError(f"the server didn't end in {timeout_s} seconds")
            self.status = int(self._forker.stdout.readline())
        return self.status


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "tests.server.serve_tiny"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, bufsize=0, **pipes) as process:
        yield process
        process.stdin.close()


@contextmanager
def served(forker: subprocess.Popen, root: Path, drain_s: float, **options: float) -> Iterator[Served]:
    forker.stdin.write(json.dumps({"root": str(root), "drain_s": str(drain_s)} | options).encode() + b"\n")
    pid = int(forker.stdout.readline())
    server = Served(forker, pid, int(forker.stdout.readline()))
    try:
        yield server
    finally:
        if server.status is None:
            os.kill(pid, signal.SIGKILL)
            server.wait(TIMEOUT_S)


async def one(client: httpx.AsyncClient, number: int) -> str:
    """How a request ended: finished, error, refused; anything else is a silent drop."""
    stream = number % 2 == 0
    body = {"model": "ab"[number % 2], "prompt": "x" * (1 + number), "max_tokens": NUM_TOKENS, "temperature": 0}
    body["ignore_eos"] = True
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code == 200:
            return "finished" if answer.json()["usage"]["completion_tokens"] == NUM_TOKENS else "short"
        return "refused" if answer.json()["error"]["code"] == "shutting_down" else answer.text
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    if answer.status_code == 503:
        return "refused"
    assert lines[-1] == "[DONE]", lines[-1:]
    chunks = [json.loads(line) for line in lines[:-1]]
    if "error" in chunks[-1]:
        return "error" if chunks[-1]["error"]["code"] == "shutting_down" else str(chunks[-1])
    return "finished" if chunks[-1]["choices"][0]["finish_reason"] == "length" else "short"


async def load_and_stop(server: Served) -> tuple[Counter, Counter, int]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}", timeout=TIMEOUT_S, limits=limits
    ) as client:
        before = [asyncio.create_task(one(client, number)) for number in range(NUM_REQUESTS)]
        while await in_engine(client) < NUM_REQUESTS:
            assert not any(task.done() for task in before), "requests ended before all had begun: slow the steps down"
            await asyncio.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        while (await client.get("/health")).status_code != 503:
            await asyncio.sleep(0.01)
        after = [await one(client, number) for number in range(4)]
        ended = Counter(await asyncio.gather(*before))
    return ended, Counter(after), await asyncio.to_thread(server.wait, TIMEOUT_S)


async def in_engine(client: httpx.AsyncClient) -> int:
    """The number of requests that run or wait there."""
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return int(float(values["loraplex_requests_running"]) + float(values["loraplex_requests_waiting"]))


@pytest.mark.parametrize(
    ("drain_s", "options", "endings"),
    [(60, {"drain_step_s": 0}, {"finished"}), (0.5, {}, {"finished", "error", "refused"})],
)
def test_accepted_requests_finish_or_are_told(forker, root, drain_s, options, endings):
    with served(forker, root, drain_s, **options) as server:
        ended, after, status = asyncio.run(load_and_stop(server))
    assert status == 0
    assert set(after) == {"refused"}
    assert set(ended) <= endings, ended
    assert ended.total() == NUM_REQUESTS
    if drain_s < 1:
        assert ended["error"] + ended["refused"] > 0, "all were done before the drain ended: the test tests nothing"


def test_second_signal_does_not_wait(forker, root):
    body = {"model": "a", "prompt": "x", "max_tokens": 200, "n": 16, "stream": True, "ignore_eos": True}
    with served(forker, root, 100) as server:
        url = f"http://127.0.0.1:{server.port}"
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as answer:
            lines = answer.iter_lines()  # kept: a client whose iterator is gone has hung up
            next(lines)
            server.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health", timeout=TIMEOUT_S).status_code != 503:
                pass
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
