"""Small mixtures in memory and on disk, for the tests of their folders."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.mixture_folder import Layout
from loraplex.xlora.formats.write_folder import write_mixture_folder
from loraplex.xlora.head import ScalingHead

HIDDEN = 16
NAMES = ("protein", "team/materials", "chemistry")  # not in alphabetical order
LAYERS = 3  # LoRA layers of the experts together


def expert(seed: int, modules: tuple[str, ...] = ("q_proj", "v_proj"), **options: Any) -> Adapter:
    """An adapter of one block with random weights."""
    generator = torch.Generator().manual_seed(seed)
    rank = 2 + seed
    config = LoraConfig(r=rank, lora_alpha=4, target_modules=modules, **options)
    layers = {
        f"model.layers.0.self_attn.{module}": LoraWeights(
            kind="linear",
            lora_a=torch.randn(rank, HIDDEN, generator=generator),
            lora_b=torch.randn(rank, 8, generator=generator),
            scaling=config.scaling_of(module),
            magnitude=torch.rand(8, generator=generator) if config.use_dora else None,
        )
        for module in modules
    }
    return Adapter(config=config, layers=layers)


def experts() -> dict[str, Adapter]:
    """Experts of different ranks and modules, one of them DoRA, under NAMES."""
    made = (expert(0), expert(1, ("q_proj", "o_proj"), use_rslora=True), expert(2, use_dora=True))
    return dict(zip(NAMES, made, strict=True))


def head_state(config: XLoraConfig, num_layers: int = LAYERS, num_experts: int = len(NAMES)) -> dict[str, Tensor]:
    """A random scaling head's tensors."""
    torch.manual_seed(4)
    head = ScalingHead(config, hidden_size=HIDDEN, num_experts=num_experts, num_layers=num_layers)
    return head.state_dict()


def write_mixture(folder: Path, layout: Layout, config: XLoraConfig, **changes: Any) -> Path:
    """Write the mixture of `experts()`; return its folder."""
    arguments: dict[str, Any] = {
        "layout": layout,
        "config": config,
        "hidden_size": HIDDEN,
        "head_state": head_state(config),
        "experts": experts(),
        "base_model_name": "tiny/llama",
    }
    write_mixture_folder(folder, **(arguments | changes))
    return folder


def change_json(file: Path, changes: Mapping[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Set and remove entries of the JSON object in `file`."""
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (settings | changes).items() if key not in drop}))
