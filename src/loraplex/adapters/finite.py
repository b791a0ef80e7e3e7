"""Refuse weights that are not numbers."""

import torch
from torch import Tensor

from loraplex.errors import AdapterFormatError
from loraplex.validation import FLOAT32_MAX


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise AdapterFormatError if `tensor` holds NaN or what float32 can't hold; `name` says what it is."""
    if not tensor.numel():
        return
    # NaN propagates; one pass, no copy
    if all(-FLOAT32_MAX <= float(extreme) <= FLOAT32_MAX for extreme in torch.aminmax(tensor)):
        return
    wide = tensor.double()
    num_nan, num_infinite = int(wide.isnan().sum()), int((wide.abs() > FLOAT32_MAX).sum())
    raise AdapterFormatError(
        f"{name} holds {num_nan} NaN and {num_infinite} infinite weights of {tensor.numel()} "
        f"({tensor.dtype}). The training diverged, the file is damaged, or the dtype is too narrow; use an "
        "earlier checkpoint."
    )
