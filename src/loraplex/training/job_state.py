"""One adapter job while it trains."""

from collections.abc import Mapping

import torch

from loraplex.adapters.slots import SlotWeights
from loraplex.adapters.weights import LoraWeights
from loraplex.training.config import AdapterJob
from loraplex.training.dataset import JobData
from loraplex.training.learner import Learner
from loraplex.training.parameters import FlatParameters


class JobState(Learner):
    """A job's factors and all that decides its next step."""

    def __init__(
        self,
        job: AdapterJob,
        data: JobData,
        first_weights: Mapping[str, LoraWeights],
        module_index: Mapping[str, int],
        embed_scales: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self.job = job
        self.data = data
        self.parameters = FlatParameters(first_weights, device)
        self.slot_weights: dict[int, SlotWeights] = self.parameters.slot_weights(module_index, embed_scales)
        super().__init__(
            "job",
            job.name,
            job,
            self.parameters.flat,
            data.num_steps,
            has_held_out=bool(data.held_out),
            advice=" The other jobs go on from the last checkpoint in a run without it, with another output folder.",
        )
