"""Which kernel runs a layer's adapters."""

import logging
from functools import cache
from typing import Literal

import torch

from loraplex.kernels.native import SUPPORTED_DTYPES, native_available
from loraplex.kernels.triton.available import is_interpreted, triton_runs

Kernel = Literal["native", "triton", "stacked", "segmented"]

logger = logging.getLogger(__name__)

# Without the compiled kernel: up to this many tokens a row, reading the adapters dominates, and one masked product of
# all of them wins; beyond it, a matrix product for each segment does. Measured by benchmarks/kernel_choice.py; it is no
# number of one processor: both read the same bytes, which take any of them as long as some ten multiply-adds a value.
MAX_STACKED_TOKENS = 8


def choose_kernel(device: torch.device, dtype: torch.dtype, tokens_per_row: int, *, has_table: bool) -> Kernel:
    """The kernel for frozen adapters: Triton or native where they run; else segmented for long rows, else stacked."""
    if has_table and triton_runs(device, dtype):
        return "triton"
    if has_table and native_runs(device, dtype):
        return "native"
    return "segmented" if tokens_per_row > MAX_STACKED_TOKENS else "stacked"


def choose_training_kernel(device: torch.device, dtype: torch.dtype, *, has_dropout: bool) -> Kernel:
    """The kernel where gradients are needed. Dropout, which each adapter draws for itself, is the torch kernel's."""
    if not triton_runs(device, dtype):
        return "segmented"
    if has_dropout:
        _tell_dropout(device)
        return "segmented"
    return "triton"


def native_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernel takes tensors of this device and dtype; triton's interpreter takes its place."""
    return device.type == "cpu" and dtype in SUPPORTED_DTYPES and not is_interpreted() and native_available()


@cache
def _tell_dropout(device: torch.device) -> None:
    logger.warning("adapters with dropout train with the torch kernel on %s, not with Triton's", device)
