"""One replica: an engine and the whole application, called through Ray instead of a socket."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.types import Message

from loraplex.engine.async_engine import AsyncEngine
from loraplex.models.adapter_watcher import AdapterWatcher
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.server.api.streaming import ABORT_KEY
from loraplex.server.app import create_app
from loraplex.server.logs import set_up_logs
from loraplex.server.replicas.loopback import bind_replica_to_loopback
from loraplex.server.replicas.router import HELD
from loraplex.server.settings import ServeConfig
from loraplex.server.state import ServerState
from loraplex.server.tracing import tracing_from_environment
from loraplex.threads import compute_alone

HELD_HEADER, REPLICA_HEADER = b"x-adapters-held", b"x-replica"


class EngineReplica:
    """Ray Serve makes `num_replicas` of these, each in a process of its own."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ServeConfig, load: Callable[[ServeConfig], MultiLoraModel], on_loopback: bool
    ) -> None:
        if on_loopback:
            bind_replica_to_loopback()
        set_up_logs(config.logs.log_level)
        compute_alone()  # the event loop's thread, for as long as the process lives
        with ThreadPoolExecutor(1) as loader:  # as lifecycle.run does
            model = await asyncio.get_running_loop().run_in_executor(loader, load, config)
        watched = AdapterWatcher(model, config.model.watch) if config.model.watch else None
        if watched is not None:
            await asyncio.to_thread(watched.start)
        self._id = secrets.token_hex(4)
        self._engine = await AsyncEngine(model, config.engine).__aenter__()
        self._state = ServerState(self._engine, config, watched)
        self._state.tracing = tracing_from_environment()
        await asyncio.to_thread(self._state.prepare)
        self._app = create_app(self._state, is_first=False)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Ray Serve asks now and then, and gives to the router."""
        return {HELD: sorted(self._held())}

    def check_health(self) -> None:
        """What Ray Serve asks now and then: a replica whose engine has stopped is made anew."""
        if not self._engine.is_running:
            raise self._engine.faults.refusal()

    async def metrics(self) -> tuple[str, str]:
        """The id that `x-replica` tells, and Prometheus' text."""
        return self._id, self._state.metrics.text().decode()

    async def serve(self, scope: dict[str, Any], body: bytes, names: list[str]) -> AsyncIterator[list[Message]]:
        """Run one request; yields what the application sends, together what came together."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left, parts = asyncio.Event(), [body]

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**scope, ABORT_KEY: left.set}, receive, messages.put)
            finally:
                messages.put_nowait(None)

        own_headers = self._headers(names)
        running = asyncio.create_task(run())
        try:
            async for batch in _batches(messages):
                for message in batch:
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], *own_headers]
                yield batch
            await running
        finally:  # also where the client left, which closes this generator
            left.set()

    def _held(self) -> set[str]:
        return {state.name for state in self._engine.model.adapters() if state.tier != "disk"}

    def _headers(self, names: list[str]) -> list[tuple[bytes, bytes]]:
        headers = [(REPLICA_HEADER, self._id.encode())]
        return [*headers, (HELD_HEADER, b"yes" if self._held() >= set(names) else b"no")] if names else headers


async def _batches(messages: "asyncio.Queue[Message | None]") -> AsyncIterator[list[Message]]:
    """All that is there, until None."""
    while True:
        batch = [await messages.get()]
        while not messages.empty():
            batch.append(messages.get_nowait())
        found = [message for message in batch if message is not None]
        if found:
            yield found
        if len(found) < len(batch):
            return
