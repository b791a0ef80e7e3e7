"""How long a reader may take nothing."""

import asyncio
from collections.abc import Callable

ABORT_KEY = "loraplex_abort"  # in a scope: closes the connection without waiting for what is still to be sent


class SendClock:
    """Calls `on_stall` when something is being sent for `limit_s`.

    One timer that now and then looks whether a send lasts: a timer of its own for each chunk costs more than the chunk.
    """

    def __init__(self, limit_s: float, on_stall: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._on_stall = on_stall
        self._since: float | None = None  # when what is being sent began
        self._timer = self._loop.call_later(limit_s, self._look)

    def begin(self) -> None:
        self._since = self._loop.time()

    def end(self) -> None:
        self._since = None

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._limit_s
        if due <= now:
            self._on_stall()
        else:
            self._timer = self._loop.call_at(due, self._look)
