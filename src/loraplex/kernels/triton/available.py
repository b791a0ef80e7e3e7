"""Whether the Triton kernels can run, and why not where they can't: asked by the dispatch, told once."""

import importlib.util
import logging
import os
from functools import cache

import torch

from loraplex.environment import switch

logger = logging.getLogger(__name__)

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_CAPABILITY = (8, 0)  # bfloat16 matrix products begin with Ampere


@cache
def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, as the tests do; read once."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@cache
def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take tensors of this device and dtype; a GPU's reason against it is logged once.

    LORAPLEX_TRITON=0 turns them off. Without them the torch kernels do the same work.
    """
    if device.type == "cpu":
        return is_interpreted() and dtype in SUPPORTED_DTYPES
    return device.type == "cuda" and _obstacle(device, dtype) is None


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What stands against the kernels on a GPU, logged; None: nothing."""
    reason = None
    if not switch("LORAPLEX_TRITON", default=True):
        reason = "LORAPLEX_TRITON turns them off"
    elif dtype not in SUPPORTED_DTYPES:
        reason = f"they take {', '.join(map(str, SUPPORTED_DTYPES))}, not {dtype}"
    elif importlib.util.find_spec("triton") is None:
        reason = "the package triton is not installed; it comes with CUDA builds of torch"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if reason is not None:
        logger.warning("no Triton kernels on %s, torch kernels are used instead: %s", device, reason)
    return reason
