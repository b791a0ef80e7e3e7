"""Adding tensors of several adapters: prune each, elect signs, sum with weights (PEFT 0.21, utils/merge_utils.py).

TIES is arXiv 2306.01708, DARE is arXiv 2311.03099.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from loraplex.adapters.linking.combination import Combination


def combine(
    tensors: Sequence[Tensor],  # of one shape
    weights: Sequence[float],
    combination: Combination,
    generator: Generator,
) -> Tensor:
    """sum_i weights[i] * pruned(tensors[i]).

    With elected signs, over those tensors whose sign is the majority's, and divided by how many these are.
    """
    pruned = [prune(tensor, combination, generator) for tensor in tensors]
    if not combination.elects_signs:
        return _weighted_sum(pruned, weights)
    agreeing = agree(pruned, combination.majority_sign or "total")
    total = _weighted_sum([tensor * mask for tensor, mask in zip(pruned, agreeing, strict=True)], weights)
    counts = torch.stack(agreeing).sum(dim=0)
    return total / counts.clamp(min=1)


def prune(tensor: Tensor, combination: Combination, generator: Generator) -> Tensor:
    """The tensor with the values that the method leaves out set to zero."""
    density = combination.density
    if combination.pruning is None or density is None or density >= 1:
        return tensor
    if combination.pruning == "random":  # and what is kept stands for what isn't
        kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * kept / density
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    kept[largest] = 1
    return tensor * kept.view(tensor.shape)


def agree(tensors: Sequence[Tensor], majority_sign: str) -> list[Tensor]:
    """For each tensor, where its sign is that of the sum: of all values ("total"), or of all signs ("frequency")."""
    signs = [tensor.sign() for tensor in tensors]
    votes = torch.stack(signs if majority_sign == "frequency" else list(tensors)).sum(dim=0)
    majority = torch.where(votes >= 0, 1, -1)
    return [sign == majority for sign in signs]


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total
