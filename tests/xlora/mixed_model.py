"""A tiny model with a mixture whose scalings differ from token to token, and folders of its experts."""

from pathlib import Path

import torch

from loraplex import MultiLoraModel, XLoraConfig
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

EXPERTS = ("0", "1", "2")


def write_experts(name: str, folder: Path) -> dict[str, Path]:
    base = tiny_model(name)
    return {
        expert: random_peft_adapter(base, folder / expert, targets=linear_targets(name), seed=i, r=2 + i)
        for i, expert in enumerate(EXPERTS)
    }


def mixed_model(name: str, folder: Path, config: XLoraConfig | None = None, **options: object) -> MultiLoraModel:
    """A model with the adapters "0", "1", "2" and the mixture "science" of them."""
    model = MultiLoraModel(tiny_model(name), **options)
    for expert, path in write_experts(name, folder).items():
        model.load_adapter(expert, path)
    model.create_mixture("science", EXPERTS, config or XLoraConfig(layerwise_scalings=True), seed=1)
    sharpen(model, "science")
    return model


def sharpen(model: MultiLoraModel, mixture: str) -> None:
    """Larger weights for a random head: its scalings then depend on the token, which a test can see."""
    with torch.no_grad():
        for parameter in model.mixtures.get(mixture).head.parameters():
            parameter.mul_(4)
