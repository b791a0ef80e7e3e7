"""Several adapters as one LoRA: their factors side by side, their weights folded into B."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.weights import Adapter, LoraWeights


@dataclass(frozen=True, kw_only=True)
class LinkMember:
    """One adapter in a concatenation, and the rank columns that it owns in every module."""

    adapter: Adapter
    weight: float
    first: int  # of its columns

    @property
    def rank(self) -> int:
        """Its largest rank over modules: where it has less, its other columns are zero."""
        return max(weights.rank for weights in self.adapter.layers.values())


def index_members(adapters: Sequence[tuple[Adapter, float]]) -> tuple[LinkMember, ...]:
    """Give each adapter the columns after those of the one before it."""
    parts: list[LinkMember] = []
    for adapter, weight in adapters:
        first = parts[-1].first + parts[-1].rank if parts else 0
        parts.append(LinkMember(adapter=adapter, weight=weight, first=first))
    return tuple(parts)


def total_rank(parts: Sequence[LinkMember]) -> int:
    return sum(part.rank for part in parts)


def concatenate(parts: Sequence[LinkMember], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """By module path, A [rank, in] and B [out, rank] of the whole: B A x = sum_i weight_i * scaling_i * B_i A_i x.

    A column means the same adapter in every module, so that one gate a column can stand for it.
    """
    paths = dict.fromkeys(path for part in parts for path in part.adapter.layers)
    return {path: _concatenate_module(path, parts, dtype) for path in paths}


def _concatenate_module(path: str, parts: Sequence[LinkMember], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    of_parts: Mapping[int, LoraWeights] = {
        part.first: part.adapter.layers[path] for part in parts if path in part.adapter.layers
    }
    any_weights = next(iter(of_parts.values()))
    lora_a = torch.zeros(total_rank(parts), any_weights.lora_a.shape[1], dtype=dtype)
    lora_b = torch.zeros(any_weights.lora_b.shape[1], total_rank(parts), dtype=dtype)
    for part in parts:
        weights = of_parts.get(part.first)
        if weights is None:
            continue
        columns = slice(part.first, part.first + weights.rank)
        lora_a[columns] = weights.lora_a.to(dtype)
        # scaled before it is rounded: once, not twice
        lora_b[:, columns] = (weights.lora_b.float() * (part.weight * weights.scaling)).t().to(dtype)
    return lora_a, lora_b
