"""Refuse weights that are not numbers."""

import torch
from torch import Tensor

from loraplex.errors import AdapterFormatError


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise AdapterFormatError if `tensor` holds NaN or infinite weights; `name` says what it is."""
    if all(extreme.isfinite() for extreme in torch.aminmax(tensor)):  # NaN propagates; one pass, no copy
        return
    num_nan, num_infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise AdapterFormatError(
        f"{name} holds {num_nan} NaN and {num_infinite} infinite weights of {tensor.numel()} "
        f"({tensor.dtype}). The training diverged, the file is damaged, or the dtype is too narrow; use an "
        "earlier checkpoint."
    )
