"""Small mixtures in the shapes of folders in which X-LoRAs were published, and what the original package computes.

The package (github.com/EricLBuehler/xlora) is no dependency: `original/logits.safetensors` holds its logits. To compute
them again, with its `src` on the path: python -m tests.xlora.original_package
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import HIDDEN_SIZE, LLAMA_LIKE, LLAMA_TARGETS, random_peft_adapter, tiny_model

LOGITS = Path(__file__).parent / "original" / "logits.safetensors"
IDS = torch.tensor([[5, 9, 17, 33, 60, 12, 7, 40, 22]])


@dataclass(frozen=True, kw_only=True)
class PublishedShape:
    """One mixture: its base model, experts and settings."""

    architecture: str
    num_experts: int
    targets: tuple[str, ...]
    settings: Mapping[str, Any]
    num_blocks: int = 2
    # as a file of its time has it
    absent: Sequence[str] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        return [f"adapter_{number + 1}" for number in range(self.num_experts)]

    @property
    def complete_settings(self) -> dict[str, Any]:
        defaults = {
            "hidden_size": HIDDEN_SIZE,
            "base_model_id": "tiny/base",
            "adapters": self.experts,
            "enable_softmax": True,
            "enable_softmax_topk": False,
            "layerwise_scalings": True,
            "xlora_depth": 1,
            "xlora_size": 20,
            "enable_relu_and_dropout": True,
            "use_bias": True,
            "xlora_dropout_p": 0.2,
            "use_trainable_adapters": False,
            "softmax_temperature": 1.0,
            "top_k_lora": None,
            "scaling_pass_value": 0.0,
            "global_scaling_weight": 1.0,
        }
        return defaults | dict(self.settings)


SHAPES: Mapping[str, PublishedShape] = {
    # lamm-mit/x-lora: nine experts on q, k, v, o and gate of Zephyr (Mistral), and no list of them
    "zephyr": PublishedShape(
        architecture="mistral",
        num_experts=9,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"),
        settings={},
        absent=("adapters",),
    ),
    # lamm-mit/x-lora-gemma-7b: four experts on all seven linear modules, named in an object
    "gemma": PublishedShape(
        architecture="gemma",
        num_experts=4,
        targets=LLAMA_TARGETS,
        settings={"xlora_depth": 3, "softmax_temperature": 0.7, "global_scaling_weight": 1.5},
        absent=("enable_relu_and_dropout",),
        changed={"adapters": {f"adapter_{number}": f"somewhere/adapter_{number}" for number in (1, 2, 3, 4)}},
    ),
    "no relu, no biases": PublishedShape(
        architecture="mistral",
        num_experts=3,
        targets=("q_proj", "down_proj"),
        settings={"xlora_depth": 4, "enable_relu_and_dropout": False, "use_bias": False, "top_k_lora": 2},
        absent=("enable_relu_and_dropout", "use_bias"),
    ),
    # before 2024-02-09: 1 / experts in the scaling pass; before 2024-03-09: no base_model_id
    "early": PublishedShape(
        architecture="mistral",
        num_experts=3,
        targets=("v_proj",),
        settings={"xlora_depth": 2, "enable_relu_and_dropout": False, "scaling_pass_value": 1 / 3},
        absent=("adapters", "base_model_id", "enable_relu_and_dropout", "scaling_pass_value", "global_scaling_weight"),
        changed={"stop_token_id": None},
    ),
    # from 2024-04-11 on
    "last": PublishedShape(
        architecture="mistral",
        num_experts=3,
        targets=("o_proj", "up_proj"),
        settings={"xlora_depth": 2, "layerwise_scalings": False, "scaling_pass_value": 0.5},
    ),
}


def base_model(shape: PublishedShape) -> PreTrainedModel:
    """A tiny model of the architecture with random weights."""
    if shape.architecture != "gemma":
        return tiny_model(shape.architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.GemmaConfig(**(LLAMA_LIKE | {"head_dim": 16, "tie_word_embeddings": False}))
        return transformers.GemmaForCausalLM(config).eval()


def write_published(shape: PublishedShape, folder: Path, *, complete: bool = False) -> Path:
    """Write the mixture as it was published; `complete`: with all settings, for its last version."""
    base = base_model(shape)
    for number, name in enumerate(shape.experts):
        random_peft_adapter(base, folder / name, targets=shape.targets, seed=number)
    save_file(head_tensors(shape), folder / "xlora_classifier.safetensors")
    settings = shape.complete_settings
    if not complete:
        settings = {key: value for key, value in settings.items() if key not in shape.absent} | dict(shape.changed)
    (folder / "xlora_config.json").write_text(json.dumps(settings))
    return folder


def head_tensors(shape: PublishedShape) -> dict[str, Tensor]:
    """A random scaling head under the package's names: inner.0, inner.1 or inner.3, ..., last."""
    settings, generator = shape.complete_settings, torch.Generator().manual_seed(7)
    stride = 3 if settings["enable_relu_and_dropout"] else 1
    layers = shape.num_blocks * len(shape.targets) if settings["layerwise_scalings"] else 1
    size, sizes, tensors = settings["xlora_size"], [HIDDEN_SIZE], {}
    names = [f"inner.{stride * layer}" for layer in range(settings["xlora_depth"] - 1)] + ["last"]
    sizes += [size] * (len(names) - 1) + [layers * shape.num_experts]
    for name, width_in, width_out in zip(names, sizes, sizes[1:], strict=False):
        tensors[f"{name}.weight"] = torch.randn(width_out, width_in, generator=generator) * 2 / width_in**0.5
        if settings["use_bias"]:
            tensors[f"{name}.bias"] = torch.randn(width_out, generator=generator) * 0.3
    return tensors


def original_logits(shape: PublishedShape, folder: Path) -> Tensor:
    """What the package computes."""
    import xlora

    base = base_model(shape)
    base.config.use_cache = False
    adapters = {name: str(folder / name) for name in shape.experts}
    model = xlora.from_pretrained(str(folder), base, "cpu", adapters=adapters)
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits[0].clone()


def main() -> None:
    import tempfile

    logits = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as temporary:
            logits[name] = original_logits(shape, write_published(shape, Path(temporary), complete=True))
    save_file(logits, LOGITS)


def known_logits(name: str) -> Tensor:
    """What the package computed once, [tokens, vocabulary]."""
    return load_file(LOGITS)[name]


if __name__ == "__main__":
    main()
