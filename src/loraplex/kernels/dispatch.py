"""Which kernel runs a layer's adapters."""

from typing import Literal

import torch

from loraplex.kernels.native import SUPPORTED_DTYPES, native_available

Kernel = Literal["native", "stacked", "segmented"]

# Up to this many tokens a row, reading the adapter dominates and the kernels made for that win; beyond it,
# a matrix product for each segment does. Measured by benchmarks/kernel_choice.py.
FEW_TOKENS = 8

# Up to this many rows of one token, the compiled base product is faster than torch's.
FEW_ROWS = 32


def choose_kernel(device: torch.device, dtype: torch.dtype, tokens_per_row: int, *, has_table: bool) -> Kernel:
    """The kernel for frozen adapters: segmented for long rows; else compiled where it runs; else stacked."""
    if tokens_per_row > FEW_TOKENS:
        return "segmented"
    return "native" if has_table and native_runs(device, dtype) else "stacked"


def native_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel takes tensors of this device and dtype."""
    return device.type == "cpu" and dtype in SUPPORTED_DTYPES and native_available()
