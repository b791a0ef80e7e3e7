"""Which kernel runs a layer's adapters."""

from typing import Literal

import torch

from loraplex.kernels.native import SUPPORTED_DTYPES, native_available

Kernel = Literal["native", "stacked", "segmented"]

# Up to this many tokens a segment, reading the adapter dominates and the kernels made for that win; beyond it,
# a matrix product for each segment does. Measured by benchmarks/kernels.py.
FEW_TOKENS = 8


def choose_kernel(device: torch.device, dtype: torch.dtype, tokens_per_segment: float, *, has_table: bool) -> Kernel:
    """The kernel for frozen adapters: segmented for long segments; else compiled where it runs; else stacked."""
    if tokens_per_segment > FEW_TOKENS:
        return "segmented"
    if has_table and device.type == "cpu" and dtype in SUPPORTED_DTYPES and native_available():
        return "native"
    return "stacked"
