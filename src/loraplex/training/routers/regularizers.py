"""Optional terms of a router's loss, of one LoRA layer's tokens; all are off by default.

Each is a sum over tokens that the caller divides by their number, so that a step's forward passes add up to its mean.
"""

import torch
from torch import Tensor


def switch_load_balance(probabilities: Tensor, fractions: Tensor, num_experts: int) -> Tensor:
    """n * sum_i f_i * (sum over tokens of p_i): over the tokens' number, 1 if the layer's n experts are used equally.

    probabilities [tokens, experts], those of experts that don't adapt the layer 0; fractions [experts].

    The load balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6): f_i is the fraction of
    tokens whose largest probability is expert i's, a constant for the gradient, and p the softmax over all experts.
    """
    return num_experts * (probabilities.sum(dim=0) * fractions).sum()


def router_z_loss(logits: Tensor) -> Tensor:  # [tokens, experts] -> []
    """Sum over tokens of (log sum_i exp logit_i)^2: the router z-loss of ST-MoE (arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(logits, dim=-1).square().sum()


def entropy(probabilities: Tensor) -> Tensor:  # [tokens, experts] -> []
    """Sum over tokens of -sum_i p_i log p_i: 0 if every token uses one expert."""
    return -torch.special.xlogy(probabilities, probabilities.clamp(min=1e-30)).sum()
