"""A mixture while it trains: a copy of its scaling head, and of its experts if they train too."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.layers.modules import embed_scale
from loraplex.models.mixture_folders import expert_at_rest
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.core.parameters import FlatTensors
from loraplex.training.core.train_state import TrainState
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import MixtureData
from loraplex.training.mixture.experts import Experts
from loraplex.xlora.formats.write_folder import write_mixture_folder
from loraplex.xlora.mixture import Mixture


class MixtureState(TrainState):
    """The parameters in training; the mixture itself changes only when they are given back to it."""

    def __init__(self, model: MultiLoraModel, mixture: Mixture, data: MixtureData, config: MixtureTrainConfig) -> None:
        self.mixture = mixture
        self.data = data
        self.config = config
        self.head = copy.deepcopy(mixture.head)
        self.adapters = trainable_adapters(model, mixture)
        named = dict(self.head.named_parameters())
        factors = [f for layer in _layers(self.adapters) for f in (layer.lora_a, layer.lora_b)]
        tensors = FlatTensors([*named.values(), *factors], model.base.device)
        for name, view in zip(named, tensors.views, strict=False):
            owner, _, leaf = name.rpartition(".")
            setattr(self.head.get_submodule(owner), leaf, view)
        self.factors = tensors.views[len(named) :]
        self.experts = (
            Experts(trained_slots(model, self.adapters, self.factors), frozen=False)
            if self.adapters
            else Experts(frozen_slots(model, mixture), frozen=True)
        )
        super().__init__(
            "mixture", mixture.name, config, tensors.flat, data.num_steps, has_held_out=bool(data.held_out)
        )

    def trained_experts(self) -> dict[str, Adapter]:
        """The experts as they are now, by name; none if they are frozen."""
        factors = iter(self.factors)
        trained = {}
        for name, adapter in self.adapters.items():
            layers = {
                path: LoraWeights(
                    kind=layer.kind, lora_a=_copy(next(factors)), lora_b=_copy(next(factors)), scaling=layer.scaling
                )
                for path, layer in adapter.layers.items()
            }
            trained[name] = Adapter(config=adapter.config, layers=layers, end_tokens=adapter.end_tokens)
        return trained


def write_last_good(model: MultiLoraModel, state: MixtureState, folder: Path) -> None:
    """Write the mixture with the weights in training, whatever the one in memory has."""
    trained = state.trained_experts()
    experts = {
        expert.removeprefix(f"{state.name}/"): trained.get(expert) or expert_at_rest(model.store.version(expert))
        for expert in state.mixture.experts
    }
    write_mixture_folder(
        folder,
        layout=state.config.layout,
        config=state.mixture.config,
        hidden_size=state.head.hidden_size,
        head_state=state.head.state_dict(),
        experts=experts,
        base_model_name=None,
        overwrite=True,
    )


def frozen_slots(model: MultiLoraModel, mixture: Mixture) -> list[Mapping[int, SlotWeights]]:
    """The experts' weights as they serve requests, on the base model's device."""
    with model.store.lease(mixture.experts) as leased:
        slots = []
        for name in mixture.experts:
            slot = leased[name].slot
            assert slot is not None, f"{name!r} is leased but in no slot"
            slots.append(model.store.slots.held(slot).layers)  # tensors that stay when the lease ends
        return slots


def trainable_adapters(model: MultiLoraModel, mixture: Mixture) -> dict[str, Adapter]:
    """The experts at rest, to start training from; none unless the mixture trains them."""
    if not mixture.config.use_trainable_adapters:
        return {}
    at_rest = {name: expert_at_rest(model.store.version(name)) for name in mixture.experts}
    return {name: read_adapter(found) if isinstance(found, Path) else found for name, found in at_rest.items()}


def trained_slots(
    model: MultiLoraModel, adapters: Mapping[str, Adapter], factors: Sequence[nn.Parameter]
) -> list[Mapping[int, SlotWeights]]:
    """The factors in training as slots; the LoRA scaling includes an embedding's own scale."""
    left = iter(factors)
    slots: list[Mapping[int, SlotWeights]] = []
    for adapter in adapters.values():
        slot = {}
        for path, layer in adapter.layers.items():
            scale = embed_scale(model.adaptable.modules[path]) if layer.kind == "embedding" else 1.0
            weights = SlotWeights(lora_a=next(left), lora_b=next(left), scaling=layer.scaling * scale)
            slot[model.adaptable.module_index[path]] = weights
        slots.append(slot)
    return slots


def _layers(adapters: Mapping[str, Adapter]) -> list[LoraWeights]:
    return [layer for adapter in adapters.values() for layer in adapter.layers.values()]


def _copy(factor: Tensor) -> Tensor:
    return factor.detach().cpu().clone()
