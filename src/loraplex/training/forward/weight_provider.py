"""Where the LoRA layers find adapters in training: by slot, with a dropout of its own for each row."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights


class TrainingSlot(NamedTuple):
    """One adapter in training; rows with dropout each have a slot, whose generator no other row draws from."""

    layers: Mapping[int, SlotWeights]  # by module index; factors are float32 parameters
    dropout: float = 0.0
    generator: torch.Generator | None = None


class TrainingWeightProvider:
    """The slots of one forward pass, as a routing plan wants them (routing/weight_provider.py)."""

    trainable = True

    def __init__(self, slots: Sequence[TrainingSlot]) -> None:
        self._slots = slots

    def layers(self, slot: int) -> Mapping[int, SlotWeights]:
        return self._slots[slot].layers

    def dora_scaled(self, slot: int) -> frozenset[int]:
        return frozenset(index for index, weights in self._slots[slot].layers.items() if weights.dora_scale is not None)

    def dropout(self, slot: int) -> tuple[float, torch.Generator | None]:
        return self._slots[slot].dropout, self._slots[slot].generator

    def max_rank(self, slot: int) -> int:
        return max((weights.lora_a.shape[0] for weights in self._slots[slot].layers.values()), default=0)

    def native_table(self) -> tuple[Tensor, Tensor] | None:
        return None
