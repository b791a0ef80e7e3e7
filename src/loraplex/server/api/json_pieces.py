"""JSON in pieces: an answer of many megabytes is never written, copied or sent all at once."""

import base64
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.server.api.send_clock import ABORT_KEY, SendClock

Encoding = Literal["base64", "list"]
_PIECE = 3 * 2**14  # numbers, or bytes, that are written at once; base64 takes three bytes at a time
_SMALL = 2**18  # bytes that are one piece


class Deferred(Protocol):
    """A value whose JSON comes in pieces, between which another thread may run."""

    def pieces(self) -> Iterator[bytes]: ...


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


class PiecesResponse(Response):
    """Sends pieces at the reader's pace. One that takes nothing for `stall_timeout_s` is disconnected."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], stall_timeout_s: float) -> None:
        super().__init__()
        self._pieces = pieces
        self._stall_timeout_s = stall_timeout_s
        self.headers["content-length"] = str(sum(map(len, pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def cut() -> None:
            scope["loraplex"].log["ended"] = "stalled"
            scope[ABORT_KEY]()

        clock = SendClock(self._stall_timeout_s, cut)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces:
                clock.begin()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                clock.end()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            clock.stop()


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
