"""Which experts a token keeps, and with what scalings: top-k and the softmax over it."""

import torch
from torch import Tensor

from loraplex.xlora.config import XLoraConfig


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
