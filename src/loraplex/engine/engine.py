"""The engine: requests come at any time, share forward passes, and get their tokens as they are made."""

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from loraplex.engine.answers import Answers
from loraplex.engine.config import EngineConfig
from loraplex.engine.heap import freeze_heap
from loraplex.engine.intake import Intake
from loraplex.engine.leases import Leases
from loraplex.engine.packing import Part
from loraplex.engine.progress import progress_bar
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.request_book import RequestBook
from loraplex.engine.runner import ModelRunner
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.stats import EngineStats, StepCounts
from loraplex.errors import EngineError, LoraplexError, RequestError
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
        self._thaw_heap = freeze_heap(self)
        self.model = model
        self.config = config or EngineConfig()
        self._counts = StepCounts()
        self._runner = ModelRunner(model, self.config)
        self._intake = Intake(model, self._runner)
        self._leases = Leases(model)
        self._scheduler = Scheduler(self._runner.config, self._runner.pool, self._runner.table, self._leases.bring)
        most = self.config.max_waiting + self.config.max_running
        self._book = RequestBook(self._scheduler, self._leases, most)
        self._answers = Answers(self._intake, self._book, self._counts)
        self._numbers = itertools.count()
        self._step_lock = threading.Lock()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> list[Delta]:
        """Cancel what runs and give the model back as it was."""
        with self._step_lock:
            if self._book.is_closed:
                return []
            deltas = self._book.close()
            self._runner.close()
            self._thaw_heap()
            return deltas

    # Requests

    def generate(self, requests: Sequence[Request], *, progress: bool = False) -> list[RequestResult]:
        """Run requests to their end; the results are in their order.

        A request that can't be served as written raises before anything runs: RequestError, LinkSyntaxError,
        AdapterNotFoundError or CapacityError. One that fails later has finish_reason "error" and its error.
        """
        states = [self._intake.prepare(request, self._new_id()) for request in requests]
        self._book.enqueue(states)
        with progress_bar(len(requests), show=progress) as bar:
            while not all(self._book.is_finished(state.request_id) for state in states):
                deltas = self.step()
                for delta in deltas:
                    bar.update(len(delta.token_ids), self._book.is_finished(delta.request_id))
                if not deltas and not self._scheduler.running:
                    time.sleep(_LOADING_PAUSE_S)
        results = [self._book.pop_result(state.request_id) for state in states]
        return [result for result in results if result is not None]

    def add_request(self, request: Request, request_id: str | None = None) -> str:
        """Take a request; returns its id. Raises what `generate` raises; then nothing has changed."""
        if request_id is not None and self._book.knows(request_id):
            raise RequestError(f"the request id {request_id!r} is in use. Choose another one, or none.")
        state = self._intake.prepare(request, request_id or self._new_id())
        self._book.enqueue([state])
        return state.request_id

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; unknown and finished ones are ignored."""
        self._book.cancel(request_id)

    def pop_result(self, request_id: str) -> RequestResult | None:
        """The result of a finished request, once; None while it isn't finished."""
        return self._book.pop_result(request_id)

    @property
    def max_length(self) -> int:
        """Tokens that prompt and answer can have together."""
        return self._runner.max_length

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def has_work(self) -> bool:
        return self._book.has_work

    # Steps

    def step(self) -> list[Delta]:
        """Run one forward pass, if anything can run; returns what it added to the requests."""
        with self._step_lock:
            deltas = self._book.take_in()
            parts = self._scheduler.plan()
            failures, self._leases.failures = self._leases.failures, []
            deltas += [self._book.end(generation, "error", error) for generation, error in failures]
            return deltas + (self._run(parts) if parts else [])

    def _run(self, parts: list[Part]) -> list[Delta]:
        try:
            results = self._runner.run(parts)
        except Exception as error:
            return self._run_apart(parts, error)
        self._counts.add(parts)
        deltas = self._answers.take(results)
        if not self._scheduler.running:
            self._runner.attention.forget_rows()
        return deltas

    def _run_apart(self, parts: list[Part], error: Exception) -> list[Delta]:
        """A pass failed: run its generations one by one, so that only those fail which can't run."""
        logger.warning("a pass of %d parts failed: %s: %s", len(parts), type(error).__name__, error)
        generations = list(dict.fromkeys(part.generation for part in parts))
        if len(generations) == 1:
            told = error if isinstance(error, LoraplexError) else _failed_pass(error)
            return [self._book.end(generations[0], "error", told)]
        deltas = []
        for generation in generations:
            deltas += self._run([part for part in parts if part.generation is generation])
        return deltas

    # What it holds

    def stats(self) -> EngineStats:
        """What is held and what was done."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_blocks=self._runner.pool.num_blocks,
            num_blocks_held=self._runner.pool.num_held,
            num_tracks=self._runner.table.num_rows_held,
            num_preempted=self._scheduler.num_preempted,
            counts=self._counts.copy(),
        )

    def clear_prefix_cache(self) -> None:
        """Forget the keys and values of finished requests."""
        with self._step_lock:
            self._runner.pool.forget_all_idle()
            if self._runner.pool.num_held == 0:
                self._runner.attention.responses.clear()

    def _new_id(self) -> str:
        return f"request-{next(self._numbers)}"


def _failed_pass(error: Exception) -> EngineError:
    told = EngineError(
        f"the forward pass failed: {type(error).__name__}: {error}. Only this request was ended; ask again, with fewer "
        "tokens if memory is what it lacked."
    )
    told.__cause__ = error
    return told
