"""An adapter in the form that slots take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraplex.adapters.packed import PackedLayers
from loraplex.adapters.store.slot_weights import SlotWeights


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter ready for a slot, by module index of the base model."""

    layers: Mapping[int, SlotWeights]
    invocation: tuple[int, ...] | None = None  # aLoRA: the tokens from which on it is active
    read_back: "Callable[[], PreparedAdapter] | None" = None  # reads it again, from a file that is as it was

    def to(self, device: torch.device) -> "PreparedAdapter":
        layers = {index: weights.to(device) for index, weights in self.layers.items()}
        return PreparedAdapter(layers=layers, invocation=self.invocation)

    @property
    def packed(self) -> PackedLayers | None:
        """Its layers, if all their tensors are in one buffer."""
        return self.layers if isinstance(self.layers, PackedLayers) else None

    @cached_property
    def dora_scaled(self) -> frozenset[int]:
        """The modules where DoRA takes a share of the base output."""
        if self.packed is not None:
            return self.packed.dora_scaled
        return frozenset(index for index, weights in self.layers.items() if weights.dora_scale is not None)

    @cached_property
    def max_rank(self) -> int:
        if self.packed is not None:
            return self.packed.max_rank
        return max((weights.lora_a.shape[0] for weights in self.layers.values()), default=0)

    @cached_property
    def num_bytes(self) -> int:
        if self.packed is not None:
            return self.packed.num_bytes
        return sum(weights.num_bytes for weights in self.layers.values())

    @cached_property
    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:  # [modules], [modules, 3], [modules]
        """The modules, and what the table has for each: addresses and rank, and the LoRA scaling."""
        if self.packed is not None:
            return self.packed.addresses()
        rows = [(w.lora_a.data_ptr(), w.lora_b.data_ptr(), w.lora_a.shape[0]) for w in self.layers.values()]
        scalings = [w.scaling for w in self.layers.values()]
        indices = torch.tensor(list(self.layers), dtype=torch.int64)
        return indices, torch.tensor(rows, dtype=torch.int64).view(-1, 3), torch.tensor(scalings, dtype=torch.float32)
