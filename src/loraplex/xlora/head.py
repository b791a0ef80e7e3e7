"""The scaling head: from a token's hidden state to one scaling for each LoRA layer and expert."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from loraplex.xlora.config import XLoraConfig


class ScalingHead(nn.Module):
    """PEFT's `XLoraClassifier` without the model around it: same layers, same names, same first weights by seed.

    scalings = softmax(layers(hidden) / temperature), the softmax over the experts (X-LoRA, arXiv 2402.07148).
    """

    def __init__(
        self,
        config: XLoraConfig,
        *,
        hidden_size: int,
        num_experts: int,
        num_layers: int,  # LoRA layers: modules that at least one expert adapts
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises ConfigError if `config` asks for more experts than there are."""
        super().__init__()
        config.check_num_experts(num_experts)
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_layers = num_layers
        sizes = [hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers.append(nn.Linear(size_in, size_out, config.use_bias))
            if config.enable_relu_and_dropout:
                layers.append(nn.ReLU())
            if _has_dropout(config):
                layers.append(nn.Dropout(config.xlora_dropout_p))
        layers.append(nn.Linear(sizes[-1], num_outputs(config, num_experts, num_layers), config.use_bias))
        self.layers = nn.Sequential(*layers)
        self.to(device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:  # [..., hidden] -> [..., num_layers, num_experts], float32
        """The scalings of each token; not layerwise, all layers share one row of memory (stride 0)."""
        dtype = next(self.parameters()).dtype
        num_rows = self.num_layers if self.config.layerwise_scalings else 1
        scalings = self.layers(hidden.to(dtype)).float().unflatten(-1, (num_rows, self.num_experts))
        if self.config.enable_softmax:
            scalings = torch.softmax(scalings / self.config.softmax_temperature, dim=-1)
        return scalings.expand(*hidden.shape[:-1], self.num_layers, self.num_experts)


def linear_indices(config: XLoraConfig) -> list[int]:
    """Where the linear layers stand in `ScalingHead.layers`; ReLU and dropout take places between them."""
    stride = 1 + config.enable_relu_and_dropout + _has_dropout(config)
    return [stride * layer for layer in range(config.xlora_depth)]


def num_outputs(config: XLoraConfig, num_experts: int, num_layers: int) -> int:
    """The width of the last linear layer, laid out as [layers, experts]."""
    return num_experts * num_layers if config.layerwise_scalings else num_experts


def _has_dropout(config: XLoraConfig) -> bool:
    return config.enable_relu_and_dropout and config.xlora_dropout_p > 0
