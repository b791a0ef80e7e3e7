"""The engine: requests come at any time, share forward passes, and get their tokens as they are made."""

import gc
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.faults import FaultLog, interrupted
from loraplex.engine.frontend.input_processor import InputProcessor
from loraplex.engine.progress import Bar, progress_bar
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.sched.request_tracker import RequestTracker
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.engine.sched.sequence import RequestState
from loraplex.engine.stats import EngineStats, StepCounts
from loraplex.engine.worker.model_runner import ModelRunner
from loraplex.errors import RequestError
from loraplex.models.multi_lora import MultiLoraModel

logger = logging.getLogger(__name__)

_LOADING_PAUSE_S = 0.001  # while all requests wait for their adapters


class Engine:
    """Continuous batching for requests that each have their own adapters, links or mixtures.

    `generate` runs requests to their end. To drive it yourself, call `add_request` and `cancel` at any time from any
    thread and `step` from one; `pop_result` has what is finished.
    """

    def __init__(self, model: MultiLoraModel, config: EngineConfig | None = None) -> None:
        """Raises BaseModelError for a base model that packed passes can't run, and ConfigError."""
        self.model = model
        self.config = config or EngineConfig()
        self.faults = FaultLog(self.config)
        self._is_closed = False
        self._counts = StepCounts()
        self._num_preempted = 0  # by cores that faults took down
        self._numbers = itertools.count()
        self._step_lock = threading.Lock()
        self._tracker = RequestTracker(self.config.max_waiting + self.config.max_running)
        self._core: EngineCore | None = EngineCore(model, self.config)
        self._capacity = self._core.capacity
        self._input_processor = InputProcessor(model, self._capacity, self.config)
        self._core.join(self._tracker, self._input_processor, self._counts)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> list[Delta]:
        """Cancel what runs and give the model back as it was."""
        with self._step_lock:
            if self._is_closed:
                return []
            self._is_closed = True
            self._tracker.refuse(_closed)
            try:
                return self._tracker.close()
            except Exception as error:
                logger.exception("the engine could not be closed in order")
                return self._tracker.fail_all(interrupted(error))
            finally:
                self._take_down()

    # Requests

    def generate(self, requests: Sequence[Request], *, progress: bool = False) -> list[RequestResult]:
        """Run requests to their end; the results are in their order.

        A request that can't be served as written raises before anything runs: RequestError, LinkSyntaxError,
        AdapterNotFoundError or CapacityError. One that fails later has finish_reason "error" and its error.
        """
        states = [self._input_processor.prepare(request, self._new_id()) for request in requests]
        self._tracker.enqueue(states)
        try:
            with progress_bar(len(requests), show=progress) as bar:
                self._finish(states, bar)
        except BaseException:  # somebody interrupted it
            self._withdraw(states)
            raise
        results = [self._tracker.pop_result(state.request_id) for state in states]
        return [result for result in results if result is not None]

    def _withdraw(self, states: Sequence[RequestState]) -> None:
        with self._step_lock:
            try:
                self._tracker.withdraw(states)
            except Exception as error:
                self._fault(error)
                self._tracker.withdraw(states)

    def _finish(self, states: Sequence[RequestState], bar: Bar) -> None:
        """Step until these requests have ended."""
        open_ids = {state.request_id for state in states}
        while open_ids:
            deltas = self.step()
            for delta in deltas:
                has_ended = delta.request_id in open_ids and self._tracker.is_finished(delta.request_id)
                bar.update(len(delta.token_ids), has_ended)
                if has_ended:
                    open_ids.remove(delta.request_id)
            if not deltas:
                open_ids = {request_id for request_id in open_ids if not self._tracker.is_finished(request_id)}
                if self.stats().num_running == 0:
                    time.sleep(_LOADING_PAUSE_S)

    def add_request(self, request: Request, request_id: str | None = None) -> str:
        """Take a request; returns its id. Raises what `generate` raises; then nothing has changed."""
        request_id = self._new_id() if request_id is None else request_id
        self.take_request(request, request_id)
        return request_id

    def take_request(self, request: Request, request_id: str) -> tuple[int, ...]:
        """As `add_request`; returns the tokens of its prompt, with those that its images are."""
        state = self._input_processor.prepare(request, request_id)
        self._tracker.enqueue([state])
        return state.prompt

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; unknown and finished ones are ignored."""
        self._tracker.cancel(request_id)

    def pop_result(self, request_id: str) -> RequestResult | None:
        """The result of a finished request, once; None while it isn't finished."""
        return self._tracker.pop_result(request_id)

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer can have together."""
        return self._capacity.max_length

    @property
    def vocab_size(self) -> int:
        return self._input_processor.vocab_size

    @property
    def is_up(self) -> bool:
        """Whether steps can run: not once it is closed or stopped, nor between a fault and the restart."""
        return self._core is not None

    @property
    def has_work(self) -> bool:
        return self._tracker.has_work

    # Steps

    def step(self) -> list[Delta]:
        """Run one forward pass, if anything can run; returns what it added to the requests.

        A fault in between ends all requests with an EngineError, and the next step starts with a new core; after
        `EngineConfig.max_restarts` of them the engine takes no more requests (EngineStoppedError).
        """
        with self._step_lock:
            try:
                self._restart()
                deltas = [] if self._core is None else self._core.step()
                self._tracker.told()
                return deltas
            except Exception as error:
                return self._fault(error)
            except BaseException as error:  # an interrupt in the middle of something: no fault, but the same remedy
                self._tracker.fail_all(interrupted(error))
                self._take_down()
                raise

    def restart(self) -> None:
        """Make a new core after a fault now, rather than at the next step."""
        with self._step_lock:
            self._restart()

    def fail(self, error: Exception) -> list[Delta]:
        """Take an error outside of `step` for a fault inside: all requests end."""
        with self._step_lock:
            return self._fault(error)

    def stop(self, error: BaseException) -> list[Delta]:
        """The same, and take no more requests."""
        with self._step_lock:
            return self._fault(error, for_good=True)

    # After a fault

    def _fault(self, error: BaseException, *, for_good: bool = False) -> list[Delta]:
        logger.error("the engine failed; all its requests are ended", exc_info=error)
        told = self.faults.add(error, for_good=for_good)
        if self.faults.has_stopped and not self._is_closed:
            self._tracker.refuse(self.faults.refusal)
            logger.critical("%s", self.faults.refusal())
        deltas = self._tracker.fail_all(told)
        self._take_down()
        return deltas

    def _take_down(self) -> None:
        """Give the model back as it was; after a fault that may fail too."""
        core, self._core = self._core, None
        if core is None:
            return
        self._num_preempted += core.scheduler.num_preempted
        try:
            core.close()
        except Exception:
            logger.exception("the engine could not be taken down in order")

    def _restart(self) -> None:
        if self._core is not None or self._is_closed or self.faults.has_stopped:
            return
        gc.collect()  # what is left of the old core would be frozen with the heap
        core = EngineCore(self.model, self.config)
        core.join(self._tracker, self._input_processor, self._counts)
        self._core = core
        logger.warning("the engine has started anew; it has had %d faults", self.faults.count)

    # What it holds

    def stats(self) -> EngineStats:
        """What is held and what was done."""
        counts, core = self._counts.copy(), self._core
        if core is None:  # closed, or between a fault and the restart
            return EngineStats(num_blocks=self._capacity.num_blocks, num_preempted=self._num_preempted, counts=counts)
        pool, scheduler = core.runner.pool, core.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=pool.num_blocks,
            num_blocks_held=pool.num_held,
            num_passes=core.runner.table.num_rows_held,
            num_preempted=self._num_preempted + scheduler.num_preempted,
            counts=counts,
        )

    def clear_prefix_cache(self) -> None:
        """Forget the keys and values of finished requests."""
        with self._step_lock:
            if self._core is not None:
                self._runner.pool.forget_all_idle()
                if self._runner.pool.num_held == 0:
                    self._runner.attention.responses.clear()

    @property
    def _runner(self) -> ModelRunner:
        assert self._core is not None, "the engine is closed, or between a fault and its restart"
        return self._core.runner

    @property
    def _scheduler(self) -> Scheduler:
        assert self._core is not None, "the engine is closed, or between a fault and its restart"
        return self._core.scheduler

    def _new_id(self) -> str:
        return next(name for number in self._numbers if not self._tracker.knows(name := f"request-{number}"))


def _closed() -> RequestError:
    return RequestError("the engine is closed. Make a new one: loraplex.Engine(model).")
