"""Describe an adapter at rest: what it adapts, how large it is, and how strong its updates are."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleKind, ModuleShape

Method = Literal["LoRA", "DoRA", "aLoRA"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The mean and the maximum of one number over several modules."""

    mean: float
    max: float


@dataclass(frozen=True, kw_only=True)
class ModuleGroup:
    """The adapted modules of one type (the last component of their paths), kind and shape."""

    module_type: str  # "q_proj"; of a router's weight "gate.weight"
    kind: ModuleKind
    in_features: int
    out_features: int
    num_experts: int  # stacked in each
    count: int
    ranks: tuple[int, ...]  # without repetition, ascending
    scalings: tuple[float, ...]
    norm_a: Range  # Frobenius norms
    norm_b: Range
    norm_update: Range  # of scaling * B A; for DoRA without the magnitude


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What `loraplex inspect` tells about an adapter."""

    name: str  # of the folder
    method: Method
    rslora: bool
    min_rank: int
    max_rank: int
    alphas: tuple[float, ...]  # without repetition, ascending
    scalings: tuple[float, ...]
    dtypes: tuple[str, ...]
    num_modules: int
    num_parameters: int
    num_bytes: int
    base_model: str | None
    task_type: str | None
    alora_invocation_tokens: tuple[int, ...] | None
    groups: tuple[ModuleGroup, ...]
    own_weights: tuple[str, ...] = ()  # parameters of the base model that others take the place of, whole or in rows

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(folder: str | Path, *, ignore_unknown: bool = False) -> AdapterReport:
    """Read the adapter in `folder` and describe it; raises what `read_adapter` raises."""
    folder = Path(folder)
    adapter = read_adapter(folder, ignore_unknown=ignore_unknown, check_contents=lambda *_: None)
    config = adapter.config
    layers = adapter.layers
    ranks = [weights.rank for weights in layers.values()]
    return AdapterReport(
        name=folder.resolve().name,
        method="DoRA" if config.use_dora else "aLoRA" if config.alora_invocation_tokens else "LoRA",
        rslora=config.use_rslora,
        min_rank=min(ranks, default=0),
        max_rank=max(ranks, default=0),
        alphas=_distinct(list(config.alphas_of(tuple(layers)).values())),
        scalings=_distinct([weights.scaling for weights in layers.values()]),
        dtypes=_dtypes(adapter),
        num_modules=len(layers),
        num_parameters=sum(_num_parameters(weights) for weights in layers.values()) + _num_own(adapter),
        num_bytes=adapter.num_bytes,
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
        alora_invocation_tokens=config.alora_invocation_tokens,
        groups=_groups(adapter),
        own_weights=(*adapter.replaced, *(f"{path}.weight" for path in adapter.token_rows)),
    )


def update_norm(weights: LoraWeights) -> float:
    """||scaling * B A||_F without forming the product; of stacked experts, that of all of them together.

    ||B A||_F^2 = trace(A^T B^T B A) = sum of the entries of (A A^T) * (B^T B), both [rank, rank].
    """
    gram_a = _gram(weights.lora_a.unflatten(0, (weights.num_experts, -1)))
    gram_b = _gram(weights.lora_b.unflatten(0, (weights.num_experts, -1)))
    squared = float((gram_a * gram_b).sum())
    return abs(weights.scaling) * max(squared, 0.0) ** 0.5


def _gram(factor: torch.Tensor) -> torch.Tensor:  # [experts, rank, n] -> [experts, rank, rank]
    factor = factor.double()
    return factor @ factor.transpose(1, 2)


def _groups(adapter: Adapter) -> tuple[ModuleGroup, ...]:
    members: dict[tuple[str, ModuleShape], list[LoraWeights]] = defaultdict(list)
    for path, weights in adapter.layers.items():
        name = path.split(".")[-2:] if weights.kind == "router" else path.split(".")[-1:]
        members[".".join(name), weights.shape].append(weights)
    return tuple(_group(module_type, shape, modules) for (module_type, shape), modules in members.items())


def _group(module_type: str, shape: ModuleShape, modules: Sequence[LoraWeights]) -> ModuleGroup:
    return ModuleGroup(
        module_type=module_type,
        kind=shape.kind,
        in_features=shape.in_features,
        out_features=shape.out_features,
        num_experts=shape.num_experts,
        count=len(modules),
        ranks=tuple(sorted({weights.rank for weights in modules})),
        scalings=_distinct([weights.scaling for weights in modules]),
        norm_a=_range([float(weights.lora_a.double().norm()) for weights in modules]),
        norm_b=_range([float(weights.lora_b.double().norm()) for weights in modules]),
        norm_update=_range([update_norm(weights) for weights in modules]),
    )


def _range(values: Sequence[float]) -> Range:
    return Range(mean=sum(values) / len(values), max=max(values))


def _distinct(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted(set(values)))


def _dtypes(adapter: Adapter) -> tuple[str, ...]:
    """The factors' dtypes, the commonest first."""
    tensors = [tensor for weights in adapter.layers.values() for tensor in (weights.lora_a, weights.lora_b)]
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return tuple(dtype for dtype, _ in counts.most_common())


def _num_parameters(weights: LoraWeights) -> int:
    tensors = (weights.lora_a, weights.lora_b, weights.magnitude, weights.bias)
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def _num_own(adapter: Adapter) -> int:
    others = [*adapter.replaced.values(), *(rows.values for rows in adapter.token_rows.values())]
    return sum(tensor.numel() for tensor in others)
