"""Many random adapters on disk, written by loraplex: quicker than PEFT, whose import would also cost memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from loraplex import LoraConfig
from loraplex.adapters.peft_write import write_adapter
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(shapes: Mapping[str, ModuleShape], rank: int, dtype: torch.dtype, seed: int) -> Adapter:
    """An adapter on all targets among `shapes` (a base model's modules by path), strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_TARGETS, task_type="CAUSAL_LM")
    layers = {}
    for path, shape in shapes.items():
        if path.rsplit(".", 1)[-1] not in ALL_TARGETS:
            continue
        lora_a = torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5
        lora_b = torch.randn(rank, shape.out_features, generator=generator) * 0.02
        layers[path] = LoraWeights(
            kind="linear", lora_a=lora_a.to(dtype), lora_b=lora_b.to(dtype), scaling=config.scaling_of(path)
        )
    return Adapter(config=config, layers=layers)


def write_random_folders(
    shapes: Mapping[str, ModuleShape], folder: Path, ranks: Sequence[int], dtype: torch.dtype
) -> dict[str, Path]:
    """One adapter for each rank, all distinct; their folders by name."""
    paths = {f"adapter{i}": folder / f"adapter{i}" for i in range(len(ranks))}
    for seed, (rank, path) in enumerate(zip(ranks, paths.values(), strict=True)):
        write_adapter(random_adapter(shapes, rank, dtype, seed), path)
    return paths
