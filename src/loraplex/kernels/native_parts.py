"""The compiled operators of a layer's parts (kernels/csrc/parts.cpp, gradients.cpp); see kernels/native.py."""

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _operator(name: str) -> Any:
    """The operator itself: finding it by name costs some microseconds, and a step calls it for every layer."""
    return getattr(torch.ops.loraplex, name).default


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), or (1 + weight) * ..."""
    return _operator("rms_norm")(x, weight, eps, plus_one)


def norm(
    x: Tensor,  # [.., size] or [.., heads, size]
    weight: Tensor | None,  # [size] or [heads, size]
    bias: Tensor | None,
    eps: float,
    is_centered: bool,
    plus_one: bool,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight + bias, of x less its mean if `is_centered`; `plus_one`: (1 + weight)."""
    return _operator("norm")(x, weight, bias, eps, is_centered, plus_one)


def activate(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    """act(gate) * up, or act(gate), in gate's memory; `kind` is one of layers/fusion/activations.py's Activation."""
    _operator("activate_")(gate, up, kind)
    return gate


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Of x [.., size], from that of what `rms_norm` gave."""
    return _operator("rms_norm_gradient")(grad, x, weight, eps, plus_one)


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) * up, in memory of its own."""
    return _operator("gated_activation")(gate, up, kind)


def gated_activation_gradients(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Of gate and up, from that of what `gated_activation` gave."""
    return _operator("gated_activation_gradients")(grad, gate, up, kind)
