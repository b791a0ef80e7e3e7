"""Sequences that wait to run: by priority, then by the share that got least, then by arrival."""

from collections import Counter, deque
from collections.abc import Iterator

from loraplex.engine.sched.sequence import SequenceState

Share = tuple[str, ...]


class FairShares:
    """Tokens that each share has got, while it has requests (start-time fair queueing, as virtual time).

    A share that comes back after a pause starts where the least served one stands: waiting saves up no credit.
    """

    def __init__(self) -> None:
        self._served: dict[Share, float] = {}
        self._num_requests: Counter[Share] = Counter()

    def enter(self, share: Share) -> None:
        """One more request of a share."""
        if self._num_requests[share] == 0:
            floor = min(self._served.values(), default=0.0)
            self._served[share] = floor
        self._num_requests[share] += 1

    def leave(self, share: Share) -> None:
        """One request less."""
        self._num_requests[share] -= 1
        if self._num_requests[share] == 0:
            del self._num_requests[share], self._served[share]

    def charge(self, share: Share, num_tokens: int) -> None:
        """Count computed tokens."""
        if share in self._served:
            self._served[share] += num_tokens

    def served(self, share: Share) -> float:
        return self._served.get(share, 0.0)


class RequestQueue:
    """One queue for each priority and share."""

    def __init__(self, shares: FairShares) -> None:
        self._shares = shares
        self._queues: dict[tuple[int, Share], deque[SequenceState]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SequenceState]:
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: SequenceState) -> None:
        self._queue(sequence).append(sequence)
        self._count += 1

    def put_back(self, sequence: SequenceState) -> None:
        """Before all others of its queue: it has run already, or must be asked again."""
        self._queue(sequence).appendleft(sequence)
        self._count += 1

    def heads(self) -> list[SequenceState]:
        """The first of every queue, in the order in which they should run."""
        keys = sorted(self._queues, key=lambda key: (-key[0], self._shares.served(key[1])))
        return [self._queues[key][0] for key in keys]

    def remove(self, sequence: SequenceState) -> None:
        key = _key(sequence)
        queue = self._queues[key]
        queue.remove(sequence)
        self._count -= 1
        if not queue:
            del self._queues[key]

    def _queue(self, sequence: SequenceState) -> deque[SequenceState]:
        return self._queues.setdefault(_key(sequence), deque())


def _key(sequence: SequenceState) -> tuple[int, Share]:
    return sequence.state.request.priority, sequence.state.share
