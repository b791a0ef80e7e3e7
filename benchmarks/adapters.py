"""Random adapters on disk, written by PEFT itself, so that both sides load the same files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_random_adapters(
    base: PreTrainedModel, folder: Path, ranks: Sequence[int], targets: Sequence[str] = tuple(ALL_TARGETS)
) -> dict[str, Path]:
    """One adapter for each rank, with weights large enough to change what the model says."""
    torch.manual_seed(0)
    paths = {}
    for i, rank in enumerate(ranks):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.to(base.dtype).save_pretrained(str(folder / f"adapter{i}"))
        base = model.unload()
        paths[f"adapter{i}"] = folder / f"adapter{i}"
    return paths


def peft_with_adapters(base: PreTrainedModel, paths: dict[str, Path]) -> PeftModel:
    """PEFT's model with all adapters loaded, as PEFT loads them by default (in float32)."""
    names = list(paths)
    model = PeftModel.from_pretrained(base, str(paths[names[0]]), names[0])
    for name in names[1:]:
        model.load_adapter(str(paths[name]), name)
    return model.eval()
