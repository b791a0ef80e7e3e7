"""What went wrong in the engine, told to requests; and how often it may happen."""

import time
from collections import deque
from collections.abc import Callable

from loraplex.engine.config import EngineConfig
from loraplex.errors import EngineError, EngineStoppedError, LoraplexError


class FaultLog:
    """The faults of one engine: errors outside of the requests' own work, after which nothing it holds is trusted."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._times: deque[float] = deque()  # of those inside the window
        self.count = 0
        self.last: BaseException | None = None
        self.has_stopped = False  # the engine takes no more requests

    def add(self, error: BaseException, *, for_good: bool = False) -> EngineError:
        """Count a fault, which may be the last; returns what the requests that it ended are told."""
        self.count += 1
        self.last = without_frames(error)
        now = self._clock()
        self._times.append(now)
        while self._times[0] <= now - self._config.restart_window_s:
            self._times.popleft()
        may_restart = self._config.on_fault == "restart" and len(self._times) <= self._config.max_restarts
        self.has_stopped = self.has_stopped or for_good or not may_restart
        then = "it has stopped" if self.has_stopped else "it starts anew: ask again"
        told = EngineError(
            f"the engine failed: {type(error).__name__}: {error}. All requests that it had were ended, and {then}. The "
            "log has the traceback."
        )
        told.__cause__ = self.last
        return told

    def refusal(self) -> EngineStoppedError:
        """Why an engine that has stopped takes no requests."""
        last = self.last
        refused = EngineStoppedError(
            f"the engine has stopped after {self.count} faults ({len(self._times)} of them within "
            f"{self._config.restart_window_s:g} s, max_restarts is {self._config.max_restarts}); the last was "
            f"{type(last).__name__}: {last}. The log has the tracebacks. When their cause is gone, make a new engine "
            "or start the server again."
        )
        refused.__cause__ = last
        return refused


def own_fault(error: Exception, what: str) -> LoraplexError:
    """What a request is told that failed in work of its own; loraplex's own errors are told as they are."""
    return _told(error, f"{what} failed: {type(error).__name__}: {error}. Only this request was ended; ask again.")


def failed_pass(error: Exception) -> LoraplexError:
    """What a request is told whose forward pass failed, by itself too."""
    return _told(
        error,
        f"the forward pass failed: {type(error).__name__}: {error}. Only this request was ended; ask again, with fewer "
        "tokens if memory is what it lacked.",
    )


def interrupted(error: BaseException) -> EngineError:
    """What requests are told that ran when the program was interrupted."""
    return EngineError(f"the engine was interrupted ({type(error).__name__}) while this request ran. Ask again.")


def without_frames(error: BaseException) -> BaseException:
    """The error without tracebacks, whose frames would hold tensors and leases as long as somebody has the error."""
    seen: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        link = following.pop()
        if link is not None and link not in seen:
            seen.append(link)
            link.__traceback__ = None
            following += [link.__cause__, link.__context__]
    return error


def _told(error: Exception, message: str) -> LoraplexError:
    if isinstance(error, LoraplexError):
        return error
    told = EngineError(message)
    told.__cause__ = without_frames(error)
    return told
