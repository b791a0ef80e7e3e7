"""Many requests of all kinds at once, most of them bad: each gets its status, and nothing stays behind."""

import asyncio
import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import httpx
import pytest

from loraplex.bench.measures import resident_bytes
from loraplex.server.auth.keys import KeyFile
from loraplex.server.connections import Protocol
from loraplex.server.settings import RequestLimits
from tests.server.tiny_server import TIMEOUT_S, Running, make_model, running, settings, wait_until_idle

CONCURRENT = 24
MODELS = ("tiny", "a", "b:0.5+a", "mix-ab")
PROMPT = "The protein"
NUM_TOKENS = 6
MAX_GROWTH = 64 * 2**20  # bytes, from a tenth of the storm to its end


@dataclass
class Storm:
    """A server under attack, and what its good answers are."""

    server: Running
    client: httpx.AsyncClient
    key: str
    expected: dict[str, str]
    draw: random.Random

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def body(self, **fields: object) -> dict[str, object]:
        model = self.draw.choice(MODELS)
        return {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0} | fields

    async def post(self, body: object, status: int, **options: object) -> str:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | self.headers | options.pop("headers", {})
        answer = await self.client.post("/v1/completions", content=content, headers=headers, **options)
        assert answer.status_code == status, answer.text
        if status != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.text


async def good(storm: Storm) -> None:
    body = storm.body()
    text = await storm.post(body, 200)
    assert json.loads(text)["choices"][0]["text"] == storm.expected[body["model"]]


async def good_stream(storm: Storm) -> None:
    body = storm.body(stream=True)
    lines = [line[6:] for line in (await storm.post(body, 200)).splitlines() if line]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text == storm.expected[body["model"]]


async def raw(
    storm: Storm, body: dict[str, object], receive_bytes: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of one's own, with the request sent."""
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", storm.server.server.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {storm.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def leaves_in_the_middle(storm: Storm) -> None:
    reader, writer = await raw(storm, storm.body(stream=storm.draw.random() < 0.7, max_tokens=200))
    if storm.draw.random() < 0.5:
        await reader.read(100)
    writer.transport.abort()


async def leaves_while_sending(storm: Storm) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", storm.server.server.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {storm.key}\r\n"
    writer.write(head.encode() + b'content-length: 1000\r\n\r\n{"model"')
    await writer.drain()
    writer.transport.abort()


async def reads_slowly(storm: Storm) -> None:
    body = storm.body(stream=True, max_tokens=100)
    reader, writer = await raw(storm, body)
    text = b""
    while b"[DONE]" not in text:
        part = await reader.read(2048)
        assert part, "a slow reader was dropped"
        text += part
        await asyncio.sleep(storm.draw.random() * 0.02)
    writer.close()


async def bad_json(storm: Storm) -> None:
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 5000,
        b'{"model": "tiny", "prompt": NaN}',
        b"{} {}",
    ]
    await storm.post(storm.draw.choice(bodies), 400)


async def bad_field(storm: Storm) -> None:
    fields = [
        {"unknown": 1},
        {"temperature": "hot"},
        {"temperature": 1e400},
        {"max_tokens": -1},
        {"max_tokens": 10**12},
        {"n": 10**9},
        {"top_p": 0},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [10**6]},
        {"prompt": ["x"] * 200},
        {"stop": ["x"] * 100},
        {"logit_bias": {str(i): 1 for i in range(2000)}},
        {"model": "a:inf"},
        {"model": "+" * 100},
        {"model": "x" * 9000},
        {"response_format": {"type": "json_schema"}},
        {"seed": 2**70},
        {"capture_attention": {"layers": [7]}},
    ]
    await storm.post(storm.body(**storm.draw.choice(fields)), 400)


async def wrong_key(storm: Storm) -> None:
    keys = ["none", "x", storm.key[:-2], storm.key + "x", "lpx_12345678_" + "x" * 43]
    await storm.post(storm.body(), 401, headers={"authorization": f"Bearer {storm.draw.choice(keys)}"})


async def unknown_model(storm: Storm) -> None:
    await storm.post(storm.body(model="unknown"), 404)


async def too_large(storm: Storm) -> None:
    await storm.post(b"x" * 100_001, 413)


async def other_path(storm: Storm) -> None:
    answer = await storm.client.get(f"/v1/{storm.draw.random()}", headers=storm.headers)
    assert answer.status_code == 404


KINDS: dict[Callable[[Storm], Awaitable[None]], int] = {
    good: 20,
    good_stream: 20,
    leaves_in_the_middle: 12,
    leaves_while_sending: 4,
    reads_slowly: 4,
    bad_json: 8,
    bad_field: 14,
    wrong_key: 8,
    unknown_model: 4,
    too_large: 3,
    other_path: 3,
}


async def rage(storm: Storm, count: int) -> Counter[str]:
    """`count` requests, CONCURRENT at a time; one that isn't answered as it should fails the test."""
    done: Counter[str] = Counter()
    kinds = iter(storm.draw.choices(list(KINDS), list(KINDS.values()), k=count))

    async def worker() -> None:
        for kind in kinds:
            await kind(storm)
            done[kind.__name__] += 1

    await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
    return done


async def storm_over(server: Running, key: str, count: int) -> Counter[str]:
    limits = httpx.Limits(max_connections=CONCURRENT)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
        storm = Storm(server, client, key, {}, random.Random(0))
        for model in MODELS:
            answer = await storm.post(storm.body(model=model), 200)
            storm.expected[model] = json.loads(answer)["choices"][0]["text"]
        done = await rage(storm, count // 10)
        before = resident_bytes()
        done += await rage(storm, count - count // 10)
        assert resident_bytes() - before < MAX_GROWTH
        for _ in range(4):
            await good(storm)
    return done


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_storm_leaves_nothing_behind(root, tmp_path, count):
    file = KeyFile(tmp_path / "keys.json")
    key, _ = file.create()
    config = settings(keys=file, limits=RequestLimits(max_body_bytes=100_000))
    config = replace(config, access=replace(config.access, max_wrong_keys_per_minute=10**6))
    with running(make_model(root), config) as server:
        done = asyncio.run(storm_over(server, key, count))
        assert done.total() == count
        wait_until_idle(server)
        engine = server.server.state.engine
        assert engine.is_running
        assert engine._collectors == {}
        assert engine._engine._tracker._results == {}
        assert engine._engine._tracker._states == {}
        assert server.server.state.usages.of(file.find(key)).num_running == 0
        assert all(state.num_leases == 0 for state in server.model.adapters())


@pytest.fixture
def small_buffers(monkeypatch):
    """The system's buffers hold megabytes, which would take everything that a tiny model can say."""
    connected = Protocol.connection_made

    def with_small_buffer(protocol, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connected(protocol, transport)

    monkeypatch.setattr(Protocol, "connection_made", with_small_buffer)


def test_slow_reader_neither_blocks_nor_grows(root, small_buffers):
    """While one reads nothing, others are answered; it is disconnected after stall_timeout_s."""
    config = settings(limits=RequestLimits(stall_timeout_s=1))
    with running(make_model(root), config) as server:

        async def main() -> bool:
            storm = Storm(server, None, "none", {}, random.Random(0))
            body = storm.body(model="tiny", stream=True, n=16, max_tokens=200, logprobs=20)
            reader, writer = await raw(storm, body, receive_bytes=4096)
            async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as client:
                storm.client = client
                for _ in range(5):
                    await storm.post(storm.body(max_tokens=2), 200)
            stop = asyncio.get_running_loop().time() + TIMEOUT_S
            while server.server.state.num_active and asyncio.get_running_loop().time() < stop:
                await asyncio.sleep(0.1)
            text = b""
            with contextlib.suppress(ConnectionResetError):
                while part := await reader.read(65536):
                    text += part
            writer.close()
            return b"[DONE]" in text

        assert asyncio.run(main()) is False, "a reader that took nothing got everything: nothing was tested"
        wait_until_idle(server)
