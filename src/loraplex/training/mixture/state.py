"""A mixture while it trains: a copy of its scaling head, and of its experts if they train too."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, LoraplexError
from loraplex.models.mixture_folders import expert_at_rest
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.core.parameters import FlatTensors, copied_layers, factors_of, slot_weights
from loraplex.training.core.run_fingerprint import base_fingerprint, tensors_digest
from loraplex.training.core.train_state import Optimizer, TrainState
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.routing import Experts
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
        self.adapters = _trainable_adapters(model, mixture)
        named = dict(self.head.named_parameters())
        factors = [factor for adapter in self.adapters.values() for factor in factors_of(adapter.layers)]
        tensors = FlatTensors([*named.values(), *factors], model.base.device)
        for name, view in zip(named, tensors.views, strict=False):
            owner, _, leaf = name.rpartition(".")
            setattr(self.head.get_submodule(owner), leaf, view)
        self.factors = self._by_expert(tensors.views[len(named) :])
        slots = [slot_weights(self.adapters[name].layers, own, model.adaptable) for name, own in self.factors.items()]
        self.experts = Experts(slots or _frozen_slots(model, mixture), frozen=not slots)
        super().__init__(
            "mixture",
            mixture.name,
            Optimizer(tensors.flat, config.optimizer, data.num_steps),
            config.evaluation,
            data.num_steps,
            has_held_out=bool(data.held_out),
        )

    @property
    def title(self) -> str:
        return f"{self.experts.num_experts} experts"

    @property
    def num_truncated(self) -> int:
        return sum(example.num_truncated > 0 for examples in self.data.train for example in examples)

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
        for name, adapter in self._trained_experts().items():
            self._model.load_adapter(name, adapter, replace=True)
        self.mixture.head.load_state_dict(self.head.state_dict())
        self._model.save_mixture(self.name, folder, layout=self.config.layout, overwrite=True)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
        factors = (
            factor
            for layers in self.experts.slots
            for index in sorted(layers)
            for factor in (layers[index].lora_a, layers[index].lora_b)
        )
        return {
            "base model": base_fingerprint(self._model.base),
            "mixture": {
                "name": self.name,
                "experts": list(self.mixture.experts),
                "weights of the experts": tensors_digest(factors),
                "config": asdict(self.mixture.config),
                "first weights of the scaling head": tensors_digest(self.mixture.head.state_dict().values()),
            },
            "training": self.config.identity(),
            "data": {
                "names": list(self.data.names),
                "content": self.data.digest,
                "records in an epoch": list(self.data.per_epoch),
                "num_steps": self.data.num_steps,
            },
        }

    def _by_expert(self, factors: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        left = iter(factors)
        return {name: list(islice(left, 2 * len(adapter.layers))) for name, adapter in self.adapters.items()}

    def _trained_experts(self) -> dict[str, Adapter]:
        """The experts as they are now, by name; none if they are frozen."""
        return {
            name: Adapter(
                config=adapter.config,
                layers=copied_layers(adapter.layers, self.factors[name]),
                end_tokens=adapter.end_tokens,
            )
            for name, adapter in self.adapters.items()
        }

    def _write_last_good(self, folder: Path) -> None:
        """Write the mixture with the weights in training, whatever the one in memory has."""
        trained = self._trained_experts()
        experts = {
            expert.removeprefix(f"{self.name}/"): trained.get(expert)
            or expert_at_rest(self._model.store.version(expert))
            for expert in self.mixture.experts
        }
        write_mixture_folder(
            folder,
            layout=self.config.layout,
            config=self.mixture.config,
            hidden_size=self.head.hidden_size,
            head_state=self.head.state_dict(),
            experts=experts,
            base_model_name=None,
            overwrite=True,
        )


def _frozen_slots(model: MultiLoraModel, mixture: Mixture) -> list[Mapping[int, SlotWeights]]:
    """The experts' weights as they serve requests, on the base model's device."""
    with model.store.lease(mixture.experts) as leased:
        slots = []
        for name in mixture.experts:
            slot = leased[name].slot
            assert slot is not None, f"{name!r} is leased but in no slot"
            slots.append(model.store.slots.held(slot).layers)  # tensors that stay when the lease ends
        return slots


def _trainable_adapters(model: MultiLoraModel, mixture: Mixture) -> dict[str, Adapter]:
    """The experts at rest, to start training from; none unless the mixture trains them."""
    if not mixture.config.use_trainable_adapters:
        return {}
    at_rest = {name: expert_at_rest(model.store.version(name)) for name in mixture.experts}
    return {name: read_adapter(found) if isinstance(found, Path) else found for name, found in at_rest.items()}
