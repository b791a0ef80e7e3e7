"""The base product of 16-bit values with its sums left in float32."""

import torch
from torch import Tensor
from torch.nn import functional

_PART_VALUES = 2**20  # weights that are float32 at once: the whole matrix never is


def float_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in float32; x [.., in], weight [out, in], bias [out]."""
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cuda":
        y = torch.mm(flat, weight.t(), out_dtype=torch.float32)
    else:
        flat = flat.float()
        parts = weight.split(max(1, _PART_VALUES // weight.shape[1]))
        y = torch.cat([functional.linear(flat, part.float()) for part in parts], dim=-1)
    if bias is not None:
        y += bias.float()
    return y.view(*x.shape[:-1], weight.shape[0])
