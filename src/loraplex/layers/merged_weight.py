"""A module's weight with adapters in it: the same output for every token, without an adapter at run time.

W + sum_i w_i * delta_i, where delta is s B A, and for DoRA (c - 1) W + c s B A with c = m / ||W + s B A|| of each row:
what a link adds to W x (layers/lora_layer.py), so that all refer to the base model's own W.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import LoraWeights
from loraplex.errors import BaseModelError, UnsupportedAdapterError
from loraplex.layers.base.modules import embed_scale, weight_matrix

_PART_VALUES = 2**22  # of a weight that are float64 at once: the whole weight never is
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (nn.Linear, nn.Embedding, Conv1D)
_TOLERANCE = 1e-2  # of the largest output, in any dtype


@torch.no_grad()
def merge_weight(
    path: str, module: nn.Module, members: Sequence[tuple[float, LoraWeights]], dtype: torch.dtype
) -> None:
    """Give the module's weight the adapters' share, and `dtype`: computed in float64, rounded once.

    Raises UnsupportedAdapterError where a value is too large for `dtype`.
    """
    weight = module.weight
    assert isinstance(weight, nn.Parameter), f"{path!r} has no plain weight"
    merged = weight.data if weight.dtype == dtype else torch.empty_like(weight.data, dtype=dtype)
    before = weight_matrix(module).detach()  # [out, in]
    after = merged.t() if isinstance(module, (Conv1D, nn.Embedding)) else merged
    deltas = [_Delta.of(*member) for member in members]
    for rows in _parts(before.shape):
        base = before[rows].double()
        total = base.clone()
        for delta in deltas:
            total += delta.rows(rows, base)
        after[rows] = total.to(dtype)
        _check_range(path, after[rows])
    weight.data = merged


def _check_range(path: str, merged: Tensor) -> None:
    num_beyond = int((~merged.isfinite()).sum())
    if num_beyond:
        dtype = str(merged.dtype).removeprefix("torch.")
        raise UnsupportedAdapterError(
            f"adapters can't be merged into {path!r} in {dtype}: it can't hold {num_beyond} of {merged.numel()} "
            "values. Choose float32 or bfloat16 as dtype, or smaller weights of the adapters."
        )


def check_mergeable(path: str, module: nn.Module) -> None:
    """Raise BaseModelError unless the module is its weight in plain numbers: what is added to it adds to its output."""
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS or weight.device.type == "meta":
        what = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
        raise BaseModelError(
            f"adapters can't be merged into {path!r} ({type(module).__name__}): its weight is a {what}, not plain "
            "numbers in memory. Give the original model, without quantization or offloading."
        )
    is_plain = type(module) in _PLAIN and "forward" not in vars(module)
    if not is_plain and not _is_its_weight(module):
        raise BaseModelError(
            f"adapters can't be merged into {path!r}: a {type(module).__name__} computes more than its weight says. "
            "Serve them with the base model instead."
        )


@torch.no_grad()
def _is_its_weight(module: nn.Module) -> bool:
    """Whether a subclass of a linear module or an embedding computes what its weight (and bias) says, tried once."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    try:
        if isinstance(module, nn.Embedding):
            ids = torch.arange(min(4, len(weight)), device=weight.device)
            given, expected = module(ids), weight[ids] * embed_scale(module)
        else:
            generator = torch.Generator().manual_seed(0)
            matrix = weight_matrix(module)
            x = torch.randn(4, matrix.shape[1], generator=generator).to(weight.device, weight.dtype)
            given, expected = module(x), functional.linear(x, matrix, bias)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it takes other inputs
        return False
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    return bool((given - expected).abs().max() <= _TOLERANCE * expected.abs().max())


@dataclass(frozen=True)
class _Delta:
    """One adapter's share of a weight, in float64."""

    weight: float
    lora_a: Tensor  # [rank, in]
    lora_b: Tensor  # [out, rank], times the LoRA scaling
    magnitude: Tensor | None  # [out]

    @classmethod
    def of(cls, weight: float, weights: LoraWeights) -> "_Delta":
        magnitude = None if weights.magnitude is None else weights.magnitude.double()
        return cls(weight, weights.lora_a.double(), weights.lora_b.double().t() * weights.scaling, magnitude)

    def rows(self, rows: slice, base: Tensor) -> Tensor:  # [rows, in]
        update = self.lora_b[rows] @ self.lora_a
        if self.magnitude is not None:
            whole = base + update
            ratio = self.magnitude[rows] / torch.linalg.norm(whole, dim=1)
            update = ratio.unsqueeze(1) * whole - base
        return self.weight * update


def _parts(shape: torch.Size) -> Iterator[slice]:
    count = max(1, _PART_VALUES // shape[1])
    return (slice(first, first + count) for first in range(0, shape[0], count))
