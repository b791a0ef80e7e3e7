"""The addresses of every stacked expert in every slot: to the compiled kernel, an expert is a module."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights


class ExpertTable:
    """A table of slots as the kernel reads it, whose modules are single experts.

    It takes no memory before an adapter has stacked experts.
    """

    def __init__(self, num_slots: int, num_experts: Mapping[int, int], device: torch.device) -> None:
        """`num_experts` are those of each module (by index) that stacks some."""
        self._num_slots, self._device = num_slots, device
        self._num_experts = dict(num_experts)
        self._first: dict[int, int] = {}  # of a module's experts, among all
        self.width = 0  # experts of all modules
        for module, count in self._num_experts.items():
            self._first[module] = self.width
            self.width += count
        self._entries: Tensor | None = None  # [slots * width, 1, 3] int64: addresses of lora_a and lora_b, rank
        self._scalings: Tensor | None = None  # [slots * width, 1] float32

    def put(self, slot: int, layers: Mapping[int, SlotWeights]) -> None:
        """Let `slot` have the experts of an adapter's weights by module."""
        self.clear(slot)
        for module in self._num_experts.keys() & set(layers):
            entries, scalings = self._tensors()
            first = slot * self.width + self._first[module]
            cells = slice(first, first + self._num_experts[module])
            entries[cells, 0] = expert_entries(layers[module]).to(self._device)
            scalings[cells] = layers[module].scaling

    def clear(self, slot: int) -> None:
        if self._entries is not None:
            self._entries[slot * self.width : (slot + 1) * self.width] = 0

    def first_of(self, module: int) -> int:
        """Where the experts of a module begin in each slot's part of the table; -1: it has none."""
        return self._first.get(module, -1)

    def all(self) -> tuple[Tensor, Tensor]:  # [slots * width, 1, 3], [slots * width, 1]
        """The whole table: the experts of all modules and slots."""
        return self._tensors()

    def of_module(self, module: int) -> tuple[Tensor, Tensor]:  # [n, 1, 3], [n, 1]
        """The table from the first expert of a module on: its expert e in a slot is at slot * width + e."""
        entries, scalings = self._tensors()
        return entries[self._first[module] :], scalings[self._first[module] :]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._entries is None or self._scalings is None:
            count = self._num_slots * self.width
            self._scalings = torch.zeros(count, 1, dtype=torch.float32, device=self._device)
            self._entries = torch.zeros(count, 1, 3, dtype=torch.int64, device=self._device)
        return self._entries, self._scalings


def expert_entries(weights: SlotWeights) -> Tensor:  # [experts, 3] int64
    """Of each stacked expert the addresses of its factors, and the rank."""
    experts = torch.arange(weights.num_experts, dtype=torch.int64)
    columns = [
        factor.data_ptr() + experts * _bytes_of_one(factor, weights) for factor in (weights.lora_a, weights.lora_b)
    ]
    return torch.stack((*columns, torch.full_like(experts, weights.rank)), dim=1)


def _bytes_of_one(factor: Tensor, weights: SlotWeights) -> int:
    return weights.rank * factor.shape[1] * factor.element_size()
