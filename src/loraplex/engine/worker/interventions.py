"""Interventions inside packed passes: which tokens go through what, kept while the same rows are decoded."""

import torch

from loraplex.engine.worker.input_batch import InputBatch
from loraplex.errors import EngineError
from loraplex.residual.intervention_pass import InterventionGroup, InterventionPass
from loraplex.residual.operations import ChainOperations
from loraplex.residual.positions import PositionSegment, segments
from loraplex.residual.registry import LinkedAttention

# A row's, and where token 0 of its sequence would stand in the pass.
RowSegment = tuple[ChainOperations, int, PositionSegment]


class InterventionRows:
    """Makes the interventions of each packed pass, and keeps the last."""

    def __init__(self, linked: LinkedAttention) -> None:
        self._linked = linked
        self._made: tuple[tuple[object, ...], InterventionPass] | None = None
        self._num_detached = 0

    def of(self, batch: InputBatch) -> InterventionPass | None:
        """What a pass's tokens go through; None if no part of it asks for anything."""
        found = _row_segments(batch)
        if not found:
            self._made = None
            return None
        self._num_detached = self._linked.num_detached
        key: tuple[object, ...] = (
            self._num_detached,
            *((id(row), first + own.start, own.stop - own.start, own.active) for row, first, own in found),
        )
        if self._made is None or self._made[0] != key:
            for operations in {id(row): row for row, _, _ in found}.values():
                self._linked.attach(operations)
            device = batch.positions.device
            groups = [
                InterventionGroup(row, own.active, torch.arange(first + own.start, first + own.stop, device=device))
                for row, first, own in found
            ]
            self._made = (key, InterventionPass(groups))
        return self._made[1]

    def check_ran(self) -> None:
        """Raise EngineError if the hooks were taken away while a pass needed them."""
        if self._made is not None and self._num_detached != self._linked.num_detached:
            raise EngineError(
                "the base model's blocks were given back (registry.linked.detach) while a pass needed them. Detach "
                "when no request is running; this one can be asked again."
            )

    def forget(self) -> None:
        """No request runs: keep nothing of the last ones."""
        self._made = None


def _row_segments(batch: InputBatch) -> list[RowSegment]:
    found: list[RowSegment] = []
    for chunk, offset in zip(batch.chunks, batch.offsets, strict=True):
        operations = chunk.interventions
        if operations is not None:
            first = offset - chunk.start
            own = segments(operations.positions, chunk.start, chunk.stop, chunk.sequence.num_prompt)
            found += [(operations, first, segment) for segment in own]
    return found
