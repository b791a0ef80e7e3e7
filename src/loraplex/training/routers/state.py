"""A linear router while it trains: a copy of it, and of its experts if they train too."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterExistsError, LoraplexError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routers.folder import read_router_folder, write_router_folder
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.router import LinearRouter
from loraplex.training.core.config import flat_options
from loraplex.training.core.run_fingerprint import base_fingerprint, tensors_digest
from loraplex.training.core.train_state import Optimizer, TrainState
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.parameters import MixtureParameters, data_fingerprint, experts_digest
from loraplex.training.routers.first_weights import set_first_weights
from loraplex.training.routers.teacher import Teacher


class RouterState(TrainState):
    """The parameters in training; the mixture itself changes only when they are given back to it."""

    def __init__(
        self,
        model: MultiLoraModel,
        mixture: RoutedMixture,
        data: MixtureData,
        config: MixtureTrainConfig,
        teacher: Teacher | None,
    ) -> None:
        assert isinstance(mixture.router, LinearRouter), "other routers are refused"
        self.mixture = mixture
        self.data = data
        self.config = config
        self.teacher = teacher
        self.router = mixture.router.copy()
        self._model = model
        train_experts = config.router.train_experts
        self.parameters = MixtureParameters(model, self.router, mixture.experts, train_experts=train_experts)
        self.experts = self.parameters.experts
        set_first_weights(self.router, config.router.first_weights, self.experts, config.seed)
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
        return f"router of {self.experts.num_experts} experts"

    @property
    def num_truncated(self) -> int:
        return self.data.num_truncated

    def check_replaceable(self, folder: Path) -> None:
        try:
            read_router_folder(folder)
        except LoraplexError as error:
            raise AdapterExistsError(
                f"{str(folder)!r} is not a whole mixture with a router ({error}), so it is not replaced. Choose "
                "another output folder, or remove this one."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the mixture; unless it diverged, the one in memory gets the trained weights before."""
        if self.has_diverged:
            last_good = replace(self.mixture, router=self.router)
            experts = self.parameters.all_experts(self.name)
            write_router_folder(folder, last_good, experts, base_model_name=None, overwrite=True)
            return
        self.parameters.replace_trained()
        assert isinstance(self.mixture.router, LinearRouter), "other routers are refused"
        self.mixture.router.load_state_dict(self.router.state_dict())
        self._model.save_mixture(self.name, folder, overwrite=True)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
        options = {name: value for name, value in flat_options(self.config.router).items() if name != "teacher"}
        return {
            "base model": base_fingerprint(self._model.base),
            "mixture": {
                "name": self.name,
                "experts": list(self.mixture.experts),
                "weights of the experts": experts_digest(self.experts),
                "config": asdict(self.router.config),
                "first weights of the router": tensors_digest(self.router.state_dict().values()),
            },
            "teacher": None if self.teacher is None else _of_teacher(self.teacher),
            "training": self.config.identity() | options,
            "data": data_fingerprint(self.data),
        }


def _of_teacher(teacher: Teacher) -> dict[str, Any]:
    return {
        "experts": list(teacher.mixture.experts),
        "weights of the experts": experts_digest(teacher.experts),
        "config": asdict(teacher.mixture.config),
        "scaling head": tensors_digest(teacher.mixture.head.state_dict().values()),
    }
