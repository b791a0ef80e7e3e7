"""What the training thread leaves to another one: checkpoints and snapshots on their way to the disk, in order."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from loraplex.errors import CheckpointError, LoraplexError
from loraplex.training.service.journal import Snapshot
from loraplex.training.service.run_queue import RunQueue

logger = logging.getLogger(__name__)


class RunWriter:
    """One thread for all runs."""

    def __init__(self, lock: threading.RLock) -> None:
        """With the lock of the queues."""
        self._lock = lock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loraplex-training-writer")

    def close(self, *, drop: bool = False) -> None:
        """Wait for what is to be written; with `drop` only for what is being written."""
        self._pool.shutdown(cancel_futures=drop)

    def submit(self, write: Callable[[], None]) -> None:
        """Write something behind all that was submitted before."""
        self._pool.submit(write)

    def snapshot(self, queue: RunQueue, result: Mapping[int, bytes] | None = None) -> "Future[None]":
        """Copy a run's state now, and write it; with a `result` that its client is told only then."""
        run = queue.run
        assert run is not None, "only a run in memory has something new"
        queue.snapshot_step, queue.journal.num_bytes = run.num_steps, 0
        taken = Snapshot(tensors=run.tensors(), last_seq=run.last_seq, num_steps=run.num_steps, results=result or {})
        return self._pool.submit(self._write_snapshot, queue, taken)

    def _write_snapshot(self, queue: RunQueue, snapshot: Snapshot) -> None:
        """The results of checkpoints that were to be written before are there by now."""
        with self._lock:
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
            with self._lock:
                for seq, content in snapshot.results.items():
                    queue.settle(seq, content)
