"""How much the updates of several adapters have in common, without forming any of them.

<U, V> = sum over modules of trace(U^T V), for U = s B A and V = t D C:
s t * sum of the entries of (A C^T) * (B^T D), both [rank of U, rank of V].
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraplex.adapters.weights import Adapter, LoraWeights


def update_products(adapters: Sequence[Adapter]) -> Tensor:  # [adapters, adapters] float64
    """The products <U, V> of all pairs; the roots of the diagonal are the norms. DoRA counts without its magnitude."""
    products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters[: i + 1]):
            products[i, j] = products[j, i] = _product(one.layers, other.layers)
    return products


def cosines(products: Tensor) -> Tensor:  # [adapters, adapters] -> the same
    """The cosines of the angles between updates; 0 where one is 0."""
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0)


def _product(one: Mapping[str, LoraWeights], other: Mapping[str, LoraWeights]) -> float:
    shared = [path for path in one if path in other and one[path].shape == other[path].shape]
    return sum(_of_module(one[path], other[path]) for path in shared)


def _of_module(u: LoraWeights, v: LoraWeights) -> float:
    of_a = _pairs(u.lora_a, v.lora_a, u.num_experts)
    of_b = _pairs(u.lora_b, v.lora_b, u.num_experts)
    return u.scaling * v.scaling * float((of_a * of_b).sum())


def _pairs(one: Tensor, other: Tensor, num_experts: int) -> Tensor:  # [experts, rank, rank of the other]
    first, second = (factor.double().unflatten(0, (num_experts, -1)) for factor in (one, other))
    return first @ second.transpose(1, 2)
