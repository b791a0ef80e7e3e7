"""The one address in front of all replicas: picks, forwards, and tries again where a replica died unheard."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Receive, Scope, Send

from loraplex.server.api.api_errors import OVERLOADED, SHUTTING_DOWN, ApiError, Status
from loraplex.server.api.json_route import check_num_values
from loraplex.server.api.streaming import DONE, sse
from loraplex.server.api.tgi.bodies import model_of
from loraplex.server.auth.keys import KeyFile
from loraplex.server.auth.rate_limit import Attempts, Usages
from loraplex.server.replicas.affinity import adapter_key
from loraplex.server.replicas.replica_metrics import Together
from loraplex.server.settings import ServeConfig
from loraplex.server.state import NUM_CHECKERS, ClientLeft, Workers, until_client_leaves

logger = logging.getLogger(__name__)

REPLICA_DIED = Status(503, "server_error", "replica_died")
NOT_WITH_REPLICAS = Status(501, "invalid_request_error", "not_with_replicas")
_ATTEMPTS = 3
_METRICS_TIMEOUT_S = 5.0
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


class FrontMetrics:
    """What the front counts by itself."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("loraplex_front_requests", "Requests to the front", ["status"], registry=registry)
        self._replicas = Gauge("loraplex_replicas", "Replicas that told their metrics", registry=registry)
        self.retries = Counter("loraplex_replica_retries", "Requests sent to another replica", registry=registry)
        self.losses = Counter("loraplex_replica_losses", "Requests that a dying replica took along", registry=registry)

    def text(self, replicas: Mapping[str, str]) -> bytes:
        """With the replicas' own texts, by their ids."""
        self._replicas.set(len(replicas))
        return Together(self._registry, replicas).text()

    def count_request(self, route: str, status: int) -> None:
        self._requests.labels(str(status)).inc()


class Forwards:
    """Requests on their way through the front; stands where a server's engine does when it shuts down."""

    def __init__(self) -> None:
        self.is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Any) -> None:
        """Raises ApiError if `close` came before the work's end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        try:
            await task
        except asyncio.CancelledError:
            task.cancel()
            if self.is_closed:
                raise ApiError(SHUTTING_DOWN, "the server is shutting down. Try again.") from None
            raise
        finally:
            self._tasks.discard(task)

    async def close(self) -> None:
        self.is_closed = True
        for task in self._tasks:
            task.cancel()


class FrontState:
    """The part of a ServerState that the gate and the lifecycle use."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.engine = Forwards()
        self.keys = KeyFile(config.access.keys_file) if config.access.keys_file else None
        self.usages = Usages()
        self.attempts = Attempts(config.access.max_wrong_keys_per_minute)
        self.checkers = Workers(NUM_CHECKERS, "loraplex-keys")
        self.metrics = FrontMetrics()
        self.num_active = 0
        self.is_draining = False
        self.tracing = None  # the replicas tell

    def loaded_names(self) -> list[str]:
        """What each replica loads."""
        return sorted({**self.config.model.adapters, **self.config.model.mixtures})


class Front:
    """ASGI application that forwards every request to a replica."""

    def __init__(self, handle: DeploymentHandle, state: FrontState) -> None:
        self._handle = handle
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics":
            text = await asyncio.to_thread(self._state.metrics.text, await self._replica_metrics())
            await _answer(send, text, CONTENT_TYPE_LATEST)
            return
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _changes_adapters(scope["path"]):
            message = "several replicas don't change adapters over HTTP. Put folders into the one that `watch` names."
            raise ApiError(NOT_WITH_REPLICAS, message)
        body = (await receive())["body"]  # the gate has read all of it
        check_num_values(body, self._state.config.limits.max_body_values)  # before it is parsed here
        answer = _Forwarded(send)
        try:
            work = self._state.engine.run(self._forward(scope, body, answer))
            await until_client_leaves(receive, work)
        except ClientLeft:
            scope["loraplex"].log["ended"] = "disconnected"
        except ApiError as error:
            await answer.end_with(error)

    async def _replica_metrics(self) -> dict[str, str]:
        """Of those that answer in time: the gauge loraplex_replicas counts them, the log tells why others didn't."""
        asked = self._handle.broadcast("metrics")
        try:
            answers = await asked.results_async(timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True)
        except TimeoutError as error:
            answers = [error]
        for answer in answers:
            if isinstance(answer, BaseException):
                logger.warning("a replica told no metrics", extra={"error": repr(answer)})
        return dict(answer for answer in answers if not isinstance(answer, BaseException))

    async def _forward(self, scope: Scope, body: bytes, answer: "_Forwarded") -> None:
        """Until an answer is through; a replica that died before it said anything is replaced by another one."""
        key = adapter_key(_model_of(body), self._state.config.model.base_name)
        handle = self._handle.options(stream=True, multiplexed_model_id=key)
        plain = {name: scope[name] for name in _SCOPE if name in scope} | {"asgi": {"version": "3.0"}}
        for attempt in range(_ATTEMPTS):
            try:
                async for batch in _batches(handle.serve.remote(plain, body, key.split("+") if key else [])):
                    for message in batch:
                        await answer.send(message)
                return
            except BackPressureError as error:
                raise ApiError(OVERLOADED, "all replicas are full. Try again.") from error
            except RayActorError as error:
                logger.warning("a replica died", extra={"attempt": attempt, "begun": answer.has_begun})
                if answer.has_begun:
                    self._state.metrics.losses.inc()
                    raise ApiError(REPLICA_DIED, "the replica died. Try again.", retry_after_s=1) from error
                self._state.metrics.retries.inc()
        self._state.metrics.losses.inc()
        raise ApiError(REPLICA_DIED, f"{_ATTEMPTS} replicas died in a row. Try again.", retry_after_s=1)


class _Forwarded:
    """An answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        self._is_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # The gate adds the id, which the replica got from the request's own header or made up.
            headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
            message = {**message, "headers": headers}
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in headers)
        self.has_begun = True
        await self._send(message)

    async def end_with(self, error: ApiError) -> None:
        """Tell the error: as an answer, or as the last event of a stream."""
        if not self.has_begun:
            raise error
        if not self._is_stream:
            raise ConnectionResetError("an answer broke off")  # the server cuts the connection
        await self._send({"type": "http.response.body", "body": sse(error.body()) + DONE, "more_body": False})


async def _batches(response: Any) -> AsyncIterator[list[Message]]:
    """What a replica yields; it is told where nobody wants more."""
    is_done = False
    try:
        async for batch in response:
            yield batch
        is_done = True
    finally:
        if not is_done:
            response.cancel()


def _model_of(body: bytes) -> object:
    try:
        content = orjson.loads(body) if body else None
    except orjson.JSONDecodeError:  # any replica can tell the client
        return None
    if not isinstance(content, dict):
        return None
    return model_of(content["parameters"]) if "parameters" in content else content.get("model")


def _changes_adapters(path: str) -> bool:
    changing = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    return path.rstrip("/") in changing or path.startswith("/v1/adapters/")


async def _answer(send: Send, body: bytes, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
