"""A client of a training loop in its own process: one run, whose requests get their numbers here."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from loraplex.training.service.checkpoints import CheckpointPath
from loraplex.training.service.datums import Datum
from loraplex.training.service.journal import JournalRecord
from loraplex.training.service.loop import TrainingLoop
from loraplex.training.service.losses import choose_loss
from loraplex.training.service.operations import BeginRun, ForwardBackward, Operation, OptimStep, PublishWeights
from loraplex.training.service.settings import AdamParams, RunSettings

_KIND = "local"


class LocalClient:
    """Used by one thread. Each request's future has what the loop's codec makes of its result."""

    def __init__(
        self, loop: TrainingLoop, settings: RunSettings, *, seq: int = 0, encode: Callable[[Operation], bytes]
    ) -> None:
        """Begin a run, or go on with one behind its request `seq`; `encode` writes down what the codec reads."""
        self.loop, self.id, self.seq = loop, settings.run_id, seq
        self._encode = encode
        if seq == 0:
            loop.begin(settings, JournalRecord(0, _KIND, encode(BeginRun())), BeginRun())

    def send(self, operation: Operation, seq: int | None = None) -> "Future[bytes]":
        """Send a request under the next number, or another. Raises what TrainingLoop.submit raises."""
        self.seq = self.seq + 1 if seq is None else seq
        self.loop.submit(self.id, JournalRecord(self.seq, _KIND, self._encode(operation)), lambda: operation)
        result = self.loop.result(self.id, self.seq)
        assert result is not None, "a request that was taken has a result"
        return result

    def losses(self, data: Sequence[Datum], loss: str, *, backward: bool = True, **options: float) -> "Future[bytes]":
        """Losses of data, and their gradients."""
        return self.send(ForwardBackward(datums=data, loss=choose_loss(loss, options), backward=backward))

    def step(self, params: AdamParams) -> "Future[bytes]":
        """One step of the optimizer."""
        return self.send(OptimStep(params))

    def publish(self) -> "tuple[CheckpointPath, Future[bytes]]":
        """Weights to sample with, as they are now, and where they will be on disk."""
        path = self.path(f"_at-{self.seq + 1}", "sampler_weights")
        return path, self.send(PublishWeights(sampler_id=f"{self.id}:{self.seq + 1}", path=path))

    def path(self, name: str, folder: str = "weights") -> CheckpointPath:
        """Of a checkpoint of this run."""
        return CheckpointPath(self.id, folder, name)
