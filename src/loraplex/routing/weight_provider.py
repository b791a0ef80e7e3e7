"""Where a routing plan finds the weights of its slots: the store's slots, or adapters in training."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from loraplex.adapters.store.expert_table import ExpertTable
from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots


class WeightProvider(Protocol):
    """Weights by slot and module index."""

    @property
    def trainable(self) -> bool:
        """Whether gradients flow into the weights."""
        ...

    def layers(self, slot: int) -> Mapping[int, SlotWeights]:
        """The modules that the slot's adapter adapts, with its weights there."""
        ...

    def dora_scaled(self, slot: int) -> frozenset[int]:
        """The modules where the slot's adapter, a DoRA, takes a share of the base output."""
        ...

    def changes(self, slot: int) -> Mapping[str, ModuleChange]:
        """By path, what the slot's adapter changes about modules' own weights."""
        ...

    def dropout(self, slot: int) -> tuple[float, torch.Generator | None]:
        """The slot's dropout probability and the generator that draws it."""
        ...

    def max_rank(self, slot: int) -> int:
        """The largest rank of the slot's factors."""
        ...

    def native_table(self) -> tuple[Tensor, Tensor] | None:
        """Addresses [slots, modules, 3] and LoRA scalings [slots, modules] for the compiled kernels, if kept."""
        ...

    def expert_table(self) -> ExpertTable | None:
        """The same for single experts of feed-forward layers, if kept."""
        ...


class SlotWeightProvider:
    """The store's slots as a bank: frozen weights."""

    trainable = False

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def layers(self, slot: int) -> Mapping[int, SlotWeights]:
        return self._slots.held(slot).layers

    def dora_scaled(self, slot: int) -> frozenset[int]:
        return self._slots.held(slot).dora_scaled

    def changes(self, slot: int) -> Mapping[str, ModuleChange]:
        return self._slots.held(slot).changes

    def num_tokens(self, slot: int) -> int | None:
        """How many tokens have logits in the slot's rows; None: those of the base model."""
        return self._slots.held(slot).num_tokens

    def dropout(self, slot: int) -> tuple[float, torch.Generator | None]:
        return 0.0, None

    def max_rank(self, slot: int) -> int:
        return self._slots.held(slot).max_rank

    def native_table(self) -> tuple[Tensor, Tensor] | None:
        return self._slots.table, self._slots.scalings

    def expert_table(self) -> ExpertTable | None:
        return self._slots.experts
