"""Which kernel runs a layer's adapters."""

from typing import Literal

import torch

from loraplex.kernels.native import SUPPORTED_DTYPES, native_available

Kernel = Literal["native", "stacked", "segmented"]

# Without the compiled kernel: up to this many tokens a row, reading the adapters dominates, and one masked product of
# all of them wins; beyond it, a matrix product for each segment does. Measured by benchmarks/kernel_choice.py.
FEW_TOKENS = 8

# Up to this many rows of one token, the compiled base product is faster than torch's.
FEW_ROWS = 64


def choose_kernel(device: torch.device, dtype: torch.dtype, tokens_per_row: int, *, has_table: bool) -> Kernel:
    """The kernel for frozen adapters: compiled where it runs; else segmented for long rows, stacked for short ones."""
    if has_table and native_runs(device, dtype):
        return "native"
    return "segmented" if tokens_per_row > FEW_TOKENS else "stacked"


def native_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel takes tensors of this device and dtype."""
    return device.type == "cpu" and dtype in SUPPORTED_DTYPES and native_available()
