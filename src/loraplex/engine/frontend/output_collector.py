"""What the engine's thread tells one reader on an event loop, gathered until the reader takes it."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from loraplex.engine.request import Delta, RequestResult
from loraplex.errors import EngineError

Event = Delta | RequestResult


class OutputCollector:
    """The events of one or more requests. A slow reader finds more events at once, never a longer queue of calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, wants_deltas: bool = True) -> None:
        self.loop = loop
        self.wants_deltas = wants_deltas
        self._events: list[Event] = []
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()

    def put(self, events: Sequence[Event]) -> None:
        """Add events; called on the reader's loop."""
        self._events += events
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """No more events will come; called on the reader's loop."""
        self._error = error
        self._arrived.set()

    def untaken(self) -> list[Event]:
        """What came for a reader that won't take it."""
        events, self._events = self._events, []
        return events

    async def take(self) -> list[Event]:
        """Everything that is new since the last call; waits until there is something.

        Raises EngineError if the engine failed in such a way that no results came.
        """
        await self._arrived.wait()
        events, self._events = self._events, []
        if self._error is None:
            self._arrived.clear()
        elif not events:
            raise self._error
        return events


def deliver(news: Mapping[OutputCollector, Collection[Event]]) -> None:
    """Hand out what one step gave: a single call for each event loop, not one for each token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputCollector, list[Event]]]] = {}
    for collector, events in news.items():
        by_loop.setdefault(collector.loop, []).append((collector, list(events)))
    for loop, collectors in by_loop.items():
        _call(loop, _put_all, collectors)


def fail(collectors: Collection[OutputCollector], error: EngineError) -> None:
    """Let no reader wait any longer, each with an error of its own."""
    for collector in collectors:
        told = type(error)(str(error))
        told.__cause__ = error.__cause__
        _call(collector.loop, collector.fail, told)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():  # its readers are gone with it
            raise


def _put_all(collectors: Sequence[tuple[OutputCollector, list[Event]]]) -> None:
    for collector, events in collectors:
        collector.put(events)
