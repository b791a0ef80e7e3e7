"""Optional terms of a mixture's loss; both are off by default, as in the paper (arXiv 2402.07148)."""

import torch
from torch import Tensor


def load_balance(scalings: Tensor) -> Tensor:  # [tokens, layers, experts] -> []
    """mean over layers of n * sum_i (mean over tokens of s_i)^2: 1 if all n experts are used equally, n if one is.

    The importance term of mixtures of experts (arXiv 1701.06538, section 4) in the normalisation of the Switch
    Transformer (arXiv 2101.03961, equation 4), on the scalings themselves.
    """
    importance = scalings.mean(dim=0)  # [layers, experts]
    return scalings.shape[-1] * importance.square().sum(dim=-1).mean()


def mean_entropy(scalings: Tensor) -> Tensor:  # [tokens, layers, experts] -> []
    """mean over tokens and layers of -sum_i s_i log s_i: 0 if every token uses one expert, log n if all equally."""
    return -torch.special.xlogy(scalings, scalings.clamp(min=1e-30)).sum(dim=-1).mean()
