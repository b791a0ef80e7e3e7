"""What stands before every request: ids, keys, limits, the body's size and time, logs, and an answer in any case."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.errors import ConfigError
from loraplex.server.api.api_errors import (
    BODY_TIMEOUT,
    BODY_TOO_LARGE,
    INTERNAL,
    OVERLOADED,
    SHUTTING_DOWN,
    UNAUTHORIZED,
    ApiError,
)
from loraplex.server.auth.access import OriginCheck, Principal
from loraplex.server.auth.keys import KeyFile, KeyRecord
from loraplex.server.auth.rate_limit import Cost
from loraplex.server.state import SCOPE_KEY, RequestContext, ServerState

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/", "/health", "/ping", "/version", "/docs", "/openapi.json", "/favicon.ico", "/api/v1/healthz")
_OPEN_FOLDER = "/page/"  # the page's own files
_GENERATING = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/score"),
    *("/generate", "/generate_stream", "/", "/api/v1/asample", "/api/v1/forward_backward"),
)
_TINKER = "/api/v1/"
# Of the Tinker API, what is asked again and again and changes nothing.
_ASKING = tuple(
    _TINKER + call
    for call in (
        *("retrieve_future", "cancel_future", "session_heartbeat", "telemetry", "get_info", "weights_info"),
        *("client/config", "client/dynamic_config"),
    )
)
_WHILE_DRAINING = ("/health", "/ping", "/metrics")


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, state: ServerState, *, is_first: bool = True) -> None:
        self._app = app
        self._state = state
        # Without keys; behind another gate the check is done.
        self._origins = OriginCheck(state.config.network) if is_first and state.keys is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        context = RequestContext(id=_request_id(headers), address=_address(scope), path=scope["path"])
        scope[SCOPE_KEY] = context
        if self._state.tracing is not None:
            context.span = self._state.tracing.begin(scope["method"], scope["path"], headers)
        answer = _Answer(send, context.id)
        started = time.perf_counter()
        self._state.num_active += 1
        try:
            await self._serve(scope, headers, receive, answer, context)
        except ApiError as error:
            context.note(error)
            await answer.refuse(error, scope["path"] if scope["method"] == "POST" else "")
        except Exception:
            logger.exception("request failed", extra={"request_id": context.id, "path": scope["path"]})
            await answer.refuse(ApiError(INTERNAL, f"internal error; the log has it under {context.id}."))
        finally:
            self._state.num_active -= 1
            if context.usage is not None:
                context.usage.leave(context.cost)
            self._tell(scope, context, answer, time.perf_counter() - started)

    async def _serve(
        self,
        scope: Scope,
        headers: MutableMapping[bytes, bytes],
        receive: Receive,
        answer: "_Answer",
        context: RequestContext,
    ) -> None:
        state, path = self._state, scope["path"]
        if self._origins is not None:
            self._origins.check(scope["method"], scope["headers"])
        context.cost = _cost(scope["method"], path)
        if state.is_draining and path not in _WHILE_DRAINING:
            raise ApiError(SHUTTING_DOWN, "the server is shutting down. Try another one, or try again.")
        if state.num_active > state.config.network.max_connections:
            raise ApiError(OVERLOADED, "too many requests are running (max_connections). Try again.")
        if not _is_open(scope["method"], path) and path != "/metrics":
            await self._authenticate(headers, context)
        elif path == "/metrics" and not state.config.access.open_metrics:
            await self._authenticate(headers, context)
            context.principal.check_manage()
        body = await self._body(headers, receive)
        if body is None:
            context.log["ended"] = "disconnected"
            return
        answer.body_is_read = True
        await self._app(scope, _Replay(body, receive), answer)

    async def _authenticate(self, headers: MutableMapping[bytes, bytes], context: RequestContext) -> None:
        keys = self._state.keys
        if keys is None:
            return
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        key = key.strip()
        if not key and context.path.startswith(_TINKER):
            scheme, key = "bearer", headers.get(b"x-api-key", b"").decode("latin-1").strip()
        try:
            record = (
                await self._find(keys, key, context) if scheme.lower() == "bearer" and 0 < len(key) <= 256 else None
            )
        except ConfigError as error:
            logger.error("%s", error)
            raise ApiError(OVERLOADED, "API keys can't be checked at the moment.") from None
        if record is None:
            raise ApiError(UNAUTHORIZED, "a valid API key is needed: send it as Authorization: Bearer KEY.")
        context.principal = Principal(record)
        usage = self._state.usages.of(record)
        usage.enter(context.cost)
        context.usage = usage

    async def _find(self, keys: KeyFile, key: str, context: RequestContext) -> KeyRecord | None:
        """A key that is seen for the first time, or is wrong, costs milliseconds: in a thread, and not too often."""
        record = keys.known(key)
        if record is None:
            self._state.attempts.begin(context.address)
            record = await self._state.checkers.run(context.address, partial(keys.check, key))
            if record is not None:
                self._state.attempts.succeeded(context.address)
        return record

    async def _body(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or None if the client left; refuses what is too large or too slow."""
        limits = self._state.config.limits
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.max_body_bytes:
                        raise _too_large(limits.max_body_bytes)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(BODY_TIMEOUT, f"the body didn't arrive in {limits.body_timeout_s:g} seconds.") from None

    def _tell(self, scope: Scope, context: RequestContext, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._state.metrics.count_request(route, answer.status)
        if self._state.tracing is not None and context.span is not None:
            self._state.tracing.end(context.span, scope["method"], route, answer.status, context.log)
        if self._state.config.logs.log_requests:
            fields = {
                "request_id": context.id,
                "key": context.principal.id,
                "method": scope["method"],
                "path": scope["path"],
                "status": answer.status,
                "ms": round(1000 * seconds, 1),
            }
            logger.info("request", extra=fields | context.log)


class _Replay:
    """`receive` for the application: the body that was read, then whatever the server tells."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Answer:
    """`send` for the application: adds the request id, and knows what was sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = request_id.encode()
        self.status = 0  # 0: nothing was sent
        self.body_is_read = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id)]
        await self._send(message)

    async def refuse(self, error: ApiError, path: str = "") -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        number, told = error.told(path)
        body = orjson.dumps(told)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
        if not self.body_is_read:
            headers["connection"] = "close"  # what is left of the body is not read
        raw: list[tuple[bytes, bytes]] = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": number, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def _request_id(headers: MutableMapping[bytes, bytes]) -> str:
    """The client's, if it is harmless, so that its logs and these can be joined."""
    given: Any = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _cost(method: str, path: str) -> Cost:
    if method in ("GET", "HEAD", "OPTIONS") or path in _ASKING:
        return Cost.READING
    return Cost.GENERATING if path in _GENERATING else Cost.CHANGING


def _is_open(method: str, path: str) -> bool:
    """Whether it needs no key: what shows nothing that is behind one, and only to be read."""
    is_known = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
    return is_known and method in ("GET", "HEAD", "OPTIONS")


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _too_large(most: int) -> ApiError:
    return ApiError(BODY_TOO_LARGE, f"the body has more than {most} bytes (max_body_bytes).")
