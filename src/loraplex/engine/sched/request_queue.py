"""Generations that wait to run: by priority, then by the share that got least, then by arrival."""

from collections import deque
from collections.abc import Iterator

from loraplex.engine.sched.fair_shares import Share, Shares
from loraplex.engine.sched.sequence import Generation


class Waiting:
    """One queue for each priority and share."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._queues: dict[tuple[int, Share], deque[Generation]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Generation]:
        for queue in self._queues.values():
            yield from queue

    def add(self, generation: Generation) -> None:
        self._queue(generation).append(generation)
        self._count += 1

    def put_back(self, generation: Generation) -> None:
        """Before all others of its queue: it has run already, or must be asked again."""
        self._queue(generation).appendleft(generation)
        self._count += 1

    def heads(self) -> list[Generation]:
        """The first of every queue, in the order in which they should run."""
        keys = sorted(self._queues, key=lambda key: (-key[0], self._shares.served(key[1])))
        return [self._queues[key][0] for key in keys]

    def remove(self, generation: Generation) -> None:
        key = _key(generation)
        queue = self._queues[key]
        queue.remove(generation)
        self._count -= 1
        if not queue:
            del self._queues[key]

    def _queue(self, generation: Generation) -> deque[Generation]:
        return self._queues.setdefault(_key(generation), deque())


def _key(generation: Generation) -> tuple[int, Share]:
    return generation.state.request.priority, generation.state.share
