"""PEFT's X-LoRA as the oracle: whole sequences, no cache."""

import copy
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.xlora.config import XLoraConfig
from tests.tiny_models import HIDDEN_SIZE

# What only the original package has; PEFT's head always has both.
_ORIGINAL_ONLY = {"use_bias", "enable_relu_and_dropout"}


def peft_xlora(base: PreTrainedModel, experts: Mapping[str, Path], config: XLoraConfig, *, seed: int) -> peft.PeftModel:
    """PEFT's mixture with a random head; experts are named "0", "1", ..., the only names that it runs with."""
    settings = {key: value for key, value in vars(config).items() if key not in _ORIGINAL_ONLY}
    pass_value = settings.pop("scaling_pass_value")
    torch.manual_seed(seed)
    base = copy.deepcopy(base)
    base.config.use_cache = False  # PEFT refuses to make a mixture with a cache
    with mock.patch("peft.tuners.xlora.model.set_peft_model_state_dict", load_under_right_names):
        model = peft.get_peft_model(
            base,
            peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=getattr(base.config, "hidden_size", HIDDEN_SIZE),
                adapters={str(i): str(path) for i, path in enumerate(experts.values())},
                **settings,
            ),
        )
    model.base_model.set_scaling_pass_value(pass_value)  # the configuration itself doesn't take None
    sharpen(model.base_model.internal_xlora_classifier.layers)
    return model.eval()


def load_under_right_names(model: torch.nn.Module, state: dict[str, Tensor], **options: object) -> object:
    """PEFT's loader of experts takes every module to lie under "model.model": not so lm_head, nor GPT-2's blocks."""
    modules = {name for name, _ in model.named_modules()}
    renamed = {}
    for name, tensor in state.items():
        short = name.removeprefix("model.")
        is_short = short.partition(".lora_")[0] in modules
        if ".base_layer." not in name:  # the file has a copy of the adapted output layer's own weight
            renamed[short if is_short else name] = tensor
    return peft.set_peft_model_state_dict(model, renamed, **options)


def sharpen(layers: torch.nn.Module) -> None:
    """Larger weights for a random head, so that scalings differ from token to token."""
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(3)


@torch.no_grad()
def peft_logits(
    model: peft.PeftModel, ids: Tensor
) -> tuple[Tensor, Tensor]:  # [tokens, vocab], [tokens, layers, experts]
    """Logits and scalings of one sequence."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits, model.base_model.get_latest_scalings()[0]
