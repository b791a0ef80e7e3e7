"""Connections before they are requests: how many an address may hold, and how long and large headers may be."""

import asyncio
from collections import Counter

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from loraplex.server.api.api_errors import HEADERS_TIMEOUT, HEADERS_TOO_LARGE, TOO_MANY_CONNECTIONS, ApiError
from loraplex.server.api.streaming import ABORT_KEY, CHANNEL_KEY
from loraplex.server.settings import NetworkSettings


class ConnectionLimits:
    """What all connections of one server share."""

    def __init__(self, network: NetworkSettings, stall_timeout_s: float) -> None:
        self.stall_timeout_s = stall_timeout_s
        self.per_address = network.max_connections_per_address
        self.headers_timeout_s = network.headers_timeout_s
        self.max_header_bytes = network.max_header_bytes
        self.held: Counter[str] = Counter()


class ChunkedChannel:
    """Writes chunks of one answer's body, as the server would after several calls: see BodyChannel."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_open(self) -> bool:
        cycle = self._cycle
        ended = cycle.response_complete or cycle.disconnected
        return bool(cycle.response_started and cycle.chunked_encoding and not ended and not cycle.flow.write_paused)

    def write(self, part: bytes) -> None:
        if part:  # an empty chunk is the body's end
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


class Protocol(HttpToolsProtocol):
    """Closes connections whose headers don't come; the application can cut one whose reader has stopped reading."""

    limits: ConnectionLimits
    _timer: asyncio.TimerHandle | None = None
    _header_bytes: int | None = None  # of the headers that are under way
    _is_silent = True  # nothing was ever received
    _is_counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        if self.limits.held[self._address] >= self.limits.per_address:
            self._refuse(ApiError(TOO_MANY_CONNECTIONS, "your address holds too many connections. Close some."))
            return
        self.limits.held[self._address] += 1
        self._is_counted = True
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_headers()
        if self._is_counted:
            self._is_counted = False
            self.limits.held[self._address] -= 1
            if not self.limits.held[self._address]:
                del self.limits.held[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        most = self.limits.max_header_bytes
        if self._header_bytes is not None and self._header_bytes > most:
            self._refuse(ApiError(HEADERS_TOO_LARGE, f"the headers have more than {most} bytes."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT_KEY] = self.transport.abort  # type: ignore[literal-required]
        self._is_silent = False
        if self._timer is None:  # not a connection's first request
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._end_headers()
        scope = self.scope
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is scope:  # not of one that is upgraded or refused
            scope[CHANNEL_KEY] = ChunkedChannel(self.cycle)  # type: ignore[literal-required]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_rest(0)

    def _watch_rest(self, before: int) -> None:
        """Cut a reader that takes nothing of what is still to be sent: closing would wait for it without end."""
        left = self.transport.get_write_buffer_size()
        if left and left == before:
            self.transport.abort()
        elif left:
            self.loop.call_later(self.limits.stall_timeout_s, self._watch_rest, left)

    def _await_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(self.limits.headers_timeout_s, self._on_timeout)

    def _end_headers(self) -> None:
        self._header_bytes = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self.flow.read_paused:  # another request goes first: this one's headers are waiting here
            self._timer = self.loop.call_later(self.limits.headers_timeout_s, self._on_timeout)
        elif self._is_silent:
            self.transport.abort()
        else:
            message = f"the headers didn't arrive in {self.limits.headers_timeout_s:g} seconds."
            self._refuse(ApiError(HEADERS_TIMEOUT, message))

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request, and close."""
        self._end_headers()
        body = orjson.dumps(error.body())
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | error.headers()).items()]
        self.transport.write(b"".join([STATUS_LINE[error.status.number], *lines, b"\r\n", body]))
        self.transport.close()


def protocol_with(network: NetworkSettings, stall_timeout_s: float) -> type[Protocol]:
    """The protocol of one server, whose connections share their limits."""
    return type("LimitedProtocol", (Protocol,), {"limits": ConnectionLimits(network, stall_timeout_s)})
