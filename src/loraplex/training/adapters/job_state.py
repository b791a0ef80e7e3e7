"""One adapter job while it trains."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter
from loraplex.residual.format import write_residual
from loraplex.training.adapters.links import FrozenLink
from loraplex.training.adapters.residual_parameters import ResidualParameters
from loraplex.training.config import AdapterJob
from loraplex.training.core.parameters import FlatParameters
from loraplex.training.core.train_state import TrainState
from loraplex.training.data.dataset import JobData

DIVERGED = ".diverged"


class JobState(TrainState):
    """A job's parameters and all that decides its next step."""

    def __init__(
        self,
        job: AdapterJob,
        data: JobData,
        parameters: FlatParameters | ResidualParameters,
        slot_weights: Mapping[int, SlotWeights],  # by module index; a residual adapts no module
        frozen: FrozenLink | None = None,
    ) -> None:
        self.job = job
        self.frozen = frozen or FrozenLink()  # what its rows go through besides
        self.data = data
        self.parameters = parameters
        self.slot_weights = slot_weights
        super().__init__(
            "job",
            job.name,
            job,
            self.parameters.flat,
            data.num_steps,
            has_held_out=bool(data.held_out),
        )

    @property
    def folder_name(self) -> str:
        """Where the adapter is written in the output folder; a diverged job's not where a good one is looked for."""
        return f"{self.job.name}{DIVERGED if self.has_diverged else ''}"

    def write(self, folder: Path) -> None:
        """Write the adapter as it is now, in its format."""
        if isinstance(self.parameters, ResidualParameters):
            residual = replace(self.parameters.trained(), end_tokens=self.data.end_tokens)
            write_residual(residual, folder, overwrite=True)
            return
        assert self.job.lora is not None, "a job trains one of the two"
        layers, ends = self.parameters.layers(), self.data.end_tokens
        write_adapter(Adapter(config=self.job.lora, layers=layers, end_tokens=ends), folder, overwrite=True)
