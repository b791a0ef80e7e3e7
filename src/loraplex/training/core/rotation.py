"""Matrices with orthogonal columns as products of reflections, whose factors are free to learn."""

import torch
from torch import Tensor


def reflections_of(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The factors [.., size, rank] and signs [.., rank] of which `orthogonal_columns` makes these [.., size, rank].

    The columns must be orthogonal and of length 1.
    """
    factors, tau = torch.geqrf(columns)
    signs = factors.diagonal(dim1=-2, dim2=-1).sign()
    return factors.tril(-1), torch.where(tau == 0, -signs, signs)


def orthogonal_columns(factors: Tensor, signs: Tensor) -> Tensor:  # [.., size, rank]
    """Orthogonal columns of length 1, whatever the factors below the diagonal are (Householder reflections)."""
    below = factors.tril(-1)
    tau = 2 / (1 + below.square().sum(dim=-2))
    return torch.linalg.householder_product(below, tau) * signs.unsqueeze(-2)
