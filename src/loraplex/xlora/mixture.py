"""A mixture in memory: experts, the scaling head, and the LoRA layers that the head has scalings for."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.head import ScalingHead


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """An X-LoRA under one name. Its experts are adapters of the store."""

    name: str
    experts: tuple[str, ...]  # adapter names in the head's order
    config: XLoraConfig
    head: ScalingHead
    modules: tuple[int, ...]  # of each LoRA layer, its module index in the base model
    layers: tuple[str, ...]  # of each LoRA layer, its module path
    num_modules: int  # of the base model
    owned: frozenset[str] = frozenset()  # experts that came with the mixture and leave with it

    @property
    def pass_value(self) -> float:
        """What the experts' scalings are during the scaling pass."""
        return self.config.pass_value(len(self.experts))

    def gates(self, scalings: Tensor, weights: Tensor) -> Tensor:
        """The gates [modules, rows * experts, copies, tokens] of scalings [rows, copies, tokens, lora_layers, experts].

        weight * global_scaling_weight * the scalings that top-k keeps, weights [rows]. Modules that no expert adapts
        get the first LoRA layer's gates, which nobody reads.
        """
        kept = kept_scalings(scalings, self.config).permute(
            3, 0, 4, 1, 2
        )  # [lora_layers, rows, experts, copies, tokens]
        gates = kept * (weights.to(kept.device) * self.config.global_scaling_weight).view(1, -1, 1, 1, 1)
        return gates[self._layer_of_module].flatten(1, 2)

    def pass_gates(self, num_rows: int, copies: int, num_tokens: int) -> Tensor:
        """The gates of the scaling pass: pass_value, through the same top-k as predicted scalings."""
        shape = (num_rows, copies, num_tokens, len(self.modules), len(self.experts))
        return self.gates(torch.full(shape, self.pass_value, device=self.head_device), torch.ones(num_rows))

    @property
    def head_device(self) -> torch.device:
        return next(self.head.parameters()).device

    @cached_property
    def _layer_of_module(self) -> Tensor:  # [modules]
        layers = torch.zeros(self.num_modules, dtype=torch.int64)
        layers[list(self.modules)] = torch.arange(len(self.modules))
        return layers


def lora_layers(adapted: Iterable[Iterable[int]]) -> tuple[int, ...]:
    """The LoRA layers of experts that adapt these modules: each module that at least one adapts, in module order."""
    return tuple(sorted({module for modules in adapted for module in modules}))


def kept_scalings(scalings: Tensor, config: XLoraConfig) -> Tensor:  # both [..., layers, experts]
    """The scalings that the LoRA layers use: PEFT's `get_maybe_topk_scalings`, for all layers at once.

    All but the top_k_lora largest become 0; the rest are not renormalised. With enable_softmax_topk follows a
    softmax over those that are not 0. `global_scaling_weight` is not in them. Scalings that all layers share
    (stride 0) are computed once.
    """
    if config.top_k_lora is None:
        return scalings
    if scalings.shape[-2] > 1 and scalings.stride(-2) == 0:
        return _keep_top(scalings[..., :1, :], config.top_k_lora, config.enable_softmax_topk).expand(scalings.shape)
    return _keep_top(scalings, config.top_k_lora, config.enable_softmax_topk)


def _keep_top(scalings: Tensor, k: int, softmax: bool) -> Tensor:
    indices = scalings.topk(k, dim=-1).indices
    kept = torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, indices, True)
    if not softmax:
        return scalings.masked_fill(~kept, 0)
    zero = ~kept | (scalings == 0)
    # A softmax of nothing but -inf is NaN, in the gradient even where the result is masked afterwards.
    fill = torch.where(zero.all(dim=-1, keepdim=True), 0.0, float("-inf")).to(scalings.dtype)
    return torch.softmax(torch.where(zero, fill, scalings), dim=-1).masked_fill(zero, 0)
