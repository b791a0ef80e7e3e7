"""Describe a residual adapter at rest, for `loraplex inspect`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.errors import AdapterFormatError
from loraplex.json_files import read_object
from loraplex.residual.format import FolderResidual, is_residual_folder, read_residual
from loraplex.residual.gates import GateResidual
from loraplex.residual.modules import LinkedLayer, LinkedResidual, SteeringVector
from loraplex.residual.other_formats.control_vector import is_control_vector, read_control_vector
from loraplex.residual.other_formats.ia3 import is_ia3_folder, read_ia3
from loraplex.residual.other_formats.pyreft import is_pyreft_folder, read_pyreft
from loraplex.residual.positions import ALL, Positions
from loraplex.residual.reft import Intervention


@dataclass(frozen=True, kw_only=True)
class ResidualLayerReport:
    """One layer, or gated module: how strong the residual can be, and which heads it listens to."""

    layer: int | str  # of gates the module's path
    norm: float  # Frobenius norm of what h is multiplied by; for a vector its length, for a gate that of l - 1
    site: str
    positions: str = "all"
    top_head: int | None = None  # the head with the largest mean weight over rank rows
    top_head_weight: float | None = None
    head_entropy: float | None = None  # mean over rank rows, in units of log(heads): 1 is all heads alike


@dataclass(frozen=True, kw_only=True)
class ResidualReport:
    """What `loraplex inspect` tells about a residual adapter."""

    name: str  # of the folder or file
    kind: str
    r: int | None
    alpha: float | None
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    base_architecture: str | None
    base_model: str | None
    layers: tuple[ResidualLayerReport, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe_residual(source: str | Path) -> ResidualReport:
    """Read the residual adapter in a folder or file and describe it; raises what reading it raises.

    Of pyreft's interventions, which don't say where they act, the positions are told as "all".
    """
    residual, base_model = _read(Path(source))
    kind, layers = _layers(residual)
    tensors = list(residual.tensors())
    ranks = {one.rank for one in getattr(residual, "interventions", ())}
    config = residual.config if isinstance(residual, LinkedResidual) else None
    return ResidualReport(
        name=Path(source).resolve().name,
        kind=kind,
        r=config.r if config else max(ranks, default=None),
        alpha=None if config is None else config.alpha,
        num_parameters=residual.num_parameters,
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        base_architecture=None if residual.base is None else residual.base.architecture,
        base_model=base_model if residual.base is None else residual.base.name,
        layers=layers,
    )


def _read(source: Path) -> tuple[FolderResidual, str | None]:
    """A residual, and the name of its base model where its own settings don't have it."""
    if is_control_vector(source):
        return read_control_vector(source), None
    if is_pyreft_folder(source):
        return _at_all_positions(source), None
    if is_ia3_folder(source) and not is_residual_folder(source):
        name = read_object(source / CONFIG_FILE, AdapterFormatError).get("base_model_name_or_path")
        return read_ia3(source), name if isinstance(name, str) else None
    return read_residual(source), None


def _at_all_positions(source: Path) -> FolderResidual:
    has_two = any(source.glob("intkey_*#1.bin"))
    return read_pyreft(source, Positions("edges", first=1, last=1) if has_two else ALL)


def _layers(residual: FolderResidual) -> tuple[str, tuple[ResidualLayerReport, ...]]:
    if isinstance(residual, LinkedResidual):
        scaling = residual.config.scaling
        return "linked residual", tuple(_linked_layer(n, own, scaling) for n, own in residual.layers.items())
    if isinstance(residual, SteeringVector):
        site, positions = residual.site, str(residual.positions)
        layers = [
            ResidualLayerReport(layer=n, norm=float(vector.norm()), site=site, positions=positions)
            for n, vector in residual.vectors.items()
        ]
        return "steering vector", tuple(layers)
    if isinstance(residual, GateResidual):
        return "gates (IA3)", (*_gates(residual.outputs, "output"), *_gates(residual.inputs, "input"))
    return "interventions (ReFT)", tuple(map(_intervention, residual.interventions))


def _gates(gates: Mapping[str, Tensor], site: str) -> list[ResidualLayerReport]:
    return [
        ResidualLayerReport(layer=path, norm=float((gate.double() - 1).norm()), site=site)
        for path, gate in gates.items()
    ]


def _intervention(own: Intervention) -> ResidualLayerReport:
    norm = _norm(own.read.double(), own.r.double())
    return ResidualLayerReport(layer=own.block, norm=norm, site=own.site, positions=str(own.positions))


def _norm(a: Tensor, b: Tensor) -> float:
    """||b^T a|| of [rank, hidden] factors, without forming the product."""
    squared = float(((a @ a.t()) * (b @ b.t())).sum())
    return float(max(squared, 0.0) ** 0.5)


def _linked_layer(layer: int, weights: LinkedLayer, scaling: float) -> ResidualLayerReport:
    mix = torch.softmax(weights.head_logits.double(), dim=-1)  # [rank, heads]
    entropy = -(mix * mix.clamp_min(1e-300).log()).sum(dim=-1).mean()
    mean = mix.mean(dim=0)
    num_heads = mix.shape[1]
    return ResidualLayerReport(
        layer=layer,
        norm=abs(scaling) * _norm(weights.a.double(), weights.b.double()),
        site="attention",
        top_head=int(mean.argmax()),
        top_head_weight=float(mean.max()),
        head_entropy=1.0 if num_heads == 1 else float(entropy / torch.tensor(float(num_heads)).log()),
    )
