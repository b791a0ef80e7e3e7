"""Adapters that began with a part of the base's weights, as the plain LoRAs that they are.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) take the factors that training starts with out of the base:
W - s B0 A0 + s B A is what runs, with B0 A0 from W's largest singular values, or from its QR decomposition. PEFT
repeats that at every load. So the adapter is one of rank 2r on W itself: A' = [A; A0], B' = [B, -B0].
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.contents import Start
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.errors import UnsupportedAdapterError
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.layers.base.modules import weight_matrix

MAX_OPERATIONS = 5e13  # of all decompositions: some ten minutes on a few cores
_OPERATIONS = {"pissa": 20, "olora": 4}  # for each element, times the smaller side (Golub and Van Loan, 5.2, 8.6)

_FIX = (
    "Convert it to a plain LoRA where it was trained: PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)


def check_start(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> None:
    """Raise UnsupportedAdapterError where the start can't be told, or takes too long to."""
    start = config.contents.start
    if start == "nothing":
        return
    embeddings = [path for path, shape in shapes.items() if shape.kind == "embedding"]
    if embeddings:
        raise UnsupportedAdapterError(
            f"init_lora_weights is {start!r}, which is not defined for {embeddings[0]!r}, an embedding. {_FIX}"
        )
    operations = sum(
        _OPERATIONS[start] * shape.in_features * shape.out_features * min(shape.in_features, shape.out_features)
        for shape in shapes.values()
    )
    if operations > MAX_OPERATIONS:
        raise UnsupportedAdapterError(
            f"init_lora_weights is {start!r}: what it took out of the base model's {len(shapes)} matrices would have "
            f"to be computed again, in {operations:.0e} operations; {MAX_OPERATIONS:.0e} are possible. {_FIX}"
        )
    if not all(scaling for scaling in config.scalings_of(tuple(shapes)).values()):
        raise UnsupportedAdapterError(
            f"init_lora_weights is {start!r} and lora_alpha is 0, which divides by it. {_FIX}"
        )


def without_start(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Adapter:
    """The same adapter as a plain LoRA of twice the rank; itself, if it began with nothing of the base's.

    `modules` are the base's, by path. Raises UnsupportedAdapterError where PEFT can't take the start out.
    """
    start = adapter.config.contents.start
    if start == "nothing":
        return adapter
    layers = {path: _widened(path, weights, modules[path], start) for path, weights in adapter.layers.items()}
    return replace(adapter, config=_doubled(adapter.config), layers=layers, places=None)


def _widened(path: str, weights: LoraWeights, module: nn.Module, start: Start) -> LoraWeights:
    weight = weight_matrix(module)
    if isinstance(weight, Int8Weight) or not weight.is_floating_point() or weight.dtype.itemsize > 4:
        raise UnsupportedAdapterError(
            f"init_lora_weights is {start!r}, and the base model's weight of {path!r} is not the one that it was taken "
            f"out of ({type(module).__name__}, {weight.dtype}). {_FIX}"
        )
    if start == "olora" and isinstance(module, Conv1D):
        raise UnsupportedAdapterError(
            f"init_lora_weights is 'olora', which PEFT can't take out of {path!r}, a Conv1D. {_FIX}"
        )
    first_a, first_b = _start_factors(weight.detach().float(), weights.rank, start)
    if start == "pissa":
        first_b = first_b / weights.scaling  # PEFT: W - s B0 A0 is W without its largest singular values
    dtype = torch.promote_types(weights.lora_a.dtype, torch.float32)
    return replace(
        weights,
        lora_a=torch.cat([weights.lora_a.to(dtype), first_a.to("cpu", dtype)]),
        lora_b=torch.cat([weights.lora_b.to(dtype), -first_b.to("cpu", dtype)]),
    )


def _start_factors(weight: Tensor, rank: int, start: Start) -> tuple[Tensor, Tensor]:  # [rank, in], [rank, out]
    """A0, and B0 transposed. A weight of fewer rows or columns than the rank has fewer of them, filled with zeros."""
    if start == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        first_a, first_b = right[:rank], (left[:, :rank] * values[:rank]).t()
    else:
        q, r = torch.linalg.qr(weight)
        first_a, first_b = r[:rank], q[:, :rank].t()
    missing = rank - len(first_a)
    if missing:
        first_a, first_b = (nn.functional.pad(factor, (0, 0, 0, missing)) for factor in (first_a, first_b))
    return first_a, first_b


def _doubled(config: LoraConfig) -> LoraConfig:
    """Twice the ranks at the same LoRA scalings."""
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        lora_alpha=factor * config.lora_alpha,
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
        contents=replace(config.contents, start="nothing"),
    )
