"""A linear router while it trains, and its experts if they train too."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routers.folder import read_router_folder, write_router_folder
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.router import LinearRouter
from loraplex.training.core.config import flat_options
from loraplex.training.core.run_fingerprint import tensors_digest
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.parameters import experts_digest
from loraplex.training.mixture.state import ExpertsState
from loraplex.training.routers.first_weights import set_first_weights
from loraplex.training.routers.teacher import Teacher


class RouterState(ExpertsState[LinearRouter]):
    """A mixture with a linear router in training, which an X-LoRA may teach."""

    layout = None  # loraplex's own

    def __init__(
        self,
        model: MultiLoraModel,
        mixture: RoutedMixture,
        data: MixtureData,
        config: MixtureTrainConfig,
        teacher: Teacher | None,
    ) -> None:
        router = mixture.router
        assert isinstance(router, LinearRouter), "other routers are refused"
        self.mixture = mixture
        self.teacher = teacher
        self.router = router.copy()
        super().__init__(
            model,
            mixture.name,
            tuple(mixture.experts),
            router,
            self.router,
            data,
            config,
            train_experts=config.router.train_experts,
        )
        set_first_weights(self.router, config.router.first_weights, self.experts, config.seed)

    @property
    def title(self) -> str:
        return f"router of {self.experts.num_experts} experts"

    def read_folder(self, folder: Path) -> object:
        return read_router_folder(folder)

    def write_last_good(self, folder: Path) -> None:
        last_good = replace(self.mixture, router=self.router)
        experts = self.parameters.all_experts(self.name)
        write_router_folder(folder, last_good, experts, base_model_name=None, overwrite=True)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
        options = {name: value for name, value in flat_options(self.config.router).items() if name != "teacher"}
        found = self.fingerprint_of(self.router.config, "first weights of the router")
        found["training"] |= options
        return found | {"teacher": None if self.teacher is None else _of_teacher(self.teacher)}


def _of_teacher(teacher: Teacher) -> dict[str, Any]:
    return {
        "experts": list(teacher.mixture.experts),
        "weights of the experts": experts_digest(teacher.experts),
        "config": asdict(teacher.mixture.config),
        "scaling head": tensors_digest(teacher.mixture.head.state_dict().values()),
    }
