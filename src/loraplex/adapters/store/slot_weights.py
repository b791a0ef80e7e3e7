"""One module's share of an adapter, as the kernels read it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SlotWeights:
    """One module's factors as the kernels want them: contiguous, in the base model's dtype."""

    lora_a: Tensor  # [num_experts * rank, in]; [rank, vocab] for an embedding
    lora_b: Tensor  # [num_experts * rank, out]; for DoRA multiplied by c per output
    scaling: float
    dora_scale: Tensor | None = None  # [out], c - 1 of DoRA: the share of the base output to add
    num_experts: int = 1  # of a feed-forward layer, stacked one after the other

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0] // self.num_experts

    def expert(self, index: int) -> tuple[Tensor, Tensor]:  # [rank, in], [rank, out]
        """The factors of one of the stacked experts."""
        rows = slice(index * self.rank, (index + 1) * self.rank)
        return self.lora_a[rows], self.lora_b[rows]

    @property
    def num_bytes(self) -> int:
        tensors = [self.lora_a, self.lora_b] + ([] if self.dora_scale is None else [self.dora_scale])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> "SlotWeights":
        return SlotWeights(
            lora_a=self.lora_a.to(device),
            lora_b=self.lora_b.to(device),
            scaling=self.scaling,
            dora_scale=None if self.dora_scale is None else self.dora_scale.to(device),
            num_experts=self.num_experts,
        )
