"""A tiny Llama, quantized in each way that runs here; adapters for it."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraplex.layers.quantized.kinds import quantized_modules
from tests.parts import require
from tests.tiny_models import LLAMA_LIKE, linear_targets, random_peft_adapter

TARGETS = linear_targets("llama")
TOLERANCE = 1e-3  # of the logits' range


class Kind(NamedTuple):
    part: str  # of tests/parts.py
    config: Callable[[], Any]  # transformers' quantization config


def _bits_and_bytes(**options: Any) -> Callable[[], Any]:
    return lambda: transformers.BitsAndBytesConfig(**options)


def _torchao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        from torchao import quantization

        return transformers.TorchAoConfig(getattr(quantization, name)(**options))

    return config


def _int4_for_a_cpu() -> Any:
    """4 bits a weight in the order of torch's CPU kernel; Int4WeightOnlyConfig is for GPUs."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return transformers.TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))


KINDS: Mapping[str, Kind] = {
    "nf4": Kind(
        "bitsandbytes",
        _bits_and_bytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ),
    "int8": Kind("bitsandbytes", _bits_and_bytes(load_in_8bit=True, llm_int8_threshold=0.0)),
    "torchao-int8": Kind("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao-int4": Kind("torchao", _int4_for_a_cpu),
}


def kinds(*names: str) -> list[Any]:
    """Kinds as parameters of a test, each with the package that it needs."""
    parts = {**{name: kind.part for name, kind in KINDS.items()}, "hqq": "hqq"}
    return [pytest.param(name, marks=pytest.mark.needs(parts[name])) for name in names]


def write_plain(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a tiny Llama whose matrices have whole blocks of 64 values."""
    config = transformers.LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 128, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, parameter.data.mean().item(), 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """What transformers gives by itself."""
    if kind == "hqq":
        return load_hqq(folder)
    require(KINDS[kind].part)
    config = options.pop("config", None) or KINDS[kind].config()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}, **options
    ).eval()


def write_adapters(plain: Path, folder: Path) -> dict[str, Path]:
    """LoRAs of different ranks, targets and LoRA scalings."""
    base = AutoModelForCausalLM.from_pretrained(plain)

    def write(name: str, seed: int, targets: Any, **settings: Any) -> Path:
        return random_peft_adapter(base, folder / name, targets=targets, seed=seed, **settings)

    return {
        "small": write("small", 1, TARGETS, r=3, lora_alpha=4),
        "large": write("large", 2, TARGETS[:2], r=9, lora_alpha=7),
        "rs": write("rs", 5, [*TARGETS, "embed_tokens", "lm_head"], options={"use_rslora": True}),
    }


class Stand(torch.nn.Linear):
    """A plain linear module to PEFT, whose X-LoRA knows no quantized ones; it computes what a quantized one does."""

    inner: tuple[torch.nn.Module]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.inner[0](input)


def load_hqq(folder: Path) -> PreTrainedModel:
    """A model whose linear modules hqq has replaced: transformers doesn't do that itself."""
    require("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    base = AutoModelForCausalLM.from_pretrained(folder)
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
            base.set_submodule(path, HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu"))
    return base.eval()


def with_stands(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of a quantized base whose quantized modules stand behind plain ones."""
    made = copy.deepcopy(base)
    for path, module, _ in list(quantized_modules(made)):
        stand = Stand(module.in_features, module.out_features, bias=False)
        stand.inner = (module,)  # in a tuple, so that it is no submodule
        made.set_submodule(path, stand)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(made):
            delattr(made, name)
    vars(made.config).pop("quantization_config", None)
    return made


def assert_near(actual: torch.Tensor, expected: torch.Tensor, label: str, tolerance: float = TOLERANCE) -> None:
    """Equal to a part of the expected logits' range."""
    span = (expected.max() - expected.min()).item()
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= tolerance * span, f"{label}: off by {error:.2e}, logits span {span:.2e}"
