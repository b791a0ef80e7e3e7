"""The requests of one run: those that wait for their turn, and the results of those that are done."""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from loraplex.errors import QueueFullError, RequestError
from loraplex.training.service.journal import Journal, JournalRecord
from loraplex.training.service.operations import ForwardBackward, Operation, OperationCodec
from loraplex.training.service.run import TrainingRun
from loraplex.training.service.settings import RunSettings, ServiceLimits


class RunQueue:
    """Requests come in any order and are carried out by their sequence numbers, from 0 on; each has one result.

    A request that comes again is the same one. Used under the loop's lock, but for the run and the journal's files.
    """

    def __init__(self, journal: Journal, settings: RunSettings, limits: ServiceLimits) -> None:
        self.journal = journal
        self.settings = settings
        self._limits = limits
        self.run: TrainingRun | None = None  # None: on disk alone
        self.next_seq = 0
        self.snapshot_step = 0  # steps at the last snapshot
        self.last_heard = time.monotonic()
        self.since = time.monotonic()  # it has its place, or has none
        self.is_running = False  # some of its requests are in a pass
        self.held_bytes = 0  # of requests that wait, as they were sent
        self._waiting: dict[int, tuple[Operation, int]] = {}  # and the bytes of the request
        self._results: dict[int, Future[bytes]] = {}
        self._kept: dict[int, bytes] = {}  # the results that are there, the oldest first
        self._kept_bytes = 0
        self.file_lock = threading.Lock()

    @classmethod
    def recover(cls, folder: Path, codec: OperationCodec, limits: ServiceLimits) -> "RunQueue":
        """A run as its folder has it; its weights stay there until it has a place. Raises CheckpointError."""
        journal = Journal(folder)
        queue = cls(journal, journal.settings(), limits)
        snapshot = journal.snapshot(with_tensors=False)
        if snapshot is not None:
            queue.next_seq, queue.snapshot_step = snapshot.last_seq + 1, snapshot.num_steps
            for seq, content in sorted(snapshot.results.items()):
                queue._results[seq] = Future()
                queue.settle(seq, content)
        for record in journal.records():
            if record.seq >= queue.next_seq and record.seq not in queue._waiting:
                operation = codec.parse(record.kind, record.body, queue.settings.run_id)
                queue._accept(record, operation)
        return queue

    def check_room(self, num_bytes: int) -> None:
        """Raise QueueFullError where another request has to wait."""
        num_waiting, held = len(self._waiting), self.held_bytes
        if num_waiting >= self._limits.max_queued or (held and held + num_bytes > self._limits.max_queued_bytes):
            raise QueueFullError(
                f"{num_waiting} requests of this run are waiting ({held} bytes; max_queued, max_queued_bytes). "
                "Wait for some of their results."
            )

    def knows(self, seq: int) -> bool:
        return seq < self.next_seq or seq in self._waiting

    def add(self, record: JournalRecord, operation: Operation) -> None:
        """Take a request that isn't known yet; it is written down before. Raises QueueFullError or OutputError."""
        if not 0 <= record.seq < self.next_seq + 10 * self._limits.max_queued:
            raise RequestError(f"seq_id is {record.seq}, but the next of this run is {self.next_seq}.")
        self.check_room(len(record.body))
        with self.file_lock:
            self.journal.append(record)
        self._accept(record, operation)

    def _accept(self, record: JournalRecord, operation: Operation) -> None:
        self._waiting[record.seq] = (operation, len(record.body))
        self._results[record.seq] = Future()
        self.held_bytes += len(record.body)

    @property
    def next_operation(self) -> Operation | None:
        """What is to be carried out next, if it has come."""
        if self.is_running:
            return None
        found = self._waiting.get(self.next_seq)
        return None if found is None else found[0]

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def loss_requests(self) -> dict[int, ForwardBackward]:
        """The next ones, as far as they are of one kind: their gradients add up, so that they can share passes."""
        found: dict[int, ForwardBackward] = {}
        seq = self.next_seq
        while isinstance(operation := self._waiting.get(seq, (None, 0))[0], ForwardBackward):
            if found and operation.backward != next(iter(found.values())).backward:
                break
            found[seq] = operation
            seq += 1
        return found

    def finish(self, seqs: Iterable[int]) -> None:
        """Requests that were carried out, in their order; their results may still be on their way to the disk."""
        for seq in seqs:
            _, size = self._waiting.pop(seq, (None, 0))
            self.held_bytes -= size
            self.next_seq = max(self.next_seq, seq + 1)
            if self.run is not None:
                self.run.last_seq = seq

    # Results

    def result(self, seq: int) -> "Future[bytes] | None":
        """What a request will give or has given; None for one that isn't known, or whose result is no longer kept."""
        return self._results.get(seq)

    def settle(self, seq: int, content: bytes) -> None:
        """A request's result; the oldest ones go where too much is kept."""
        future = self._results.get(seq)
        if future is None or future.done():
            return
        future.set_result(content)
        self._kept[seq] = content
        self._kept_bytes += len(content)
        while len(self._kept) > 1 and (
            len(self._kept) > self._limits.max_kept or self._kept_bytes > self._limits.max_kept_bytes
        ):
            oldest = next(iter(self._kept))
            self._kept_bytes -= len(self._kept.pop(oldest))
            del self._results[oldest]

    def kept(self, last_seq: int) -> dict[int, bytes]:
        """The results that are there, up to a request's."""
        return {seq: content for seq, content in self._kept.items() if seq <= last_seq}

    def is_idle(self, now: float) -> bool:
        """Whether its client has left: nothing waits, and nothing was heard for a while."""
        return not self._waiting and not self.is_running and now - self.last_heard > self._limits.idle_s


def check_room(queue: RunQueue, queues: Iterable[RunQueue], num_bytes: int, limits: ServiceLimits) -> None:
    """Raise QueueFullError where a run's, a key's or all requests that wait are too many for one more."""
    queue.check_room(num_bytes)
    most, owner = limits.max_all_queued_bytes, queue.settings.owner
    sizes = [(own.held_bytes, own.settings.owner == owner) for own in queues]
    held, of_owner = sum(size for size, _ in sizes), sum(size for size, is_own in sizes if is_own)
    if held + num_bytes > most or (of_owner and of_owner + num_bytes > most // 2):
        raise QueueFullError(
            f"requests of {held} bytes are waiting, {of_owner} of this key ({most} are possible, {most // 2} of a key; "
            "max_all_queued_bytes). Send it again later."
        )
