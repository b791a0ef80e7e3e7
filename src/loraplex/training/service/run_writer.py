"""What the training thread leaves to another one: checkpoints and snapshots on their way to the disk, in order."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from loraplex.errors import CheckpointError, LoraplexError
from loraplex.threads import stand_beside
from loraplex.training.service.journal import Snapshot
from loraplex.training.service.run_queue import RunQueue

logger = logging.getLogger(__name__)


_MAX_PENDING = 4  # each holds a copy of an adapter, or of a whole run


class RunWriter:
    """One thread for all runs."""

    def __init__(self, changed: threading.Condition) -> None:
        """With the condition of the queues, which is told when something is written."""
        self._changed = changed
        self._num_pending = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-training-writer", initializer=stand_beside)

    @property
    def is_full(self) -> bool:
        """Whether so much is to be written that more should wait."""
        return self._num_pending >= _MAX_PENDING

    def close(self, *, drop: bool = False) -> None:
        """Wait for what is to be written; with `drop` only for what is being written."""
        self._pool.shutdown(cancel_futures=drop)

    def submit(self, write: Callable[[], None]) -> "Future[None]":
        """Write something behind all that was submitted before."""
        with self._changed:
            self._num_pending += 1
        future = self._pool.submit(write)
        future.add_done_callback(self._note)
        return future

    def _note(self, future: "Future[None]") -> None:
        with self._changed:
            self._num_pending -= 1
            self._changed.notify_all()

    def snapshot(self, queue: RunQueue, result: Mapping[int, bytes] | None = None) -> "Future[None]":
        """Copy a run's state now, and write it; with a `result` that its client is told only then."""
        run = queue.run
        assert run is not None, "only a run in memory has something new"
        queue.snapshot_step, queue.journal.num_bytes = run.num_steps, 0
        taken = Snapshot(tensors=run.tensors(), last_seq=run.last_seq, num_steps=run.num_steps, results=result or {})
        return self.submit(partial(self._write_snapshot, queue, taken))

    def _write_snapshot(self, queue: RunQueue, snapshot: Snapshot) -> None:
        """The results of checkpoints that were to be written before are there by now."""
        with self._changed:
            results = {**queue.kept(snapshot.last_seq), **snapshot.results}
        whole = Snapshot(
            tensors=snapshot.tensors, last_seq=snapshot.last_seq, num_steps=snapshot.num_steps, results=results
        )
        try:
            queue.journal.write_snapshot(whole)
            with queue.file_lock:
                left = [record for record in queue.journal.records() if record.seq > snapshot.last_seq]
                queue.journal.keep_records(left)
        except (LoraplexError, CheckpointError):
            logger.exception("a snapshot could not be written; the run's requests are kept")
            raise
        finally:
            with self._changed:
                for seq, content in snapshot.results.items():
                    queue.settle(seq, content)
