"""The float reference of the gated LoRA layer: slow, obvious, and what every faster path is tested against."""

import torch
from torch import Tensor


def gated_lora(
    y: Tensor,  # [tokens, out]  base output, left unmodified
    x: Tensor,  # [tokens, in]
    lora_a: Tensor,  # [slots, rank, in]
    lora_b: Tensor,  # [slots, rank, out]
    slots: Tensor,  # [tokens, k]  int64
    gates: Tensor,  # [tokens, k]  0 switches an adapter off; LoRA scaling included
) -> Tensor:  # [tokens, out]
    """Add each token's gated adapters: the oracle for every kernel.

    y[t] + sum_j gates[t, j] * lora_b[slots[t, j]]^T lora_a[slots[t, j]] x[t]
    """
    hidden = torch.einsum("ti,tkri->tkr", x, lora_a[slots])
    return y + torch.einsum("tkr,tkro,tk->to", hidden, lora_b[slots], gates)
