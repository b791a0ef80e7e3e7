"""Which kernel runs a layer's adapters."""

from typing import Literal

import torch
from torch import Tensor

from loraplex.kernels.native import SUPPORTED_DTYPES, native_available

Kernel = Literal["native", "stacked", "segmented"]

# Up to this many tokens a segment, reading the adapter dominates and the kernels made for that win; beyond it,
# a matrix product for each segment does. Measured by benchmarks/kernels.py.
FEW_TOKENS = 8


def choose_kernel(x: Tensor, tokens_per_segment: float, *, needs_grad: bool) -> Kernel:
    """Segmented for gradients and long segments; else the compiled kernel where it runs; else stacked."""
    if needs_grad or tokens_per_segment > FEW_TOKENS:
        return "segmented"
    if x.device.type == "cpu" and x.dtype in SUPPORTED_DTYPES and native_available():
        return "native"
    return "stacked"


def gradients_flow(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to any of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
