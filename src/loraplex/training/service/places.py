"""Which runs are in memory: those at work, and where there are more of them than places, in turns."""

import logging
import threading
import time
from collections.abc import Collection

import torch

from loraplex.errors import LoraplexError
from loraplex.layers.attach import AdaptableModel
from loraplex.training.service.run import TrainingRun
from loraplex.training.service.run_queue import RunQueue
from loraplex.training.service.run_writer import RunWriter

logger = logging.getLogger(__name__)

_SETTLED_S = 5.0  # a run without requests for so long may leave its place to one that waits
_TURN_S = 20.0  # a run at work keeps its place for so long where others wait


class Places:
    """Used by the training thread; `queues` are those of the loop, under its lock."""

    def __init__(
        self,
        queues: dict[str, RunQueue],
        lock: threading.RLock,
        writer: RunWriter,
        adaptable: AdaptableModel,
        device: torch.device,
        max_runs: int,
    ) -> None:
        self._queues, self._lock, self._writer = queues, lock, writer
        self._adaptable, self._device, self._max_runs = adaptable, device, max_runs

    @property
    def num_taken(self) -> int:
        with self._lock:
            return sum(queue.run is not None for queue in self._queues.values())

    @property
    def is_full(self) -> bool:
        return self.num_taken >= self._max_runs

    def take(self, queue: RunQueue, in_passes: Collection[str]) -> bool:
        """Give a run a place; False if there is none now. Raises whatever keeps the run from being brought back."""
        if self.is_full and not self._make_room(in_passes):
            return False
        run = TrainingRun(queue.settings, self._adaptable, self._device)
        self._adaptable.attach(run.lora.paths)
        snapshot = queue.journal.snapshot()
        if snapshot is not None:
            run.restore(snapshot.tensors)
            run.num_steps, run.last_seq = snapshot.num_steps, snapshot.last_seq
        queue.run, queue.since = run, time.monotonic()
        return True

    def _make_room(self, in_passes: Collection[str]) -> bool:
        """Let the run leave that was not heard of for longest; if all are at work, the one that is in for longest."""
        now = time.monotonic()
        with self._lock:
            taken = [queue for queue in self._queues.values() if queue.run is not None]
        silent = [queue for queue in taken if not queue.has_waiting and now - queue.last_heard > _SETTLED_S]
        if silent:
            return self.leave(min(silent, key=lambda queue: queue.last_heard))
        had_turn = [queue for queue in taken if queue.settings.run_id not in in_passes and now - queue.since > _TURN_S]
        return bool(had_turn) and self.leave(min(had_turn, key=lambda queue: queue.since))

    def leave(self, queue: RunQueue) -> bool:
        """Write a run to disk and free its memory; its next request brings it back. Whether that was possible."""
        is_written = True
        if queue.run is not None:
            try:
                self._writer.snapshot(queue).result()
            except LoraplexError:
                is_written = False  # the journal has everything, but a run with requests would go on from before them
        with self._lock:
            if not queue.has_waiting:
                self._queues.pop(queue.settings.run_id, None)
            elif not is_written:
                return False
            queue.run, queue.since = None, time.monotonic()
        logger.info("a training run left memory", extra={"run": queue.settings.run_id})
        return True
