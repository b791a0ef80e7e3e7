"""Tokens of streams are written as the engine tells them, and wait for the reader's task where the reader is slow."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from loraplex.engine.frontend.output_processor import OutputCollector
from loraplex.engine.request import Delta
from loraplex.errors import EngineError
from loraplex.server.api.completion_answers import Chunks
from loraplex.server.connections import ChunkedChannel, Protocol
from tests.server.tiny_server import TIMEOUT_S, Running, wait_until_idle

NUM_TOKENS = 40
OPTIONS = {"model": "a", "temperature": 1.0, "seed": 3}
COMPLETION = OPTIONS | {"prompt": "xyz", "max_tokens": NUM_TOKENS, "ignore_eos": True}
CHAT = OPTIONS | {"messages": [{"role": "user", "content": "xyz"}], "max_tokens": NUM_TOKENS, "ignore_eos": True}
RESPONSE = OPTIONS | {"input": "xyz", "max_output_tokens": NUM_TOKENS}
GENERATE = {"inputs": "xyz", "parameters": {"adapter_id": "a", "max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What channels write."""
    parts: list[bytes] = []
    write = ChunkedChannel.write

    def noted(channel: ChunkedChannel, part: bytes) -> None:
        parts.append(part)
        write(channel, part)

    monkeypatch.setattr(ChunkedChannel, "write", noted)
    return parts


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(event: dict) -> str:
    """The text that any of the four streams' events adds."""
    if "token" in event:
        return "" if event["token"]["special"] else event["token"]["text"]
    if event.get("type") == "response.output_text.delta":
        return event["delta"]
    choices = event.get("choices") or [{}]
    return choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""


@pytest.mark.parametrize(
    ("path", "body", "stream"),
    [
        ("/v1/completions", COMPLETION, {"stream": True}),
        ("/v1/chat/completions", CHAT, {"stream": True}),
        ("/v1/responses", RESPONSE, {"stream": True}),
        ("/generate_stream", GENERATE, {}),
    ],
)
def test_streams_say_what_the_whole_answer_says(server: Running, written, path, body, stream) -> None:
    whole = server.http().post(path.removesuffix("_stream"), json=body).json()
    answer = server.http().post(path, json=body | stream)
    assert answer.status_code == 200, answer.text
    told = "".join(map(text_of, events(answer.text)))
    assert told
    assert json.dumps(told) in json.dumps(whole), "the stream and the whole answer differ"
    num_events = sum(bool(text_of(event)) for event in events(answer.text))
    assert sum(b"data" in part for part in written) > num_events / 2, "most tokens took the long way"
    wait_until_idle(server)


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = Protocol.connection_made

    def with_small_buffer(protocol, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connected(protocol, transport)

    monkeypatch.setattr(Protocol, "connection_made", with_small_buffer)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of channels that were asked while their reader was behind."""
    found: list[bool] = []
    is_open = ChunkedChannel.is_open.fget

    def noted(channel: ChunkedChannel) -> bool:
        answer = is_open(channel)
        found.extend([True] * (not answer))
        return answer

    monkeypatch.setattr(ChunkedChannel, "is_open", property(noted))
    return found


def test_a_slow_reader_gets_everything_in_order(server: Running, small_buffers, refused) -> None:
    """The reader takes nothing until tokens had to wait, then all of them."""
    body = COMPLETION | {"n": 4, "max_tokens": 100, "logprobs": 20, "return_token_ids": True}
    whole = server.http().post("/v1/completions", json=body).json()["choices"]
    content = json.dumps(body | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", server.server.port))
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        while not refused:
            time.sleep(0.01)
        parts = []
        while part := connection.recv(2**20):
            parts.append(part)
    ids: dict[int, list[int]] = {}
    for event in events(dechunked(b"".join(parts)).decode()):
        (choice,) = event["choices"]
        ids.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert ids == {choice["index"]: choice["token_ids"] for choice in whole}
    wait_until_idle(server)


def dechunked(answer: bytes) -> bytes:
    """The body; whatever was written must be whole chunks."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return body
        body, end, rest = body + rest[:length], rest[length : length + 2], rest[length + 2 :]
        assert end == b"\r\n"


def test_a_fault_in_writing_ends_the_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    small, calls = Chunks.small, []

    def failing(chunks: Chunks, news) -> bytes:
        calls.append(news)
        if len(calls) == 5:
            raise ZeroDivisionError("a chunk that can't be written")
        return small(chunks, news)

    monkeypatch.setattr(Chunks, "small", failing)
    with pytest.raises(httpx.RemoteProtocolError):
        server.http().post("/v1/completions", json=COMPLETION | {"stream": True})
    wait_until_idle(server)
    assert len(calls) == 5, "the stream went on after its fault"


def delta(token: int) -> Delta:
    return Delta(request_id="r", index=0, token_ids=(token,), text="x")


def test_what_follows_a_fault_is_not_told() -> None:
    """The next token may be there before the reader is woken: it would come after a gap."""

    def fails(events) -> bool:
        raise ZeroDivisionError

    async def main() -> None:
        collector = OutputCollector(asyncio.get_running_loop())
        reading = asyncio.ensure_future(collector.take(fails))
        await asyncio.sleep(0)
        collector.put([delta(1)])
        collector.put([delta(2)])
        with pytest.raises(ZeroDivisionError):
            await reading

    asyncio.run(main())


def test_events_are_taken_at_once_only_while_the_reader_waits() -> None:
    taken: list[int] = []

    def take(events) -> bool:
        taken.extend(event.token_ids[0] for event in events)
        return True

    async def main() -> list[int]:
        collector = OutputCollector(asyncio.get_running_loop())
        collector.put([delta(0)])  # nobody waits
        first = [event.token_ids[0] for event in await collector.take(take)]
        reading = asyncio.ensure_future(collector.take(take))
        await asyncio.sleep(0)
        collector.put([delta(1)])
        collector.put([delta(2)])
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        collector.put([delta(3)])  # the reader has gone
        return first + [-1] + [event.token_ids[0] for event in collector.untaken()]

    assert asyncio.run(main()) == [0, -1, 3]
    assert taken == [1, 2]


def test_what_is_not_taken_at_once_is_read_in_order() -> None:
    asked: list[int] = []

    def take(events) -> bool:
        asked.append(events[0].token_ids[0])
        return asked[-1] < 2

    async def main() -> list[int]:
        collector = OutputCollector(asyncio.get_running_loop())
        reading = asyncio.ensure_future(collector.take(take))
        await asyncio.sleep(0)
        for token in range(5):
            collector.put([delta(token)])
        return [event.token_ids[0] for event in await reading]

    assert asyncio.run(main()) == [2, 3, 4]
    assert asked == [0, 1, 2], "what comes behind events that wait must wait, too"


def test_the_readers_own_fault_and_the_engines_wake_it() -> None:
    def take(events) -> bool:
        raise ZeroDivisionError

    async def main(error: EngineError | None) -> None:
        collector = OutputCollector(asyncio.get_running_loop())
        reading = asyncio.ensure_future(collector.take(take))
        await asyncio.sleep(0)
        if error is None:
            collector.put([delta(0)])
        else:
            collector.fail(error)
        await asyncio.wait_for(reading, TIMEOUT_S)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main(None))
    with pytest.raises(EngineError):
        asyncio.run(main(EngineError("it ended")))
