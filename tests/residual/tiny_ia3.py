"""IA3 of PEFT over tiny models, with random gates."""

from pathlib import Path

import peft
import torch

from tests.tiny_models import tiny_model

IA3_TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["q_proj", "up_proj", "o_proj"], ["o_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}


def write_ia3(name: str, folder: Path, seed: int = 0) -> tuple[Path, peft.PeftModel]:
    targets, feedforward = IA3_TARGETS[name]
    model = peft.get_peft_model(
        tiny_model(name), peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    )
    draw = torch.Generator().manual_seed(seed)
    for parameter in (p for n, p in model.named_parameters() if "ia3_l" in n):
        parameter.data = torch.rand(parameter.shape, generator=draw) * 2
    model.save_pretrained(folder)
    return folder, model.eval()
