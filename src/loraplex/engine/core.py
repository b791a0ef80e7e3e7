"""The parts of an engine that one fault takes down together, and that are made anew afterwards."""

import logging

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.faults import failed_pass
from loraplex.engine.frontend.input_processor import InputProcessor
from loraplex.engine.frontend.output_processor import OutputProcessor
from loraplex.engine.gc_freeze import freeze_gc
from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.request import Delta
from loraplex.engine.sched.adapter_leases import AdapterLeases
from loraplex.engine.sched.capacity import Capacity
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.request_tracker import RequestTracker
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.engine.startup.start import start_model_runner
from loraplex.engine.stats import StepCounts
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.models.multi_lora import MultiLoraModel

logger = logging.getLogger(__name__)


class EngineCore:
    """Runner, scheduler, leases: what is joined to the model, and holds blocks and slots."""

    def __init__(self, model: MultiLoraModel, config: EngineConfig) -> None:
        """Raises BaseModelError for a base model that packed passes can't run, and ConfigError."""
        self._thaw_gc = freeze_gc(self)
        try:
            self.runner = start_model_runner(model, config)
        except BaseException:
            self._thaw_gc()
            raise
        self.leases = AdapterLeases(model)
        self.scheduler = Scheduler(self.runner.config, self.runner.pool, self.runner.table, self.leases.bring)
        self.capacity = Capacity(
            max_length=self.runner.max_length,
            num_blocks=self.runner.pool.num_blocks,
            block_tokens=self.runner.pool.block_tokens,
            max_answers=config.max_waiting + config.max_running,
            lengths=self.runner.lengths,
            max_passes=self.runner.max_passes,
        )

    def join(self, tracker: RequestTracker, input_processor: InputProcessor, counts: StepCounts) -> None:
        """Let the tracker's requests run here."""
        tracker.use(self.scheduler, self.leases)
        self.scheduler.queue_times = counts.queue_times
        self._tracker, self._counts = tracker, counts
        self._output_processor = OutputProcessor(input_processor, tracker, counts)

    def close(self) -> None:
        """Give the model back as it was, whatever state this is in."""
        try:
            self.leases.release_all()
        finally:
            try:
                self.runner.close()
            finally:
                self._thaw_gc()

    def step(self) -> list[Delta]:
        """Run one forward pass, if anything can run."""
        deltas = self._tracker.take_in()
        chunks = self.scheduler.plan()
        for failures in (self.leases.failures, self.scheduler.failures):
            deltas += [delta for sequence, error in failures for delta in self._tracker.end(sequence, "error", error)]
            failures.clear()
        return deltas + (self._run(chunks) if chunks else [])

    def _run(self, chunks: list[ScheduledChunk]) -> list[Delta]:
        try:
            results = self.runner.run(chunks)
        except Exception as error:
            return self._run_apart(chunks, error)
        self._counts.add(chunks)
        deltas = self._output_processor.take(results)
        if not self.scheduler.running:
            self.runner.attention.forget_rows()
            self.runner.interventions.forget()
        return deltas

    def _run_apart(self, chunks: list[ScheduledChunk], error: Exception) -> list[Delta]:
        """A pass failed: run its sequences one by one, so that only those fail which can't run."""
        logger.warning("a pass of %d chunks failed: %s: %s", len(chunks), type(error).__name__, error)
        sequences = list(dict.fromkeys(chunk.sequence for chunk in chunks))
        if len(sequences) == 1:
            self._try_out()
            return self._tracker.end(sequences[0], "error", failed_pass(error))
        deltas = []
        for sequence in sequences:
            deltas += self._run([chunk for chunk in chunks if chunk.sequence is sequence])
        return deltas

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Run one token of the base model: if that raises too, no request is to blame, and it is a fault."""
        runner = self.runner
        if runner.pool.num_available == 0:
            return
        kv = SequenceKV([0], (), (), runner.pool, runner.table)
        try:
            kv.grow(1)
            chunk = ScheduledChunk(kv=kv, start=0, count=1, wants_logits=True)
            runner.forward(InputBatch([chunk], runner.cache, runner.table))
        finally:
            kv.close()
