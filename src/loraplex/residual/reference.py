"""The formula of residual adapters, written as it stands: the oracle for the path that runs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.residual.modules import LinkedLayer


def linked_residual_reference(
    x: Tensor,  # [tokens, hidden]
    attention: Tensor,  # [heads, tokens, tokens]
    weights: LinkedLayer,
    scaling: float,  # weight * alpha/r
) -> Tensor:  # [tokens, hidden]  float64
    """One LinkedResidual at one layer of one row, as loops over tokens, rank rows, heads and keys."""
    num_heads, num_tokens, _ = attention.shape
    a, b = weights.a.double(), weights.b.double()
    x, attention = x.double(), attention.double()
    residual = torch.zeros(num_tokens, b.shape[1], dtype=torch.float64)
    for k in range(weights.rank):
        exponentials = [math.exp(float(logit)) for logit in weights.head_logits[k]]
        mix = [value / sum(exponentials) for value in exponentials]
        u = [float(a[k] @ x[s]) for s in range(num_tokens)]
        for t in range(num_tokens):
            v = 0.0
            for s in range(num_tokens):
                w = sum(mix[h] * float(attention[h, t, s]) for h in range(num_heads))
                v += w * u[s]
            residual[t] += scaling * v * b[k]
    return residual


def chain_reference(
    x: Tensor,  # [tokens, hidden]
    attention: Tensor,  # [heads, tokens, tokens]
    chain: Sequence[tuple[LinkedLayer, float]],  # weights and weight * alpha/r, in the order of the link
) -> Tensor:  # [tokens, hidden]  float64, the sum of all residuals
    """Linked residuals at one layer: each reads x with the residuals of those before it added."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for weights, scaling in chain:
        total = total + linked_residual_reference(x.double() + total, attention, weights, scaling)
    return total
