"""Adapter folders as mlx-lm's trainer saves them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def write_mlx(folder: Path, base: PreTrainedModel, *, scale: float = 20.0, rank: int = 4, dora: bool = False) -> Path:
    """What mlx-lm's trainer saves for the last block of a Llama: factors [in, rank] and [rank, out]."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        path = f"model.layers.1.{name}"
        weight = base.get_submodule(path).weight.detach()  # [out, in]
        tensors[f"{path}.lora_a"] = torch.randn(weight.shape[1], rank, generator=generator) / weight.shape[1] ** 0.5
        tensors[f"{path}.lora_b"] = torch.randn(rank, weight.shape[0], generator=generator) * 0.02
        if dora:
            tensors[f"{path}.m"] = weight.norm(dim=1) * (1 + 0.2 * torch.rand(weight.shape[0], generator=generator))
    settings = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
        "model": "mlx-community/tiny",
        "learning_rate": 1e-5,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapters.safetensors")
    return folder
