"""What a job trains, a LoRA or a linked residual: first weights, float32 parameters, and the adapter they make."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.format import write_residual
from loraplex.residual.modules import LinkedLayer, LinkedResidual, ResidualConfig, fresh_linked_layer
from loraplex.training.adapters.starts import change_since, doubled
from loraplex.training.core.parameters import FlatTensors, copied_layers, factors_of, slot_weights
from loraplex.training.core.rng import Purpose, generator


class Trainable(Protocol):
    """The parameters of one adapter; `flat` and its gradient hold them all."""

    flat: nn.Parameter
    rank: int
    paths: Sequence[str]  # of adapted modules
    slot_weights: Mapping[int, SlotWeights]  # by module index: how LoRA layers see the parameters
    residual: LinkedResidual | None  # whose weights are the parameters: how attention layers see them

    def write(self, folder: Path, end_tokens: tuple[int, ...]) -> None:
        """Write the adapter as it is now, in its format."""
        ...


class TrainableLora:
    """A LoRA in training."""

    residual: LinkedResidual | None = None

    def __init__(
        self,
        config: LoraConfig,
        layers: Mapping[str, LoraWeights],
        adaptable: AdaptableModel,
        device: torch.device,
        *,
        writes_change: bool = False,  # since the first weights (starts.py)
    ) -> None:
        self.rank = config.r
        self.paths: Sequence[str] = list(layers)
        self._config = config
        self._first = layers
        self._writes_change = writes_change
        tensors = FlatTensors(factors_of(layers), device)
        self.flat, self._factors = tensors.flat, tensors.views
        self.slot_weights: Mapping[int, SlotWeights] = slot_weights(layers, self._factors, adaptable)

    def layers(self) -> dict[str, LoraWeights]:
        """A copy of the factors as they are now."""
        return copied_layers(self._first, self._factors)

    def write(self, folder: Path, end_tokens: tuple[int, ...]) -> None:
        config, layers = self._config, self.layers()
        if self._writes_change:
            config = doubled(config)
            scalings = config.scalings_of(tuple(layers))  # the square root of rsLoRA rounds
            changes = {path: change_since(self._first[path], layer) for path, layer in layers.items()}
            layers = {path: replace(change, scaling=scalings[path]) for path, change in changes.items()}
        adapter = Adapter(config=config, layers=layers, end_tokens=end_tokens)
        write_adapter(adapter, folder, overwrite=True)


class TrainableResidual:
    """A linked residual in training."""

    paths: Sequence[str] = ()

    def __init__(self, first: LinkedResidual, device: torch.device) -> None:
        self.rank = first.config.r
        self.slot_weights: Mapping[int, SlotWeights] = {}
        self._first = first
        tensors = FlatTensors([f for w in first.layers.values() for f in (w.a, w.b, w.head_logits)], device)
        self.flat, self._factors = tensors.flat, tensors.views
        self.residual: LinkedResidual | None = self._made_of(self._factors)

    def write(self, folder: Path, end_tokens: tuple[int, ...]) -> None:
        trained = self._made_of([factor.detach().cpu().clone() for factor in self._factors])
        write_residual(replace(trained, end_tokens=end_tokens), folder, overwrite=True)

    def _made_of(self, factors: Sequence[Tensor]) -> LinkedResidual:
        layers: Mapping[int, LinkedLayer] = {
            layer: LinkedLayer(a=factors[3 * n], b=factors[3 * n + 1], head_logits=factors[3 * n + 2])
            for n, layer in enumerate(self._first.layers)
        }
        return LinkedResidual(config=self._first.config, layers=layers, base=self._first.base)


def fresh_weights(
    shapes: Mapping[str, ModuleShape], ranks: Mapping[str, int], scalings: Mapping[str, float], seed: int
) -> dict[str, LoraWeights]:
    """First weights for the modules in `ranks`, drawn from the seed in their order."""
    draw = generator(seed, Purpose.WEIGHTS)
    layers = {}
    for path, rank in ranks.items():
        lora_a, lora_b = _fresh_factors(shapes[path], rank, draw)
        layers[path] = LoraWeights(kind=shapes[path].kind, lora_a=lora_a, lora_b=lora_b, scaling=scalings[path])
    return layers


def _fresh_factors(module: ModuleShape, rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """PEFT's first weights: lora_a uniform (Kaiming, a = sqrt 5) and lora_b 0; for an embedding 0 and normal."""
    lora_a, lora_b = torch.zeros(rank, module.in_features), torch.zeros(rank, module.out_features)
    if module.kind == "embedding":
        return lora_a, lora_b.normal_(generator=draw)
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=draw)
    return lora_a, lora_b


def fresh_residual(
    config: ResidualConfig, identity: BaseFingerprint, layers: Sequence[int], seed: int
) -> LinkedResidual:
    """First weights for `layers`, drawn from the seed in their order."""
    draw = generator(seed, Purpose.WEIGHTS)
    weights = {
        layer: fresh_linked_layer(identity.hidden_size, identity.num_heads[layer], config.r, draw) for layer in layers
    }
    return LinkedResidual(config=config, layers=weights, base=identity)
