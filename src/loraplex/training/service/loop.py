"""The thread that trains: requests of all runs that wait at the same time share passes."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from loraplex.layers.attach import AdaptableModel
from loraplex.layers.quantized.training import quantized_modules_train
from loraplex.threads import workers_given_back
from loraplex.training.forward.probe import check_trainable_base
from loraplex.training.service.carry_out import CarriedOut, Publish, carry_out
from loraplex.training.service.checkpoints import Checkpoints
from loraplex.training.service.journal import Journal, JournalRecord
from loraplex.training.service.operations import (
    FailedCall,
    ForwardBackward,
    LoadCheckpoint,
    Operation,
    OperationCodec,
    PublishWeights,
    Result,
    SaveCheckpoint,
)
from loraplex.training.service.passes import TrainingPasses
from loraplex.training.service.places import Places
from loraplex.training.service.run_folders import RunFolders
from loraplex.training.service.run_queue import RunQueue, check_room
from loraplex.training.service.run_writer import RunWriter
from loraplex.training.service.settings import RunSettings, ServiceLimits
from loraplex.training.service.work import PassWork, failed, run_alone, run_together

logger = logging.getLogger(__name__)

_ROUNDS = 2  # passes' worth of tokens between two looks at who waits
_GATHERING = 0.1  # of the last round's time may be spent waiting for those who took part in it
_MAX_GATHERING_S = 0.05
_TICK_S = 1.0


class TrainingLoop:
    """Runs and their requests. Its methods may be called from any thread; passes run in one of its own."""

    def __init__(
        self,
        base: PreTrainedModel,
        adaptable: AdaptableModel,
        *,
        root: Path,
        checkpoints: Checkpoints,
        codec: OperationCodec,
        publish: Publish,
        limits: ServiceLimits,
    ) -> None:
        """Raises BaseModelError for a base model that can't be trained on."""
        check_trainable_base(base)
        self._base = base
        self.folders, self._checkpoints = RunFolders(root), checkpoints
        self._codec, self._publish = codec, publish
        self.limits = limits
        self._passes = TrainingPasses(base, limits.tokens_per_forward)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queues: dict[str, RunQueue] = {}
        self._works: dict[str, PassWork] = {}
        self._last_round: tuple[float, frozenset[str]] = (0.0, frozenset())  # its seconds, and whose requests it had
        self._recovery = threading.Lock()  # while a run is read from disk, the others go on
        self._last_look = time.monotonic()  # at runs whose clients have left
        self._writer = RunWriter(self._changed)
        self._writer.submit(checkpoints.drop_expired)
        self._places = Places(self._queues, self._lock, self._writer, adaptable, base.device, limits.max_runs)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="loraplex-training", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; what was taken is on disk, and goes on when the runs are used again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._writer.close()

    # Requests

    def begin(self, settings: RunSettings, record: JournalRecord, operation: Operation) -> None:
        """Take a run's first request, which creates the run; a second time changes nothing."""
        with self._lock:
            if not self.folders.has(settings.run_id):
                journal = Journal.create(self.folders.folder(settings.run_id), settings)
                self._queues[settings.run_id] = RunQueue(journal, settings, self.limits)
        self.submit(settings.run_id, record, lambda: operation)

    def submit(self, run_id: str, record: JournalRecord, operation: Callable[[], Operation]) -> int:
        """Take a request, unless it was taken before; returns the tokens of its data.

        Raises RequestError, QueueFullError or OutputError.
        """
        self.queue(run_id)
        with self._lock:
            queue = self._queues[run_id]
            if queue.knows(record.seq):
                return 0
            check_room(queue, self._queues.values(), len(record.body), self.limits)
        made = operation()
        self.queue(run_id)  # it may have left memory meanwhile
        with self._lock:
            queue = self._queues[run_id]
            if queue.knows(record.seq):
                return 0
            check_room(queue, self._queues.values(), len(record.body), self.limits)
            queue.add(record, made)
            self._changed.notify_all()
        return sum(len(datum.tokens) for datum in made.datums) if isinstance(made, ForwardBackward) else 0

    def result(self, run_id: str, seq: int) -> "Future[bytes] | None":
        """A request's result, when it is there; None for an unknown one. Raises RequestError for an unknown run."""
        return self.queue(run_id).result(seq)

    def waits_for_place(self, run_id: str) -> bool:
        """Whether a run's requests wait until another run leaves memory."""
        with self._lock:
            queue = self._queues.get(run_id)
            return queue is not None and queue.run is None and self._places.is_full

    def queue(self, run_id: str) -> RunQueue:
        """A run's queue, from disk where it isn't known. Raises RequestError or CheckpointError."""
        found = self._heard_of(run_id)
        if found is not None:
            return found
        self.folders.settings(run_id)  # or there is no such run
        with self._recovery:
            found = self._heard_of(run_id)
            if found is None:
                found = RunQueue.recover(self.folders.folder(run_id), self._codec, self.limits)
                with self._changed:
                    self._queues[run_id] = found
                    self._changed.notify_all()
        return found

    def is_behind(self, run_id: str) -> bool:
        """Whether a run has requests to carry out; what a process that ended has left begins anew with the question."""
        queue = self.queue(run_id) if self.folders.has(run_id) else None
        with self._lock:
            return queue is not None and (queue.is_running or queue.next_operation is not None)

    def _heard_of(self, run_id: str) -> RunQueue | None:
        """A run's queue in memory, whose client is still there."""
        with self._lock:
            found = self._queues.get(run_id)
            if found is not None:
                found.last_heard = time.monotonic()
            return found

    def release(self, run_ids: Iterable[str]) -> None:
        """Let runs leave memory whose client says that it is done; their next request brings them back."""
        with self._changed:
            for run_id in run_ids:
                if run_id in self._queues:
                    self._queues[run_id].last_heard = -math.inf
            self._last_look = -math.inf
            self._changed.notify_all()

    def num_runs_of(self, owner: str) -> int:
        """An owner's runs that have a place, or wait for one."""
        with self._lock:
            return sum(queue.settings.owner == owner for queue in self._queues.values())

    def num_runs(self) -> tuple[int, int]:
        """How many are in memory, and how many have requests that wait."""
        with self._lock:
            return self._places.num_taken, sum(queue.has_waiting for queue in self._queues.values())

    # The thread

    def _run(self) -> None:
        with quantized_modules_train(self._base):
            while not self._is_closed:
                try:
                    with workers_given_back():
                        self._turn()
                except Exception:  # of the loop itself: requests have their own
                    logger.exception("a turn of training failed")
                    time.sleep(_TICK_S)

    def _turn(self) -> None:
        ready = self._ready()
        now = time.monotonic()
        if not ready or now - self._last_look > self.limits.idle_s:
            self._last_look = now
            self._let_go(now)
        if not ready:
            with self._changed:
                if not self._is_closed and not self._ready():
                    self._changed.wait(_TICK_S)
            return
        free = [queue for queue in ready if not self._waits_for_disk(queue)]
        loaded = [queue for queue in free if queue.run is not None]
        absent = sorted((queue for queue in free if queue.run is None), key=lambda queue: queue.since)
        loaded += [queue for queue in absent if self._load(queue)]
        loaded = [queue for queue in loaded if queue.run is not None]  # one may have left for another
        small = [queue for queue in loaded if not self._has_losses(queue)]
        for queue in small:
            self._carry_out(queue)
        if small:
            return  # those runs' next requests may share the pass
        if not loaded:
            with self._changed:
                if len(free) == len(ready) or self._writer.is_full:
                    self._changed.wait(_TICK_S)
        elif self._works or not self._gather(loaded):
            self._round(loaded)

    def _ready(self) -> list[RunQueue]:
        with self._lock:
            return [
                queue
                for run_id, queue in self._queues.items()
                if run_id in self._works or queue.next_operation is not None
            ]

    def _has_losses(self, queue: RunQueue) -> bool:
        return queue.settings.run_id in self._works or isinstance(queue.next_operation, ForwardBackward)

    def _waits_for_disk(self, queue: RunQueue) -> bool:
        """Whether the next request would make one more copy of weights while others are not written yet."""
        return self._writer.is_full and isinstance(
            queue.next_operation, SaveCheckpoint | PublishWeights | LoadCheckpoint
        )

    def _let_go(self, now: float) -> None:
        """Let runs leave memory whose clients have left."""
        with self._lock:
            idle = [queue for queue in self._queues.values() if queue.is_idle(now)]
        for queue in idle:
            self._places.leave(queue)

    def _gather(self, ready: Sequence[RunQueue]) -> bool:
        """Wait a moment for runs that took part in the last round; whether something has come."""
        seconds, peers = self._last_round
        missing = peers - {queue.settings.run_id for queue in ready}
        if not missing:
            return False
        self._last_round = (seconds, frozenset())  # once a round
        stop = time.monotonic() + min(_MAX_GATHERING_S, _GATHERING * seconds)
        with self._changed:
            while (left := stop - time.monotonic()) > 0 and not self._is_closed:
                if missing <= {queue.settings.run_id for queue in self._ready()}:
                    break
                self._changed.wait(left)
        return True

    def _round(self, queues: Sequence[RunQueue]) -> None:
        """Some rows of each run that waits, in shared passes."""
        for queue in queues:
            run_id = queue.settings.run_id
            if run_id not in self._works:
                assert queue.run is not None, f"{run_id} has no place"
                with self._lock:
                    self._works[run_id] = PassWork(queue.run, queue.loss_requests())
                    queue.is_running = True
        first = next(iter(self._works.values()))
        works = {run_id: work for run_id, work in self._works.items() if work.backward == first.backward}
        started = time.perf_counter()
        try:
            run_together(list(works.values()), self._passes, _ROUNDS * self.limits.tokens_per_forward)
        except Exception:
            logger.exception("a shared pass failed; its requests are tried one by one")
            for run_id, work in works.items():
                work.undo()
                self._end(run_id, run_alone(work, self._passes, self.limits.tokens_per_forward))
        self._last_round = (time.perf_counter() - started, frozenset(works))
        for run_id, work in works.items():
            if run_id not in self._works:
                continue
            if work.bad_row() is not None:
                work.undo()
                self._end(run_id, run_alone(work, self._passes, self.limits.tokens_per_forward))
            elif work.is_done:
                self._end(run_id, work.results())

    def _end(self, run_id: str, results: dict[int, Result]) -> None:
        """A work is done: its results go to the client."""
        queue = self._queues[run_id]
        encoded = {seq: self._encoded(result) for seq, result in results.items()}
        with self._lock:
            del self._works[run_id]
            queue.is_running = False
            queue.finish(sorted(encoded))
            for seq, content in encoded.items():
                queue.settle(seq, content)

    def _carry_out(self, queue: RunQueue) -> None:
        """One request that needs no pass."""
        seq, operation, run = queue.next_seq, queue.next_operation, queue.run
        assert operation is not None and run is not None, "a queue without work was chosen"  # noqa: PT018
        try:
            done = carry_out(run, seq, operation, self._checkpoints, self._publish)
        except Exception as error:
            done = CarriedOut(failed(error, f"request {seq}"))
        with self._lock:
            queue.finish([seq])
        if done.write is not None:
            self._writer.submit(partial(self._write, queue, seq, done))
        if isinstance(operation, LoadCheckpoint) and not isinstance(done.result, FailedCall | None):
            # The checkpoint may change or go: the run must not need it again.
            self._writer.snapshot(queue, {seq: self._codec.encode(done.result)})
            return
        if done.result is not None:
            self._settle(queue, seq, done.result)
        self._snapshot_if_due(queue)

    def _write(self, queue: RunQueue, seq: int, done: CarriedOut) -> None:
        assert done.write is not None, "there is nothing to write"
        try:
            result = done.write()
        except Exception as error:
            result = failed(error, f"request {seq}")
        if done.result is None:
            self._settle(queue, seq, result)
        elif isinstance(result, FailedCall):
            logger.warning("the weights of request %d are in memory alone: %s", seq, result.message)

    def _settle(self, queue: RunQueue, seq: int, result: Result) -> None:
        content = self._encoded(result)
        with self._lock:
            queue.settle(seq, content)

    def _encoded(self, result: Result) -> bytes:
        try:
            return self._codec.encode(result)
        except Exception as error:
            return self._codec.encode(failed(error, "an answer"))

    # Memory and disk

    def _load(self, queue: RunQueue) -> bool:
        """Give a run a place; False if there is none now. A run that can't be brought back fails its request."""
        try:
            return self._places.take(queue, self._works)
        except Exception as error:
            with self._lock:
                seq = queue.next_seq
                queue.finish([seq])
            self._settle(queue, seq, failed(error, "the begin"))
            return False

    def _snapshot_if_due(self, queue: RunQueue) -> None:
        assert queue.run is not None, "only a run in memory has something new"
        steps = queue.run.num_steps - queue.snapshot_step
        is_due = steps >= self.limits.snapshot_steps or queue.journal.num_bytes >= self.limits.snapshot_bytes
        if is_due and not self._writer.is_full:
            self._writer.snapshot(queue)
