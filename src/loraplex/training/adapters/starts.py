"""First weights made of the base model's: PiSSA and OLoRA, trained on the frozen base and written as plain LoRAs.

Both take a part s B0 A0 of W into the adapter and leave the rest to the base: y = (W - s B0 A0) x + s B A x. One base
serves many jobs, so W stays as it is, and the rows of such a job go through (A0, B0) with weight -1 as well. What is
written is the change s (B A - B0 A0), a LoRA of twice the rank: what PEFT's
`path_initial_model_for_weight_conversion` writes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import LoraWeights
from loraplex.errors import ConfigError
from loraplex.layers.base.modules import weight_matrix

Start = Literal["lora", "pissa", "olora"]


def decomposed_weights(
    start: Start,
    label: str,  # what messages start with
    modules: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
) -> dict[str, LoraWeights]:
    """Factors of a part of each module's weight. Raises ConfigError for what is no linear module, or scaled by 0."""
    layers = {}
    for path, rank in ranks.items():
        if isinstance(modules[path], nn.Embedding):
            raise ConfigError(
                f"{label}: start is {start!r}, which embeddings don't have, but it adapts {path!r}. Leave it "
                "out of target_modules, or set start='lora'."
            )
        if scalings[path] <= 0:
            raise ConfigError(f"{label}: start is {start!r}, which needs an alpha above 0.")
        weight = weight_matrix(modules[path]).detach().float()  # [out, in]
        make = _principal if start == "pissa" else _orthogonal
        lora_a, lora_b = make(weight, rank, scalings[path])
        layers[path] = LoraWeights(
            kind="linear", lora_a=lora_a.cpu().contiguous(), lora_b=lora_b.cpu().contiguous(), scaling=scalings[path]
        )
    return layers


def _principal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # [rank, in], [rank, out]
    """PiSSA (arXiv 2404.02948, equation 2): s B A is the part of W with the largest singular values."""
    u, sizes, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (sizes[:rank] / scaling).sqrt().unsqueeze(1)
    return roots * v[:rank], roots * u[:, :rank].t()


def _orthogonal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # [rank, in], [rank, out]
    """OLoRA (arXiv 2406.01775, algorithm 1): of W = Q R the first columns and rows; s B A is taken out of W."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank].t()


def change_since(first: LoraWeights, last: LoraWeights) -> LoraWeights:
    """s (B A - B0 A0) as factors of twice the rank, under the same LoRA scaling."""
    return replace(
        last,
        lora_a=torch.cat([last.lora_a, first.lora_a.to(last.lora_a)]),
        lora_b=torch.cat([last.lora_b, -first.lora_b.to(last.lora_b)]),
    )


def doubled(config: LoraConfig) -> LoraConfig:
    """The settings of twice the rank and the same LoRA scaling."""
    grown = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grown,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: alpha * grown for pattern, alpha in config.alpha_pattern.items()},
    )
