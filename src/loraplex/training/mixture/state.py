"""A mixture while it trains: a copy of its scaling head, and of its experts if they train too."""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterExistsError, LoraplexError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.core.run_fingerprint import base_fingerprint, tensors_digest
from loraplex.training.core.train_state import Optimizer, TrainState
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.parameters import MixtureParameters, data_fingerprint, experts_digest
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.write_folder import write_mixture_folder
from loraplex.xlora.mixture import Mixture


class MixtureState(TrainState):
    """The parameters in training; the mixture itself changes only when they are given back to it."""

    def __init__(self, model: MultiLoraModel, mixture: Mixture, data: MixtureData, config: MixtureTrainConfig) -> None:
        self.mixture = mixture
        self.data = data
        self.config = config
        self.head = copy.deepcopy(mixture.head)
        self._model = model
        train_experts = mixture.config.use_trainable_adapters
        self.parameters = MixtureParameters(model, self.head, mixture.experts, train_experts=train_experts)
        self.experts = self.parameters.experts
        super().__init__(
            "mixture",
            mixture.name,
            Optimizer(self.parameters.flat, config.optimizer, data.num_steps),
            config.evaluation,
            data.num_steps,
            has_held_out=bool(data.held_out),
        )

    @property
    def title(self) -> str:
        return f"{self.experts.num_experts} experts"

    @property
    def num_truncated(self) -> int:
        return self.data.num_truncated

    def check_replaceable(self, folder: Path) -> None:
        try:
            read_mixture_folder(folder)
        except LoraplexError as error:
            raise AdapterExistsError(
                f"{str(folder)!r} is not a whole mixture ({error}), so it is not replaced. Choose another output "
                "folder, or remove this one."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the mixture; unless it diverged, the one in memory gets the trained weights before."""
        if self.has_diverged:
            self._write_last_good(folder)
            return
        self.parameters.replace_trained()
        self.mixture.head.load_state_dict(self.head.state_dict())
        self._model.save_mixture(self.name, folder, layout=self.config.layout, overwrite=True)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
        return {
            "base model": base_fingerprint(self._model.base),
            "mixture": {
                "name": self.name,
                "experts": list(self.mixture.experts),
                "weights of the experts": experts_digest(self.experts),
                "config": asdict(self.mixture.config),
                "first weights of the scaling head": tensors_digest(self.mixture.head.state_dict().values()),
            },
            "training": self.config.identity(),
            "data": data_fingerprint(self.data),
        }

    def _write_last_good(self, folder: Path) -> None:
        """Write the mixture with the weights in training, whatever the one in memory has."""
        write_mixture_folder(
            folder,
            layout=self.config.layout,
            config=self.mixture.config,
            hidden_size=self.head.hidden_size,
            head_state=self.head.state_dict(),
            experts=self.parameters.all_experts(self.name),
            base_model_name=None,
            overwrite=True,
        )
