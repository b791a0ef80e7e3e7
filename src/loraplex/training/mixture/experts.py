"""A mixture's experts side by side: two matrix products a LoRA layer, whatever their number."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.training.forward.routing import TrainingSlot, TrainingWeightProvider


class ExpertStack(NamedTuple):
    """The experts that adapt one module."""

    lora_a: Tensor  # [total_rank, in]
    lora_b: Tensor  # [total_rank, out]
    columns: Tensor  # [total_rank]  the expert of each rank row
    scalings: Tensor  # [total_rank]  its LoRA scaling


class Experts:
    """The weights of a mixture's experts, frozen or in training; slot i is the head's i-th expert."""

    def __init__(self, slots: Sequence[Mapping[int, SlotWeights]], *, frozen: bool) -> None:
        self.slots = slots
        self.frozen = frozen
        self.bank = TrainingWeightProvider([TrainingSlot(layers) for layers in slots])
        self._stacks: dict[int, ExpertStack] = {}

    @property
    def num_experts(self) -> int:
        return len(self.slots)

    def bank_with_dropout(self, probability: float, draw: torch.Generator) -> TrainingWeightProvider:
        """The same slots, each dropping what it reads."""
        return TrainingWeightProvider([TrainingSlot(layers, probability, draw) for layers in self.slots])

    def stack(self, module: int) -> ExpertStack:
        """The experts of one module; made once if they are frozen."""
        known = self._stacks.get(module)
        if known is None:
            known = self._make(module)
            if self.frozen:
                self._stacks[module] = known
        return known

    def _make(self, module: int) -> ExpertStack:
        pairs = [(expert, layers[module]) for expert, layers in enumerate(self.slots) if module in layers]
        ranks = [weights.lora_a.shape[0] for _, weights in pairs]
        device = pairs[0][1].lora_a.device
        rows = torch.tensor(ranks, device=device)
        return ExpertStack(
            lora_a=torch.cat([weights.lora_a for _, weights in pairs]),
            lora_b=torch.cat([weights.lora_b for _, weights in pairs]),
            columns=torch.tensor([expert for expert, _ in pairs], device=device).repeat_interleave(rows),
            scalings=torch.tensor([weights.scaling for _, weights in pairs], device=device).repeat_interleave(rows),
        )
