"""One mixture in one slot: its head, and where its gates go."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.vllm_plugin.gate_buffers import PLAIN, GateBuffers
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead
from loraplex.xlora.mixture import kept_scalings

_TOKENS_AT_ONCE = 1024  # bounds the memory of a long prompt's scalings, [tokens, layers, experts]


@dataclass(frozen=True, kw_only=True)
class SlotMixture:
    """A mixture that a slot's tokens go through, alone or in a link."""

    name: str
    config: XLoraConfig
    weight: float  # of the mixture in its link; of no effect in the scaling pass
    head: ScalingHead
    layer_of_module: Tensor  # [modules]  int64: the LoRA layer whose scalings a module takes; 0 where none
    first_column: int  # of its gate columns, one an expert

    @property
    def num_experts(self) -> int:
        return self.head.num_experts

    @property
    def pass_is_base(self) -> bool:
        """Whether the scaling pass is the base model's own."""
        return self.config.pass_value(self.num_experts) == 0

    @property
    def gate_columns(self) -> slice:
        return slice(self.first_column, self.first_column + self.num_experts)

    def write_pass_gates(self, buffers: GateBuffers, tokens: Tensor) -> None:  # [n] int64
        """The gates of the scaling pass: scaling_pass_value through the same top-k; the link's other parts are off."""
        value = self.config.pass_value(self.num_experts)
        scalings = torch.full((1, self.num_experts), value, device=buffers.gates.device)
        buffers.gates[:, tokens, PLAIN] = 0
        kept = kept_scalings(scalings, self.config) * self.config.global_scaling_weight
        buffers.gates[:, tokens, self.gate_columns] = kept[0]

    def write_gates(self, buffers: GateBuffers, tokens: Tensor, hidden: Tensor) -> None:  # [n], [n, hidden]
        """The gates of the main pass, predicted from the scaling pass's hidden states."""
        buffers.gates[:, tokens, PLAIN] = 1
        for part, states in zip(tokens.split(_TOKENS_AT_ONCE), hidden.split(_TOKENS_AT_ONCE), strict=True):
            kept = kept_scalings(self.head(states), self.config)  # [n, layers, experts]
            gates = kept * (self.weight * self.config.global_scaling_weight)
            buffers.gates[:, part, self.gate_columns] = gates.transpose(0, 1)[self.layer_of_module]
