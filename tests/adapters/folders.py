"""Adapter folders in PEFT's format, made by hand so that anything can be wrong with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import ModuleShape

LAYER = "base_model.model.model.layers.0.self_attn"
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "tiny/llama",
}


def lora_pair(module: str, in_features: int = 16, out_features: int = 24, rank: int = 4) -> dict[str, Tensor]:
    """The two factors of a linear module under PEFT's names, random."""
    return {
        f"{module}.lora_A.weight": torch.randn(rank, in_features),
        f"{module}.lora_B.weight": torch.randn(out_features, rank),
    }


def two_modules() -> dict[str, Tensor]:
    """The tensors that belong to SETTINGS."""
    return lora_pair(f"{LAYER}.q_proj") | lora_pair(f"{LAYER}.v_proj")


def write_folder(
    folder: Path, settings: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
) -> Path:
    """Write SETTINGS changed by `settings`, and `tensors` (two_modules() by default); return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **(settings or {})}))
    tensors = two_modules() if tensors is None else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """A model's linear and embedding modules by path, in registration order."""
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[path] = ModuleShape(kind="linear", in_features=module.in_features, out_features=module.out_features)
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            shapes[path] = ModuleShape(kind="linear", in_features=in_features, out_features=out_features)
        elif isinstance(module, nn.Embedding):
            shapes[path] = ModuleShape(
                kind="embedding", in_features=module.num_embeddings, out_features=module.embedding_dim
            )
    return shapes


def output_module(model: PreTrainedModel) -> str | None:
    """The path of a model's output embedding."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def shard(folder: Path) -> Path:
    """Distribute the tensors of a folder over two files with an index; return the index."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        shard_name = f"adapter_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard_name)
        weight_map |= dict.fromkeys(part, shard_name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def as_pickle(folder: Path, **options: Any) -> Path:
    """The weights of a PEFT folder in adapter_model.bin."""
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin", **options)
    (folder / "adapter_model.safetensors").unlink()
    return folder
