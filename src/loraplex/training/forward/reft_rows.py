"""The interventions of training batches: each row's tokens through its job's, where the positions mean them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from loraplex.residual.intervention_pass import InterventionGroup, InterventionPass, use_interventions
from loraplex.residual.operations import Active, ChainOperations
from loraplex.residual.positions import segments
from loraplex.training.forward.batch import RowBatch


class ReftRows:
    """By job that trains interventions, what its rows go through."""

    def __init__(self, jobs: Mapping[int, Callable[[], ChainOperations]]) -> None:
        """`jobs` make the operations anew: a backward pass frees the graph behind them."""
        self._jobs = jobs

    def use(self, batch: RowBatch) -> AbstractContextManager[None]:
        """Run a block on the batch with its rows' interventions. A row's prompt ends where its answer begins."""
        operations = {job: self._jobs[job]() for job in {row.job for row in batch.rows if row.is_moved}}
        tokens: dict[tuple[int, Active], list[int]] = {}
        for number, row in enumerate(batch.rows):
            if not row.is_moved:
                continue
            example, first = row.example, number * batch.padded_length
            for part in segments(operations[row.job].positions, 0, len(example.inputs), example.answer[0]):
                here = tokens.setdefault((row.job, part.active), [])
                here += range(first + part.start, first + part.stop)
        groups = [
            InterventionGroup(operations[job], active, torch.tensor(index, device=batch.input_ids.device))
            for (job, active), index in tokens.items()
        ]
        return use_interventions(InterventionPass(groups) if groups else None)
