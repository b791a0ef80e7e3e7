"""What a checkpoint belongs to: the base model, and the weights and settings that a run began with."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLE = 4096  # bytes of every base parameter


def base_fingerprint(base: PreTrainedModel) -> dict[str, Any]:
    """What tells base models apart."""
    return {"class": type(base).__name__, "dtype": str(base.dtype), "weights": _weights_digest(base)}


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Of the shapes and all bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights_digest(base: PreTrainedModel) -> str:
    """Of the names, shapes and first values of all parameters: a whole model would take seconds to read."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_first_bytes(parameter))
    return digest.hexdigest()


def _first_bytes(parameter: Tensor) -> bytes:
    """Of the tensors that it is made of, where its class holds several (quantized ones)."""
    if hasattr(parameter, "__tensor_flatten__"):
        parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
        return b"".join(map(_first_bytes, parts))
    start = parameter.detach().reshape(-1)[: _SAMPLE // parameter.element_size()]
    return start.cpu().contiguous().view(torch.uint8).numpy().tobytes()
