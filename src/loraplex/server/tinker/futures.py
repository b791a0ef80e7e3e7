"""Answers that clients ask for later: those of sampling, and how long a question may wait."""

import asyncio
import time
from dataclasses import dataclass, field

from loraplex.server.api.api_errors import RATE_LIMITED, ApiError

MAX_FUTURES = 8192  # half of them of one key
MAX_KEPT_BYTES = 2**28  # of answers; the oldest go, and are computed again where they are asked for
_KEPT_S = 600.0  # an answer that nobody asks for
_ASKED_S = 60.0  # one that was given out: its client may not have got it


@dataclass(eq=False)
class SampleFuture:
    """One sampling request."""

    owner: str
    task: "asyncio.Task[bytes] | None" = None
    created: float = field(default_factory=time.monotonic)
    asked: float | None = None  # when its answer was given out

    @property
    def num_bytes(self) -> int:
        """Of its answer, once it is there."""
        task = self.task
        is_there = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return len(task.result()) if is_there and task is not None else 0


class SampleFutures:
    """By request id. Used on one event loop."""

    def __init__(self) -> None:
        self._futures: dict[str, SampleFuture] = {}

    def find(self, request_id: str) -> SampleFuture | None:
        return self._futures.get(request_id)

    def num_running(self, owner: str) -> int:
        return sum(f.owner == owner and f.task is not None and not f.task.done() for f in self._futures.values())

    def add(self, request_id: str, owner: str) -> SampleFuture:
        """Raises ApiError where there are too many."""
        self._let_go()
        num, num_own = len(self._futures), sum(future.owner == owner for future in self._futures.values())
        if num >= MAX_FUTURES or num_own >= MAX_FUTURES // 2:
            raise ApiError(RATE_LIMITED, f"{num} sampling requests are not answered or not fetched. Try again.")
        future = self._futures[request_id] = SampleFuture(owner)
        return future

    def drop(self, request_id: str) -> None:
        """Forget a request; one that runs is cancelled."""
        future = self._futures.pop(request_id, None)
        if future is not None and future.task is not None:
            future.task.cancel()

    def _let_go(self) -> None:
        now = time.monotonic()
        for request_id, future in list(self._futures.items()):
            is_old = future.task is not None and future.task.done() and now - future.created > _KEPT_S
            if is_old or (future.asked is not None and now - future.asked > _ASKED_S):
                del self._futures[request_id]
        sizes = {request_id: future.num_bytes for request_id, future in self._futures.items()}
        held = sum(sizes.values())
        for request_id, size in sizes.items():  # the oldest first
            if held <= MAX_KEPT_BYTES:
                return
            if size:
                held -= size
                del self._futures[request_id]
