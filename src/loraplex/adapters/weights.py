"""An adapter in memory: one pair of low-rank factors for each module that it adapts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig

ModuleKind = Literal["linear", "embedding", "moe experts", "router"]


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """What a module of the base model takes and gives; an embedding's `in_features` is its vocabulary.

    The kinds "moe experts" and "router" are bare parameters, which `target_parameters` names: the stacked weights of a
    feed-forward layer's experts, of which each token takes some, and the weight of the router that chooses them.
    """

    kind: ModuleKind
    in_features: int
    out_features: int
    num_experts: int = 1  # stacked in one parameter

    @property
    def is_parameter(self) -> bool:
        """Whether it is a bare parameter, whose path ends with the parameter's name."""
        return self.kind in ("moe experts", "router")


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """One module's factors: y = W x + scaling * lora_b^T (lora_a x).

    `lora_b` is stored transposed against PEFT's file ([rank, out] instead of [out, rank]), so that both
    factors are read along contiguous rows when a few tokens are decoded. Of stacked experts, those of one follow those
    of another, in both factors.
    """

    kind: ModuleKind
    lora_a: Tensor  # [num_experts * rank, in]; [rank, vocab] for an embedding
    lora_b: Tensor  # [num_experts * rank, out]
    scaling: float  # alpha/r, or alpha/sqrt(r) for rsLoRA
    magnitude: Tensor | None = None  # [out], DoRA only
    bias: Tensor | None = None  # [out], of lora_B: y += scaling * bias
    num_experts: int = 1

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0] // self.num_experts

    @property
    def shape(self) -> ModuleShape:
        """The module that these weights fit."""
        return ModuleShape(
            kind=self.kind,
            in_features=self.lora_a.shape[1],
            out_features=self.lora_b.shape[1],
            num_experts=self.num_experts,
        )

    @property
    def num_bytes(self) -> int:
        tensors = (self.lora_a, self.lora_b, self.magnitude, self.bias)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "LoraWeights":
        """The same weights in another dtype; the DoRA magnitude stays in the dtype it has."""
        return LoraWeights(
            kind=self.kind,
            lora_a=self.lora_a.to(device, dtype),
            lora_b=self.lora_b.to(device, dtype),
            scaling=self.scaling,
            magnitude=None if self.magnitude is None else self.magnitude.to(device),
            num_experts=self.num_experts,
            bias=None if self.bias is None else self.bias.to(device, dtype),
        )


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of an embedding in the place of the base's."""

    tokens: tuple[int, ...]
    values: Tensor  # [tokens, hidden]


@dataclass(frozen=True, kw_only=True)
class FileOffsets:
    """Where a file has the factors."""

    file: Path
    num_bytes: int  # of the file
    starts: Mapping[str, tuple[int, int]]  # by module path: bytes before A [rank, in] and before B [out, rank]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter: its configuration and, by module path of the base model, its weights."""

    config: LoraConfig
    layers: Mapping[str, LoraWeights]
    places: FileOffsets | None = None  # of an adapter that was read from a file
    end_tokens: tuple[int, ...] = ()  # that end its answers, besides the base model's; none: not known
    replaced: Mapping[str, Tensor] = field(default_factory=dict)  # by the base's parameter path ("lm_head.weight")
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)  # by the embedding's module path

    @property
    def num_bytes(self) -> int:
        others = [*self.replaced.values(), *(rows.values for rows in self.token_rows.values())]
        return sum(weights.num_bytes for weights in self.layers.values()) + sum(
            tensor.numel() * tensor.element_size() for tensor in others
        )

    @property
    def has_factors_alone(self) -> bool:
        """Whether it brings nothing beside plain factors."""
        has_biases = any(weights.bias is not None for weights in self.layers.values())
        return not self.replaced and not self.token_rows and not has_biases and self.config.contents.is_empty

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Adapter":
        layers = {path: weights.to(dtype, device) for path, weights in self.layers.items()}
        replaced = {path: tensor.to(device, dtype) for path, tensor in self.replaced.items()}
        rows = {path: replace(own, values=own.values.to(device, dtype)) for path, own in self.token_rows.items()}
        return replace(self, layers=layers, places=None, replaced=replaced, token_rows=rows)
