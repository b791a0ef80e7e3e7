"""What the engine's thread tells one reader on an event loop, gathered until the reader takes it."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from loraplex.engine.request import Delta, RequestResult

Event = Delta | RequestResult


class Feed:
    """The events of one or more requests. A slow reader finds more events at once, never a longer queue of calls."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, wants_deltas: bool = True) -> None:
        self.loop = loop
        self.wants_deltas = wants_deltas
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def put(self, events: Sequence[Event]) -> None:
        """Add events; called on the reader's loop."""
        self._events += events
        self._arrived.set()

    async def take(self) -> list[Event]:
        """Everything that is new since the last call; waits until there is something."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


def deliver(news: Mapping[Feed, Collection[Event]]) -> None:
    """Hand out what one step gave: a single call for each event loop, not one for each token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Feed, list[Event]]]] = {}
    for feed, events in news.items():
        by_loop.setdefault(feed.loop, []).append((feed, list(events)))
    for loop, feeds in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put_all, feeds)


def _put_all(feeds: Sequence[tuple[Feed, list[Event]]]) -> None:
    for feed, events in feeds:
        feed.put(events)
