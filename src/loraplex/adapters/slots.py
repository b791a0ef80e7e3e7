"""The device tier: numbered slots whose weights the kernels read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SlotWeights:
    """One module's factors as the kernels want them: contiguous, in the base model's dtype."""

    lora_a: Tensor  # [rank, in]; [rank, vocab] for an embedding
    lora_b: Tensor  # [rank, out]; for DoRA multiplied by c per output
    scaling: float
    gain: Tensor | None = None  # [out], c - 1 of DoRA: the share of the base output to add

    @property
    def num_bytes(self) -> int:
        tensors = [self.lora_a, self.lora_b] + ([] if self.gain is None else [self.gain])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> "SlotWeights":
        return SlotWeights(
            lora_a=self.lora_a.to(device),
            lora_b=self.lora_b.to(device),
            scaling=self.scaling,
            gain=None if self.gain is None else self.gain.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter ready for a slot, by module index of the base model."""

    layers: Mapping[int, SlotWeights]
    invocation: tuple[int, ...] | None = None  # aLoRA: the tokens from which on it is active

    @cached_property
    def gained(self) -> frozenset[int]:
        """The modules where DoRA takes a share of the base output."""
        return frozenset(index for index, weights in self.layers.items() if weights.gain is not None)

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.layers.values())


class Slots:
    """What each slot holds, as Python objects and as the table of addresses that the compiled kernel reads.

    Keeping addresses instead of one padded tensor lets every adapter have its own rank, and makes filling a
    slot from host memory on a CPU a matter of pointers: no weight is copied.
    """

    def __init__(self, num_slots: int, module_paths: Sequence[str], device: torch.device) -> None:
        self.module_index = {path: index for index, path in enumerate(module_paths)}
        self.device = device
        self.table = torch.zeros(num_slots, len(module_paths), 3, dtype=torch.int64)
        self.scalings = torch.zeros(num_slots, len(module_paths), dtype=torch.float32)
        self._held: list[PreparedAdapter | None] = [None] * num_slots

    @property
    def num_slots(self) -> int:
        return len(self._held)

    def put(self, slot: int, adapter: PreparedAdapter) -> None:
        """Let `slot` hold `adapter`; what it held before must not be in use."""
        held = PreparedAdapter(
            layers={index: weights.to(self.device) for index, weights in adapter.layers.items()},
            invocation=adapter.invocation,
        )
        indices = torch.tensor(list(held.layers), dtype=torch.int64)
        rows = [(w.lora_a.data_ptr(), w.lora_b.data_ptr(), w.lora_a.shape[0]) for w in held.layers.values()]
        self.table[slot] = 0
        self.table[slot, indices] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        self.scalings[slot, indices] = torch.tensor([w.scaling for w in held.layers.values()])
        self._held[slot] = held

    def clear(self, slot: int) -> None:
        self.table[slot] = 0
        self._held[slot] = None

    def held(self, slot: int) -> PreparedAdapter:
        adapter = self._held[slot]
        assert adapter is not None, f"slot {slot} is empty but a routing plan points to it"
        return adapter
