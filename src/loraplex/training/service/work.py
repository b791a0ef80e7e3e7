"""Loss requests of one run on their way through passes, with the way back if they fail."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence

from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.errors import LoraplexError
from loraplex.training.service.operations import FailedCall, ForwardBackward, LossResult, Result
from loraplex.training.service.passes import LossRow, RowResult, TrainingPasses
from loraplex.training.service.run import TrainingRun

logger = logging.getLogger(__name__)


class PassWork:
    """Requests of one run, all with gradients or all without; longest rows first, for little padding."""

    def __init__(self, run: TrainingRun, operations: Mapping[int, ForwardBackward]) -> None:
        self.run = run
        self.operations = dict(operations)  # by sequence number
        self.backward = next(iter(self.operations.values())).backward
        places = [(seq, index) for seq, own in self.operations.items() for index in range(len(own.datums))]
        self._left = deque(sorted(places, key=lambda place: -self._length(place)))
        self._results: dict[tuple[int, int], RowResult] = {}
        self._gradient: Tensor | None = run.gradient.clone() if self.backward else None

    def _length(self, place: tuple[int, int]) -> int:
        return len(self.operations[place[0]].datums[place[1]].tokens)

    @property
    def is_done(self) -> bool:
        return not self._left

    def take(self, num_tokens: int) -> list[tuple[int, int]]:
        """The rows of the next pass: at least one, and as many as have so many tokens together."""
        taken = [self._left.popleft()]
        room = num_tokens - self._length(taken[0])
        while self._left and self._length(self._left[0]) <= room:
            room -= self._length(self._left[0])
            taken.append(self._left.popleft())
        return taken

    def row(self, place: tuple[int, int], slot: int) -> LossRow:
        operation = self.operations[place[0]]
        return LossRow(slot, operation.datums[place[1]], operation.loss)

    def keep(self, place: tuple[int, int], result: RowResult) -> None:
        self._results[place] = result

    def bad_row(self) -> tuple[int, int] | None:
        """A row whose loss is not finite."""
        return next((place for place, result in self._results.items() if not math.isfinite(result.loss)), None)

    def undo(self) -> None:
        """Give the run's gradient back as it was."""
        if self._gradient is not None:
            self.run.gradient.copy_(self._gradient)

    def results(self) -> dict[int, Result]:
        """By sequence number, once all rows are done."""
        found: dict[int, Result] = {}
        for seq, operation in self.operations.items():
            rows = [self._results[seq, index] for index in range(len(operation.datums))]
            found[seq] = LossResult(
                logprobs=[row.logprobs for row in rows],
                loss=math.fsum(row.loss for row in rows),
                num_tokens=sum(len(datum.tokens) for datum in operation.datums),
            )
        return found


def run_together(works: Sequence[PassWork], passes: TrainingPasses, num_tokens: int) -> None:
    """One round: some rows of each work, up to `num_tokens` in all, in shared passes."""
    share = max(1, num_tokens // len(works))
    taken = [(slot, place) for slot, work in enumerate(works) for place in work.take(share)]
    rows = [works[slot].row(place, slot) for slot, place in taken]
    adapters: list[Mapping[int, SlotWeights]] = [work.run.lora.slot_weights for work in works]
    for (slot, place), result in zip(taken, passes.run(rows, adapters, backward=works[0].backward), strict=True):
        works[slot].keep(place, result)


def run_alone(work: PassWork, passes: TrainingPasses, num_tokens: int) -> dict[int, Result]:
    """A work's requests one by one; what fails, fails alone and leaves no gradient."""
    found: dict[int, Result] = {}
    for seq, operation in work.operations.items():
        own = PassWork(work.run, {seq: operation})
        try:
            while not own.is_done and own.bad_row() is None:
                run_together([own], passes, num_tokens)
        except Exception as error:
            own.undo()
            found[seq] = failed(error, f"request {seq}")
            continue
        bad = own.bad_row()
        if bad is not None:
            own.undo()
            found[seq] = FailedCall(_not_finite(bad[1]), by_user=True)
        else:
            found |= own.results()
    return found


def failed(error: Exception, what: str) -> FailedCall:
    """What the client is told; an error that nobody expected is logged."""
    if isinstance(error, LoraplexError):
        return FailedCall(str(error), by_user=True)
    logger.error("%s of a training run failed", what, exc_info=error)
    return FailedCall(f"{type(error).__name__}: {error}. Only this request failed; the log has more.", by_user=False)


def _not_finite(index: int) -> str:
    return (
        f"the loss of data[{index}] is not finite, so the request left no gradient. Look at its logprobs and weights, "
        "or lower the learning rate."
    )
