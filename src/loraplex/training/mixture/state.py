"""A mixture while it trains: a copy of its scaling head or router, and of its experts if they train too."""

import copy
from abc import abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from loraplex.errors import AdapterExistsError, LoraplexError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.core.run_fingerprint import base_fingerprint, tensors_digest
from loraplex.training.core.train_state import Optimizer, TrainState
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.parameters import MixtureParameters, data_fingerprint, experts_digest
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.mixture_folder import Layout
from loraplex.xlora.formats.write_folder import write_mixture_folder
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import Mixture

Own = TypeVar("Own", bound=nn.Module)  # a head or a router


class ExpertsState(TrainState, Generic[Own]):
    """The parameters in training; the mixture itself changes only when they are given back to it."""

    def __init__(
        self,
        model: MultiLoraModel,
        name: str,
        experts: tuple[str, ...],
        served: Own,  # the mixture's head or router
        trained: Own,  # a copy of it
        data: MixtureData,
        config: MixtureTrainConfig,
        *,
        train_experts: bool,
    ) -> None:
        self.data = data
        self.config = config
        self._model = model
        self._names = experts
        self._served = served
        self._trained = trained
        self.parameters = MixtureParameters(model, self._trained, experts, train_experts=train_experts)
        self.experts = self.parameters.experts
        super().__init__(
            "mixture",
            name,
            Optimizer(self.parameters.flat, config.optimizer, data.num_steps),
            config.evaluation,
            data.num_steps,
            has_held_out=bool(data.held_out),
        )

    @property
    def num_truncated(self) -> int:
        return self.data.num_truncated

    @abstractmethod
    def read_folder(self, folder: Path) -> object:
        """What a mixture of this kind left in a folder. Raises LoraplexError where it is not whole."""

    @abstractmethod
    def write_last_good(self, folder: Path) -> None:
        """Write the mixture with the weights in training, whatever the one in memory has."""

    @property
    @abstractmethod
    def layout(self) -> Layout | None:
        """The format of the folder that is written; None: there is one only."""

    def check_replaceable(self, folder: Path) -> None:
        try:
            self.read_folder(folder)
        except LoraplexError as error:
            raise AdapterExistsError(
                f"{str(folder)!r} is not a whole mixture of this kind ({error}), so it is not replaced. Choose another "
                "output folder, or remove this one."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the mixture; unless it diverged, the one in memory gets the trained weights before."""
        if self.has_diverged:
            self.write_last_good(folder)
            return
        self.parameters.replace_trained()
        self._served.load_state_dict(self._trained.state_dict())
        self._model.save_mixture(self.name, folder, layout=self.layout, overwrite=True)

    def fingerprint_of(self, config: Any, first_weights: str) -> dict[str, Any]:
        """What decides what a run of every kind learns; `first_weights` is what those of head or router are called."""
        return {
            "base model": base_fingerprint(self._model.base),
            "mixture": {
                "name": self.name,
                "experts": list(self._names),
                "weights of the experts": experts_digest(self.experts),
                "config": asdict(config),
                first_weights: tensors_digest(self._trained.state_dict().values()),
            },
            "training": self.config.identity(),
            "data": data_fingerprint(self.data),
        }


class MixtureState(ExpertsState[ScalingHead]):
    """An X-LoRA in training."""

    def __init__(self, model: MultiLoraModel, mixture: Mixture, data: MixtureData, config: MixtureTrainConfig) -> None:
        self.mixture = mixture
        self.head = copy.deepcopy(mixture.head)
        super().__init__(
            model,
            mixture.name,
            tuple(mixture.experts),
            mixture.head,
            self.head,
            data,
            config,
            train_experts=mixture.config.use_trainable_adapters,
        )

    @property
    def title(self) -> str:
        return f"{self.experts.num_experts} experts"

    @property
    def layout(self) -> Layout:
        return self.config.layout

    def read_folder(self, folder: Path) -> object:
        return read_mixture_folder(folder)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
        return self.fingerprint_of(self.mixture.config, "first weights of the scaling head")

    def write_last_good(self, folder: Path) -> None:
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
