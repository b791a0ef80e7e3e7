"""SIGTERM under load: what was accepted finishes or is told so, what comes later gets 503."""

import asyncio
import json
import os
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


@contextmanager
def served(root: Path, drain_s: float) -> Iterator[tuple[subprocess.Popen, int]]:
    command = [sys.executable, "-m", "tests.server.serve_tiny", str(root), str(drain_s)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read().decode()
        yield process, int(line)
    finally:
        process.kill()
        process.wait()


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


async def load_and_stop(process: subprocess.Popen, port: int) -> tuple[Counter, Counter, int]:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, limits=limits) as client:
        before = [asyncio.create_task(one(client, number)) for number in range(NUM_REQUESTS)]
        while await in_engine(client) < NUM_REQUESTS:
            assert not any(task.done() for task in before), "requests ended before all had begun: slow the steps down"
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        while (await client.get("/health")).status_code != 503:
            await asyncio.sleep(0.01)
        after = [await one(client, number) for number in range(4)]
        ended = Counter(await asyncio.gather(*before))
    return ended, Counter(after), await asyncio.to_thread(process.wait, TIMEOUT_S)


async def in_engine(client: httpx.AsyncClient) -> int:
    """The number of requests that run or wait there."""
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return int(float(values["loraplex_requests_running"]) + float(values["loraplex_requests_waiting"]))


@pytest.mark.parametrize(("drain_s", "endings"), [(60, {"finished"}), (0.5, {"finished", "error", "refused"})])
def test_accepted_requests_finish_or_are_told(root, drain_s, endings):
    with served(root, drain_s) as (process, port):
        ended, after, status = asyncio.run(load_and_stop(process, port))
    assert status == 0
    assert set(after) == {"refused"}
    assert set(ended) <= endings, ended
    assert ended.total() == NUM_REQUESTS
    if drain_s < 1:
        assert ended["error"] + ended["refused"] > 0, "all were done before the drain ended: the test tests nothing"


def test_second_signal_does_not_wait(root):
    body = {"model": "a", "prompt": "x", "max_tokens": 200, "n": 16, "stream": True, "ignore_eos": True}
    with served(root, 100) as (process, port):
        url = f"http://127.0.0.1:{port}"
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as answer:
            lines = answer.iter_lines()  # kept: a client whose iterator is gone has hung up
            next(lines)
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health", timeout=TIMEOUT_S).status_code != 503:
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
