"""The engine in a thread of its own, for asyncio: a stream of what is new for each request."""

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.stats import EngineStats
from loraplex.models.multi_lora import MultiLoraModel

_LOADING_PAUSE_S = 0.001  # while all requests wait for their adapters


@dataclass(frozen=True)
class _Listener:
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Delta | RequestResult]"


class AsyncEngine:
    """`stream` yields what each step adds to a request; leaving the loop, or cancelling its task, cancels the request.

    Any number of event loops may use one engine. Adapters are loaded, replaced and unloaded through `model` meanwhile.
    """

    def __init__(self, model: MultiLoraModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self._engine = Engine(model, config)
        self._listeners: dict[str, _Listener] = {}
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="loraplex-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all requests, end the thread and give the model back as it was."""
        self._is_closed = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    async def stream(self, request: Request) -> AsyncGenerator[Delta, None]:
        """What each step adds, until every answer of the request has a finish_reason.

        Raises RequestError, LinkSyntaxError, AdapterNotFoundError or CapacityError at the first step of the loop. A
        request that fails later ends with finish_reason "error".
        """
        async for event in self._events(request):
            if isinstance(event, Delta):
                yield event

    async def generate(self, request: Request) -> RequestResult:
        """Run one request to its end; raises what `stream` raises."""
        async for event in self._events(request):
            if isinstance(event, RequestResult):
                return event
        raise AssertionError("a request ended without a result")

    async def _events(self, request: Request) -> AsyncGenerator[Delta | RequestResult, None]:
        """What is new, and at last the result."""
        request_id = f"stream-{next(self._numbers)}"
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())
        self._listeners[request_id] = listener
        is_finished = False
        try:
            await asyncio.to_thread(self._engine.add_request, request, request_id)  # reading a prompt takes a while
            self._wake.set()
            while not is_finished:
                event = await listener.queue.get()
                is_finished = isinstance(event, RequestResult)
                yield event
        finally:
            self._listeners.pop(request_id, None)
            if not is_finished:
                self._engine.cancel(request_id)
                self._wake.set()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # The engine's thread

    def _run(self) -> None:
        while not self._is_closed:
            if not self._engine.has_work:
                self._wake.wait()
                self._wake.clear()
                continue
            deltas = self._engine.step()
            self._tell(deltas)
            if not deltas and not self._engine.stats().num_running:
                self._wake.wait(_LOADING_PAUSE_S)
        self._tell(self._engine.close())

    def _tell(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._put(delta.request_id, delta)
            if delta.finish_reason is not None:
                result = self._engine.pop_result(delta.request_id)
                if result is not None:
                    self._put(delta.request_id, result)

    def _put(self, request_id: str, event: Delta | RequestResult) -> None:
        listener = self._listeners.get(request_id)
        if listener is not None and not listener.loop.is_closed():
            listener.loop.call_soon_threadsafe(listener.queue.put_nowait, event)
