"""The load generator against a real small server, and against ones that misbehave."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex.bench.serve_client import Outcome, ServeClient
from loraplex.bench.serve_load import ServeBench, run_serve, send_all
from loraplex.bench.serve_report import LoadReport
from loraplex.cli.app import cli
from loraplex.errors import ConfigError, RemoteError
from loraplex.server.auth.keys import KeyFile
from tests.server.tiny_server import Running, make_model, running, settings, write_adapters

SHORT = {"seconds": 1.0, "prompt_words": 2, "max_tokens": 5, "ignore_eos": True, "timeout_s": 30}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(make_model(root), settings()) as server:
        yield server


@contextmanager
def canned(answer: bytes, wait_s: float = 0.0) -> Iterator[str]:
    """A server that gives one answer to everything, and its URL."""
    ready, found = threading.Event(), []

    async def answer_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None, "the client sent no body"
        await reader.readexactly(int(length[1]))  # closing with something unread would reset the connection
        writer.write(answer)
        await writer.drain()
        await asyncio.sleep(wait_s)
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer_one, "127.0.0.1", 0)
        stop = asyncio.Event()
        found.extend([server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop])
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30), "the canned server didn't start"
    yield f"http://127.0.0.1:{found[0]}"
    found[1].call_soon_threadsafe(found[2].set)
    thread.join(30)


def events(*chunks: dict | str) -> bytes:
    lines = [f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks]
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + "".join(lines).encode()


def piece(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def status_of(url: str, timeout_s: float = 5.0) -> Outcome:
    """The outcome of one request."""

    async def one() -> Outcome:
        bench = ServeBench(url=url, timeout_s=timeout_s)
        async with ServeClient(url, api_key=None, timeout_s=timeout_s, connections=1) as client:
            return (await send_all(client, [(0.0, {"model": "a", "prompt": "x"})], bench)).outcomes[0]

    return asyncio.run(one())


def test_counts_are_those_of_the_server(server: Running):
    before = server.server.state.engine.stats()
    results = run_serve(ServeBench(url=server.url, rate=30, seed=1, **SHORT))
    after = server.server.state.engine.stats()
    assert results["errors"] == {}
    assert results["finished"] == results["requests"] > 10
    warm_up = 8
    new_tokens = after.counts.num_new_tokens - before.counts.num_new_tokens
    assert new_tokens == 5 * (results["requests"] + warm_up)
    assert results["new_tokens_per_s"] == pytest.approx(5 * results["requests"] / results["seconds"])
    assert results["adapters_listed"] == 5, "a, b, c and two mixtures; not the base model"
    for key in ("first_token_s", "token_s", "request_s"):
        assert 0 < results[key]["p50"] <= results[key]["p90"] <= results[key]["p99"]
    assert results["first_token_s"]["p50"] < results["request_s"]["p50"]


def test_capacity_is_measured_where_no_rate_is_given(server: Running):
    told: list[str] = []
    results = run_serve(ServeBench(url=f"{server.url}/v1/", share=0.5, flood=24, adapters=("a", "a:0.5+b"), **SHORT),
                        tell=told.append)  # fmt: skip
    assert results["rate"] == 0.5 * results["capacity_requests_per_s"] > 0
    assert results["errors"] == {}
    assert len(told) == 3


def test_same_seed_asks_for_the_same(server: Running, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[tuple[str, str]]] = []
    stream = ServeClient.stream

    async def noted(self, body, outcome, due):
        asked[-1].append((body["model"], body["prompt"]))
        await stream(self, body, outcome, due)

    monkeypatch.setattr(ServeClient, "stream", noted)
    for seed in (3, 3, 4):
        asked.append([])
        run_serve(ServeBench(url=server.url, rate=20, seed=seed, **SHORT))
    assert sorted(asked[0]) == sorted(asked[1]) != sorted(asked[2])


def test_questions_of_a_chat_file_are_asked_as_chats(server: Running, tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": "ef", "completion": "g"}) + "\n")
    from loraplex.bench.serve_load import _bodies

    chat, completion = _bodies(ServeBench(prompt_files=(str(file),), max_tokens=3))
    assert chat == {"messages": turns[:1], "max_tokens": 3, "temperature": 0}
    assert completion == {"prompt": "ef", "max_tokens": 3, "temperature": 0}


def test_refusals_are_counted_by_status(root: Path, tmp_path: Path):
    keys = KeyFile(tmp_path / "keys.json")
    keys.create()
    config = settings(keys=keys)
    config = replace(config, access=replace(config.access, max_wrong_keys_per_minute=10_000))
    with running(make_model(root), config) as server:
        results = run_serve(ServeBench(url=server.url, rate=20, adapters=("a",), **SHORT), api_key="wrong")
        with pytest.raises(RemoteError, match="401"):
            run_serve(ServeBench(url=server.url, rate=20, **SHORT), api_key="wrong")
        with pytest.raises(RemoteError, match=r"failed: \{.401.: 96\}"):
            run_serve(ServeBench(url=server.url, adapters=("a",), **SHORT), api_key="wrong")
    assert results["errors"] == {"401": results["requests"]}
    assert results["finished"] == 0
    assert "API key" in results["messages"][0]


def test_unreachable_server_is_named():
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9"):
        run_serve(ServeBench(url="http://127.0.0.1:9", rate=5, **SHORT))


def test_broken_streams_are_no_successes():
    with canned(events(piece("x"), {"error": {"message": "engine failed"}}, "[DONE]")) as url:
        assert status_of(url).status == "stream_error"
    with canned(events(piece("x"))) as url:
        assert status_of(url).status == "cut_off"
    with canned(events("{")) as url:
        assert status_of(url).status == "bad_stream"
    with canned(b"") as url:
        assert status_of(url).status == "connection"


def test_silent_and_endless_streams_time_out():
    with canned(events(piece("x")), wait_s=3) as url:
        assert status_of(url, timeout_s=0.3).status == "timeout"


def test_pieces_are_counted_where_there_is_no_usage():
    with canned(events(piece("x"), piece("y"), piece("", "stop"), "[DONE]")) as url:
        outcome = status_of(url)
    assert (outcome.status, outcome.num_new_tokens) == ("ok", 2)
    assert "no usage" in LoadReport(outcomes=[outcome], seconds=1).warnings()[-1]


def test_generator_that_does_not_keep_up_says_so(server: Running):
    async def blocked() -> LoadReport:
        async def block() -> None:
            await asyncio.sleep(0.1)
            time.sleep(0.4)  # what a busy machine does to the generator

        bench = ServeBench(url=server.url)
        requests = [(0.02 * i, {"model": "a", "prompt": "x", "max_tokens": 1}) for i in range(20)]
        async with ServeClient(server.url, api_key=None, timeout_s=30, connections=20) as client:
            report, _ = await asyncio.gather(send_all(client, requests, bench), block())
        return report

    report = asyncio.run(blocked())
    assert "didn't keep up" in report.warnings()[0]
    assert report.as_json()["generator_lag_s"]["p99"] > 0.2
    late = max(report.outcomes, key=lambda outcome: outcome.lag_s)
    assert late.end_s > late.lag_s, "times run from when a request was due, not from when it was sent"


def test_waiting_for_a_place_counts(server: Running):
    bench = ServeBench(url=server.url, rate=40, concurrency=1, **SHORT | {"max_tokens": 20})
    results = run_serve(bench)
    assert results["errors"] == {}
    assert results["held_s"]["p99"] > 0.05
    assert any("places" in warning for warning in results["warnings"])


def test_command_prints_a_table_and_saves_without_the_key(server: Running, tmp_path: Path):
    output = tmp_path / "serve.json"
    arguments = ["bench", "serve", "--url", server.url, "--rate", "20", "--seconds", "1", "--prompt-words", "2"]
    run = CliRunner().invoke(
        cli, [*arguments, "--adapters", "a, b", "--max-tokens", "4", "--api-key", "hush", "--output", str(output)]
    )
    assert run.exit_code == 0, run.output
    assert "time to first token" in run.output
    saved = json.loads(output.read_text())
    assert saved["workload"]["adapters"] == ["a", "b"]
    assert saved["results"]["finished"] == saved["results"]["requests"] > 5
    assert "hush" not in output.read_text()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"url": "localhost"}, "url"),
        ({"rate": 0}, "rate"),
        ({"rate": 1e9}, "requests/s"),
        ({"seconds": float("inf")}, "seconds"),
        ({"exponent": -1}, "exponent"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_workloads_that_make_no_sense_are_refused(options: dict, option: str):
    with pytest.raises(ConfigError, match=option):
        ServeBench(**options)
