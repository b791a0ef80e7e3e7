"""Answers at a client's pace: JSON in pieces, which is never written or sent all at once, and server-sent events."""

import asyncio
import base64
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.server.api.api_errors import ApiError
from loraplex.server.state import SCOPE_KEY, ClientLeft, until_client_leaves

ABORT_KEY = "loraplex_abort"  # in a scope: closes the connection without waiting for what is still to be sent
CHANNEL_KEY = "loraplex_channel"  # in a scope whose server has one: its BodyChannel
DONE = b"data: [DONE]\n\n"
Encoding = Literal["base64", "list"]
_PIECE = 3 * 2**14  # numbers, or bytes, that are written at once; base64 takes three bytes at a time
_SMALL = 2**18  # bytes that are one piece


class Deferred(Protocol):
    """A value whose JSON comes in pieces, between which another thread may run."""

    def pieces(self) -> Iterator[bytes]: ...


class BodyChannel(Protocol):
    """Writes parts of an answer's body to its connection without waiting; never more than the connection takes."""

    @property
    def is_open(self) -> bool:
        """Whether the answer has begun and its reader keeps up."""
        ...

    def write(self, part: bytes) -> None:
        """Of a channel that is open."""
        ...


class Numbers:
    """An array as nested lists, or as its little-endian bytes in base64."""

    def __init__(self, array: np.ndarray, encoding: Encoding) -> None:
        self._array = array
        self._encoding = encoding

    def pieces(self) -> Iterator[bytes]:
        if self._encoding == "list":
            yield from _nested(self._array)
            return
        little = np.ascontiguousarray(self._array, dtype=self._array.dtype.newbyteorder("<"))
        content = memoryview(little.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        yield b'"'
        for start in range(0, len(content), _PIECE):
            yield base64.b64encode(content[start : start + _PIECE])
        yield b'"'


class Choice:
    """One of an answer's choices."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def pieces(self) -> Iterator[bytes]:
        yield from json_pieces(self._fields)


def json_pieces(content: Any) -> Iterator[bytes]:
    """The JSON of something that may have Deferred in it."""
    mark = secrets.token_hex(16)  # that no text has in it
    deferred: list[Deferred] = []

    def replace(value: Any) -> str:
        if not isinstance(value, Numbers | Choice):
            raise TypeError(f"{type(value).__name__} has no JSON")
        deferred.append(value)
        return mark

    first, *others = orjson.dumps(content, default=replace).split(f'"{mark}"'.encode())
    yield first
    for value, rest in zip(deferred, others, strict=True):
        yield from value.pieces()
        yield rest


def gathered(pieces: Iterator[bytes]) -> list[bytes]:
    """The same with few small ones."""
    found, small, size = [], [], 0
    for piece in pieces:
        small.append(piece)
        size += len(piece)
        if size > _SMALL:
            found.append(b"".join(small))
            small, size = [], 0
    return [*found, b"".join(small)]


def _nested(array: np.ndarray) -> Iterator[bytes]:
    """The JSON of nested lists, of at most `_PIECE` numbers at a time."""
    if array.size <= _PIECE:
        yield _numbers(array)
        return
    separator, row_size = b"[", array[0].size
    rows = max(1, _PIECE // row_size)
    for start in range(0, len(array), rows):
        yield separator
        separator = b","
        if row_size > _PIECE:
            yield from _nested(array[start])
        else:
            yield _numbers(array[start : start + rows])[1:-1]
    yield b"]"


def _numbers(array: np.ndarray) -> bytes:
    exact = np.float64 if array.dtype.kind == "f" else array.dtype  # so that all digits are written
    return orjson.dumps(np.ascontiguousarray(array, dtype=exact), option=orjson.OPT_SERIALIZE_NUMPY)


def sse(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def sse_pieces(chunk: dict[str, Any]) -> list[bytes]:
    """The same of a chunk that may be long."""
    return gathered(chain([b"data: "], json_pieces(chunk), [b"\n\n"]))


class PacedSend:
    """Sends parts of a body at the reader's pace; one that takes nothing for `limit_s` is disconnected.

    One timer that now and then looks whether a send lasts: a timer of its own for each part costs more than the part.
    """

    def __init__(self, scope: Scope, send: Send, limit_s: float) -> None:
        self._scope = scope
        self._send = send
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None  # when what is being sent began
        self._timer = self._loop.call_later(limit_s, self._look)

    async def __call__(self, part: bytes) -> None:
        self._since = self._loop.time()
        await self._send({"type": "http.response.body", "body": part, "more_body": True})
        self._since = None

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._limit_s
        if due <= now:
            self._scope[SCOPE_KEY].log["ended"] = "stalled"
            self._scope[ABORT_KEY]()  # which the client's end follows
        else:
            self._timer = self._loop.call_at(due, self._look)


class PiecesResponse(Response):
    """Sends pieces at the reader's pace. One that takes nothing for `stall_timeout_s` is disconnected."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], stall_timeout_s: float) -> None:
        super().__init__()
        self._pieces = pieces
        self._stall_timeout_s = stall_timeout_s
        self.headers["content-length"] = str(sum(map(len, pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        paced = PacedSend(scope, send, self._stall_timeout_s)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces:
                await paced(piece)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            paced.stop()


class EventStream(Response):
    """Sends chunks as they come. A reader that takes nothing for `stall_timeout_s` is disconnected.

    Only what the connection buffers is made in advance: while a reader is slow, its new tokens gather in the feed, and
    become one chunk.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        stall_timeout_s: float,
        on_end: Callable[[], Awaitable[None]],  # however it ends, even before the first chunk was asked for
        *,
        done: bytes = DONE,  # what ends it
        path: str = "",  # which errors have the shape of
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._stall_timeout_s = stall_timeout_s
        self._on_end = on_end
        self._done, self._path = done, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        paced = PacedSend(scope, send, self._stall_timeout_s)
        try:
            await until_client_leaves(receive, self._send_all(scope, send, paced))
        except ClientLeft:
            scope[SCOPE_KEY].log.setdefault("ended", "disconnected")
        finally:
            paced.stop()
            await self._on_end()

    async def _send_all(self, scope: Scope, send: Send, paced: PacedSend) -> None:
        """The chunks, an error that ends them, and the end."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await paced(chunk)
            except ApiError as error:
                scope[SCOPE_KEY].note(error)
                await paced(sse(error.told(self._path)[1]))
            await paced(self._done)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._chunks.aclose()
