"""Server-sent events to one client, at its pace."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from itertools import chain
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.json_pieces import gathered, json_pieces
from loraplex.server.api.send_clock import ABORT_KEY, SendClock
from loraplex.server.handlers import ClientLeft, until_client_leaves
from loraplex.server.state import SCOPE_KEY, RequestContext

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def sse(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def sse_pieces(chunk: dict[str, Any]) -> list[bytes]:
    """The same of a chunk that may be long."""
    return gathered(chain([b"data: "], json_pieces(chunk), [b"\n\n"]))


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
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._stall_timeout_s = stall_timeout_s
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._context: RequestContext = scope[SCOPE_KEY]
        log = self._context.log

        def cut() -> None:
            log["ended"] = "stalled"
            scope[ABORT_KEY]()  # which the client's end follows

        self._clock = SendClock(self._stall_timeout_s, cut)
        try:
            await until_client_leaves(receive, self._send_all(send))
        except ClientLeft:
            log.setdefault("ended", "disconnected")
        finally:
            self._clock.stop()
            await self._on_end()

    async def _send_all(self, send: Send) -> None:
        """The chunks, an error that ends them, and the end."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await self._send(send, chunk)
            except ApiError as error:
                self._context.note(error)
                await self._send(send, sse(error.body()))
            await self._send(send, DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._chunks.aclose()

    async def _send(self, send: Send, chunk: bytes) -> None:
        self._clock.begin()
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        self._clock.end()
