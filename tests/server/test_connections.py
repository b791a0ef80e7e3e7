"""Connections that never become requests take nobody else's place."""

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loraplex.server.connections import Protocol
from loraplex.server.settings import NetworkSettings, RequestLimits
from tests.server.tiny_server import Running, make_model, running, settings

MOST = 20
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def limited(root) -> Iterator[Running]:
    network = NetworkSettings(
        port=0,
        drain_s=10,
        max_connections=40,
        max_connections_per_address=MOST,
        headers_timeout_s=TIMEOUT_S,
        max_header_bytes=4096,
    )
    config = settings(limits=RequestLimits(stall_timeout_s=TIMEOUT_S))
    with running(make_model(root), replace(config, network=network)) as server:
        yield server


def connect(server: Running, sent: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.server.port), timeout=30, source_address=(source, 0))
    connection.sendall(sent)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_healthy(server: Running) -> bool:
    with server.http() as http:
        return http.get("/health").status_code == 200


def wait_until_closed(server: Running) -> None:
    stop = time.monotonic() + 30
    while server.server.server_state.connections and time.monotonic() < stop:
        time.sleep(0.02)
    assert not server.server.server_state.connections


def test_half_open_connections_of_one_address_are_limited(limited: Running) -> None:
    held = [connect(limited, b"GET /health HTTP/1.1\r\n", "127.0.0.2") for _ in range(100)]
    last = answer(held[-1])
    assert last.startswith(b"HTTP/1.1 429 ")
    assert b"too_many_connections" in last
    assert b"retry-after" in last
    assert is_healthy(limited), "another address was refused"
    assert limited.server.server_state.connections
    for connection in held:
        connection.close()
    wait_until_closed(limited)


def test_slow_headers_end(limited: Running) -> None:
    silent, slow = connect(limited), connect(limited, b"GET /health HTTP/1.1\r\n")
    began = time.monotonic()
    while time.monotonic() - began < 10:  # one byte now and then gains no time
        try:
            slow.sendall(b"a")
        except OSError:
            break
        time.sleep(0.1)
    assert time.monotonic() - began < 5
    assert answer(silent) == b""
    wait_until_closed(limited)


def test_slow_headers_are_told(limited: Running) -> None:
    told = answer(connect(limited, b"GET /health HTTP/1.1\r\nx-slow: "))
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"headers_timeout" in told


def test_a_later_request_has_the_same_time(limited: Running) -> None:
    connection = connect(limited, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health")
    told = answer(connection)
    assert told.count(b"HTTP/1.1 200 ") == 1
    assert told.count(b"HTTP/1.1 408 ") == 1


def test_headers_without_end_are_refused(limited: Running) -> None:
    told = answer(connect(limited, b"GET /health HTTP/1.1\r\nx-long: " + b"a" * 5000))
    assert told.startswith(b"HTTP/1.1 431 ")
    url = answer(connect(limited, b"GET /" + b"a" * 5000))
    assert url.startswith(b"HTTP/1.1 431 ")


def test_answers_that_take_longer_than_headers_may_are_not_cut(limited: Running) -> None:
    with limited.http() as http:
        assert http.get("/health").status_code == 200
        time.sleep(2 * TIMEOUT_S)  # idle between requests: keep_alive_s
        body = b'{"model": "a", "prompt": "x", "max_tokens": 2}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection = connect(limited, head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
        time.sleep(2 * TIMEOUT_S)  # a body has body_timeout_s
        connection.sendall(body)
        assert answer(connection).startswith(b"HTTP/1.1 200 ")
        assert http.get("/health").status_code == 200


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of an answer, so that the rest waits in the server."""
    connected = Protocol.connection_made

    def with_small_buffer(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connected(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", with_small_buffer)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_readers_that_take_nothing_of_an_answer_are_cut(limited: Running, connection: str, small_buffers) -> None:
    body = json.dumps({"prompt": "x" * 250_000, "return_token_strs": True}).encode()
    head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: {connection}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", limited.server.port))
    stalled.sendall(head.encode() + body)
    time.sleep(1)
    assert limited.server.server_state.connections
    wait_until_closed(limited)
    assert len(answer(stalled)) < len(body), "all of it was kept for a reader that takes nothing"


def test_slow_readers_are_not_cut(limited: Running, small_buffers) -> None:
    body = json.dumps({"prompt": "x" * 250_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", limited.server.port))
    slow.sendall(head + body)
    size = 0
    while part := slow.recv(16384):
        size += len(part)
        time.sleep(0.05)
    assert size > 500_000


def test_places_are_given_back(limited: Running) -> None:
    wait_until_closed(limited)
    for _ in range(3):
        held = [connect(limited) for _ in range(MOST)]
        time.sleep(0.1)
        for connection in held:
            connection.close()
        wait_until_closed(limited)
    assert is_healthy(limited)
