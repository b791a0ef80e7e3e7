"""What a mixture's run trains: a copy of its head or router, and of its experts if they train too."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter
from loraplex.models.mixture_folders import expert_at_rest
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.core.parameters import FlatTensors, copied_layers, factors_of, slot_weights
from loraplex.training.core.run_fingerprint import tensors_digest
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.routing import Experts


class MixtureParameters:
    """The parameters in training; the mixture itself changes only when they are given back to it."""

    def __init__(
        self,
        model: MultiLoraModel,
        module: nn.Module,  # a copy of the head or router, whose parameters become views of one flat tensor
        experts: Sequence[str],
        *,
        train_experts: bool,
    ) -> None:
        self._model = model
        self._names = experts
        self.adapters = _at_rest(model, experts) if train_experts else {}
        named = dict(module.named_parameters())
        factors = [factor for adapter in self.adapters.values() for factor in factors_of(adapter.layers)]
        tensors = FlatTensors([*named.values(), *factors], model.base.device)
        self.flat = tensors.flat
        for name, view in zip(named, tensors.views, strict=False):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, view)
        self.factors = self._by_expert(tensors.views[len(named) :])
        slots = [slot_weights(self.adapters[name].layers, own, model.adaptable) for name, own in self.factors.items()]
        self.experts = Experts(slots or frozen_slots(model, experts), frozen=not slots)

    def trained_experts(self) -> dict[str, Adapter]:
        """The experts as they are now, by name; none if they are frozen."""
        return {
            name: Adapter(
                config=adapter.config,
                layers=copied_layers(adapter.layers, self.factors[name]),
                end_tokens=adapter.end_tokens,
            )
            for name, adapter in self.adapters.items()
        }

    def all_experts(self, mixture: str) -> dict[str, Adapter | Path]:
        """Trained ones and those at rest, in order, by their names in the mixture's folder."""
        trained = self.trained_experts()
        return {
            expert.removeprefix(f"{mixture}/"): trained.get(expert) or expert_at_rest(self._model.store.version(expert))
            for expert in self._names
        }

    def replace_trained(self) -> None:
        """Give the model the experts as they are now."""
        for name, adapter in self.trained_experts().items():
            self._model.load_adapter(name, adapter, replace=True)

    def _by_expert(self, factors: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        left = iter(factors)
        return {name: list(islice(left, 2 * len(adapter.layers))) for name, adapter in self.adapters.items()}


def experts_digest(experts: Experts) -> str:
    """Of all their factors."""
    return tensors_digest(
        factor
        for layers in experts.slots
        for index in sorted(layers)
        for factor in (layers[index].lora_a, layers[index].lora_b)
    )


def data_fingerprint(data: MixtureData) -> dict[str, Any]:
    """What tells a mixture's data apart, in JSON's types."""
    return {
        "names": list(data.names),
        "content": data.digest,
        "records in an epoch": list(data.per_epoch),
        "num_steps": data.num_steps,
    }


def frozen_slots(model: MultiLoraModel, experts: Sequence[str]) -> list[Mapping[int, SlotWeights]]:
    """The experts' weights as they serve requests, on the base model's device."""
    with model.store.lease(experts) as leased:
        slots = []
        for name in experts:
            slot = leased[name].slot
            assert slot is not None, f"{name!r} is leased but in no slot"
            slots.append(model.store.slots.held(slot).layers)  # tensors that stay when the lease ends
        return slots


def _at_rest(model: MultiLoraModel, experts: Sequence[str]) -> dict[str, Adapter]:
    """The experts at rest, to start training from."""
    at_rest = {name: expert_at_rest(model.store.version(name)) for name in experts}
    return {name: read_adapter(found) if isinstance(found, Path) else found for name, found in at_rest.items()}
