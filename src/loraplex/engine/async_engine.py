"""The engine in a thread of its own, for asyncio: a stream of what is new for each request."""

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor

from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.faults import FaultLog
from loraplex.engine.frontend.output_processor import Event, OutputCollector, deliver, fail
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.stats import EngineStats
from loraplex.errors import EngineError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.threads import compute_alone, give_back_workers

logger = logging.getLogger(__name__)

_INPUT_THREADS = 4  # that read prompts and compile grammars
EXIT_STATUS = 70  # of the process, with EngineConfig(on_fault="exit")
_LOADING_PAUSE_S = 0.001  # while all requests wait for their adapters
_LAST_WORDS_S = 1.0  # for errors to reach their readers before the process ends


class AsyncEngine:
    """`stream` yields what each step adds to a request; leaving the loop, or cancelling its task, cancels the request.

    Any number of event loops may use one engine. Adapters are loaded, replaced and unloaded through `model` meanwhile.
    """

    def __init__(self, model: MultiLoraModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self._collectors: dict[str, OutputCollector] = {}
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._is_closed = False
        self._input_threads = ThreadPoolExecutor(
            _INPUT_THREADS, thread_name_prefix="loraplex-input", initializer=compute_alone
        )
        # The engine is made in its thread: workers of another one would slow its steps (threads.py).
        give_back_workers()
        made: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(config, made), name="loraplex-engine", daemon=True)
        self._thread.start()
        self._engine = made.result()

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

        Raises RequestError, LinkSyntaxError, AdapterNotFoundError, CapacityError or EngineStoppedError at the first
        step of the loop. A request that fails later ends with finish_reason "error"; where not even that can be told,
        with an EngineError.
        """
        collector = self.collector()
        request_id = await self.submit(request, collector)
        try:
            while True:
                for event in await collector.take():
                    if isinstance(event, RequestResult):
                        return
                    yield event
        finally:
            self.drop(request_id)

    async def generate(self, request: Request) -> RequestResult:
        """Run one request to its end; raises what `stream` raises."""
        collector = self.collector(wants_deltas=False)
        request_id = await self.submit(request, collector)
        try:
            while True:
                for event in await collector.take():
                    if isinstance(event, RequestResult):
                        return event
        finally:
            self.drop(request_id)

    # Several requests with one reader

    def collector(self, *, wants_deltas: bool = True) -> OutputCollector:
        """For `submit`: gets the deltas, if wanted, and the results of the requests that are given to it."""
        return OutputCollector(asyncio.get_running_loop(), wants_deltas=wants_deltas)

    async def submit(self, request: Request, collector: OutputCollector) -> str:
        """Take a request, or raise what `stream` raises; returns its id. End with `drop`."""
        request_id = f"stream-{next(self._numbers)}"
        self._collectors[request_id] = collector
        adding = self._input_threads.submit(
            self._engine.take_request, request, request_id
        )  # reading a prompt takes a while
        try:
            collector.prompts[request_id] = await asyncio.shield(asyncio.wrap_future(adding))
        except asyncio.CancelledError:
            self._collectors.pop(request_id, None)
            if not adding.cancel():  # it has begun
                adding.add_done_callback(lambda done: self._forget(request_id, done))
            raise
        except BaseException:
            self._collectors.pop(request_id, None)
            raise
        if request_id not in self._collectors:  # a fault came in between: its reader is told by the feed
            self._engine.cancel(request_id)
        self._wake.set()
        return request_id

    def drop(self, request_id: str) -> None:
        """Hear no more of a request; cancels it if it isn't finished."""
        if self._collectors.pop(request_id, None) is not None:
            self._engine.cancel(request_id)
            self._wake.set()

    def _forget(self, request_id: str, added: "Future[tuple[int, ...]]") -> None:
        """Cancel a request whose reader left while it was being taken."""
        if not added.cancelled() and added.exception() is None:
            self._engine.cancel(request_id)
            self._wake.set()

    @property
    def is_running(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self._thread.is_alive() and not self._is_closed and not self._engine.faults.has_stopped

    @property
    def is_restarting(self) -> bool:
        """Whether a fault has ended all requests, and those that come wait for a new core."""
        return self.is_running and not self._engine.is_up

    @property
    def faults(self) -> FaultLog:
        """The faults that ended all requests, and whether the engine has stopped for good."""
        return self._engine.faults

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer can have together."""
        return self._engine.max_length

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # The engine's thread

    def _run(self, config: EngineConfig | None, made: "Future[Engine]") -> None:
        try:
            self._engine = Engine(self.model, config)
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(self._engine)
        while not self._is_closed:
            try:
                self._turn()
            except Exception as error:
                self._fail(error)
        try:
            self._tell(self._engine.close())
        except Exception as error:
            self._fail(error)

    def _turn(self) -> None:
        """A step, or a wait for something to do."""
        if self._engine.faults.has_stopped:
            self._stop()
            return
        self._engine.restart()  # if there was a fault: before the next request comes
        if not self._engine.has_work:
            self._wake.wait()
            self._wake.clear()
            return
        deltas = self._engine.step()
        self._tell(deltas)
        if not deltas and not self._engine.stats().num_running:
            self._wake.wait(_LOADING_PAUSE_S)

    def _tell(self, deltas: list[Delta]) -> None:
        """Hand out deltas, and behind them the results of the requests that ended."""
        news: dict[OutputCollector, list[Event]] = {}
        for delta in deltas:
            collector = self._collectors.get(delta.request_id)
            if collector is not None and collector.wants_deltas:
                news.setdefault(collector, []).append(delta)
        ended = dict.fromkeys(delta.request_id for delta in deltas if delta.finish_reason is not None)
        results = [result for request_id in ended if (result := self._engine.pop_result(request_id)) is not None]
        for result in results:
            collector = self._collectors.get(result.request_id)
            if collector is not None:
                news.setdefault(collector, []).append(result)
        deliver(news)
        for result in results:
            self._collectors.pop(result.request_id, None)

    # Its faults

    def _fail(self, error: Exception) -> None:
        """What the engine didn't end by itself: nobody is left waiting for it."""
        try:
            self._engine.fail(error)
        except Exception as another:  # of the remedy
            logger.critical("the engine can't be trusted any more", exc_info=another)
            self._engine.faults.add(another, for_good=True)
        for request_id, collector in list(self._collectors.items()):
            fail([collector], EngineError(f"the engine failed: {type(error).__name__}: {error}. Ask again."))
            self._collectors.pop(request_id, None)
            self._engine.pop_result(request_id)
            self._engine.cancel(request_id)  # if it came after the engine had ended what it knew

    def _stop(self) -> None:
        """The engine takes no more requests: wait to be closed, or end the process if that is wanted."""
        if self._engine.config.on_fault == "exit":
            time.sleep(_LAST_WORDS_S)
            logger.critical("the process ends with status %d (on_fault is 'exit')", EXIT_STATUS)
            os._exit(EXIT_STATUS)
        while not self._is_closed:
            self._wake.wait()
            self._wake.clear()
