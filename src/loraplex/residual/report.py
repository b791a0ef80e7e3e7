"""Describe a residual adapter at rest, for `loraplex inspect`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.residual.format import read_residual
from loraplex.residual.modules import LinkedLayer, LinkedResidual


@dataclass(frozen=True, kw_only=True)
class ResidualLayerReport:
    """One layer: how strong the residual can be, and which heads it listens to."""

    layer: int
    norm: float  # Frobenius norm of alpha/r * B A; for a vector its length
    top_head: int | None  # the head with the largest mean weight over rank rows
    top_head_weight: float | None
    head_entropy: float | None  # mean over rank rows, in units of log(heads): 1 is all heads alike


@dataclass(frozen=True, kw_only=True)
class ResidualReport:
    """What `loraplex inspect` tells about a residual adapter."""

    name: str  # of the folder
    kind: str
    r: int | None
    alpha: float | None
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    base_architecture: str
    base_model: str | None
    layers: tuple[ResidualLayerReport, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_residual(folder: str | Path) -> ResidualReport:
    """Read the residual adapter in `folder` and describe it; raises what `read_residual` raises."""
    residual = read_residual(folder)
    linked = isinstance(residual, LinkedResidual)
    if isinstance(residual, LinkedResidual):
        scaling = residual.config.scaling
        layers = tuple(_linked_layer(layer, weights, scaling) for layer, weights in residual.layers.items())
        tensors = [t for weights in residual.layers.values() for t in (weights.a, weights.b, weights.head_logits)]
    else:
        layers = tuple(_vector_layer(layer, float(vector.norm())) for layer, vector in residual.vectors.items())
        tensors = list(residual.vectors.values())
    return ResidualReport(
        name=Path(folder).resolve().name,
        kind="linked residual" if linked else "steering vector",
        r=residual.config.r if isinstance(residual, LinkedResidual) else None,
        alpha=residual.config.alpha if isinstance(residual, LinkedResidual) else None,
        num_parameters=residual.num_parameters,
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        base_architecture=residual.base.architecture,
        base_model=residual.base.name,
        layers=layers,
    )


def _linked_layer(layer: int, weights: LinkedLayer, scaling: float) -> ResidualLayerReport:
    a, b = weights.a.double(), weights.b.double()
    squared = float(((a @ a.t()) * (b @ b.t())).sum())  # ||B A||^2 without forming the product
    mix = torch.softmax(weights.head_logits.double(), dim=-1)  # [rank, heads]
    entropy = -(mix * mix.clamp_min(1e-300).log()).sum(dim=-1).mean()
    mean = mix.mean(dim=0)
    num_heads = mix.shape[1]
    return ResidualLayerReport(
        layer=layer,
        norm=abs(scaling) * max(squared, 0.0) ** 0.5,
        top_head=int(mean.argmax()),
        top_head_weight=float(mean.max()),
        head_entropy=1.0 if num_heads == 1 else float(entropy / torch.tensor(float(num_heads)).log()),
    )


def _vector_layer(layer: int, norm: float) -> ResidualLayerReport:
    return ResidualLayerReport(layer=layer, norm=norm, top_head=None, top_head_weight=None, head_entropy=None)
