"""Base models whose weights another library quantized: which can be used, and how they are loaded."""

import logging
import re
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from loraplex.errors import BaseModelError, ConfigError, MissingExtraError
from loraplex.extras import install_command
from loraplex.layers.quantized.kinds import BNB_INT8, is_class, quantized_modules
from loraplex.validation import quoted

# Methods whose package, of the same name, computes with such weights as they are.
HELD = ("bitsandbytes", "torchao", "hqq")
# Those that are dequantized when they are loaded, and the config class that asks transformers for it.
DEQUANTIZED = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "gguf": "GgufConfig",
}
# Those that are dequantized here (packed_checkpoint.py).
PACKED = ("gptq", "awq")
_ADVICE = (
    "Use a checkpoint without quantization, if need be with quantization_config=BitsAndBytesConfig(load_in_4bit=True), "
    "or one of bitsandbytes or torchao."
)
# Of torchao's weights: set where a module's inputs are quantized too.
_INPUT_SETTINGS = ("act_quant_kwargs", "activation_quantization", "act_mapping_type")
# What a base model's name says about its weights.
_PRECISION_NAMES = re.compile(
    r"(?:^|[-_./])(bnb-4bit|bnb-8bit|4bit|8bit|nf4|int4|int8|fp8|awq|gptq|gguf|hqq|mxfp4)(?:$|[-_./])", re.IGNORECASE
)
_BITS_AND_BYTES = {
    "bitsandbytes 4-bit": ("bnb-4bit", "4bit", "nf4", "int4"),
    "bitsandbytes int8": ("bnb-8bit", "8bit", "int8"),
}

logger = logging.getLogger(__name__)


def method_of(config: PreTrainedConfig) -> str | None:
    """The method by which a checkpoint, or a loaded model, is quantized; None if it isn't."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return _method(settings)
    return None


def load_options(config: PreTrainedConfig, asked: Any, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given for a quantized model; nothing for another one.

    For one that is dequantized here, {"packed": True}. `asked` is the caller's quantization config, as transformers
    takes it. Raises BaseModelError for a method that can't be used, ConfigError for a config of another method than the
    checkpoint's, and where its package is missing.
    """
    own, wanted = method_of(config), None if asked is None else _method(asked)
    method = own or wanted
    if method is None:
        return {}
    if own is not None and wanted not in (None, own):
        raise ConfigError(f"the checkpoint is quantized with {own}, quantization_config is of {wanted}. Leave it out.")
    _check_method(method)
    if method not in (*DEQUANTIZED, *PACKED):
        return {"quantization_config": asked, "device_map": {"": device}}
    if own is None:
        raise ConfigError(
            f"quantization_config of {wanted} would be dequantized when the model is loaded, and the checkpoint isn't "
            "quantized. Leave it out."
        )
    logger.info("the weights of this %s checkpoint are dequantized", method)
    if method in PACKED:
        return {"packed": True}
    settings = getattr(transformers, DEQUANTIZED[method])(dequantize=True)
    return {"quantization_config": settings, "device_map": {"": device}}


def check_quantized_base(base: nn.Module) -> None:
    """Raise BaseModelError for a loaded model with quantized weights that can't be used here."""
    method = method_of(base.config)  # type: ignore[arg-type]
    if method is not None and getattr(base, "is_quantized", True):
        _check_loaded(method, base)
    for path, module, kind in quantized_modules(base):
        if kind is BNB_INT8 and module.state.has_fp16_weights:  # type: ignore[union-attr]
            raise BaseModelError(
                f"{path!r} quantizes its weight anew at every call (llm_int8_has_fp16_weight=True), which is for "
                "training the base model. Load it without that."
            )
        weight = getattr(module, "weight", None)
        if is_class(weight, "torchao", "LinearActivationQuantizedTensor") or any(
            getattr(weight, setting, None) is not None for setting in _INPUT_SETTINGS
        ):
            raise BaseModelError(
                f"{path!r} quantizes its inputs too ({kind.name}, {type(weight).__name__}), which is not tried here. "
                "Quantize weights only: Int8WeightOnlyConfig() for example."
            )


def tell_other_precision(name: str | None, base: nn.Module) -> None:
    """Log where an adapter's settings name a base model of another precision than this one."""
    found = None if name is None else _PRECISION_NAMES.search(name)
    if found is None:
        return
    kinds = sorted({kind.name for _, _, kind in quantized_modules(base)})
    if not any(_is_named(found[1], kind) for kind in kinds):
        logger.warning(
            "the adapter was made for %s; this base model's weights are %s. Results differ a little from those that it "
            "was trained with.",
            quoted(name),
            " and ".join(kinds) or "not quantized",
        )


def _is_named(precision: str, kind: str) -> bool:
    if kind.startswith("bitsandbytes"):
        return precision.lower() in _BITS_AND_BYTES[kind]
    return precision.lower() in ("int4", "int8", "4bit", "8bit", "fp8", "hqq")  # such a kind has several


def _method(settings: Any) -> str:
    """Of a quantization config, or of its dictionary."""
    as_dict = settings if isinstance(settings, dict) else vars(settings)
    if as_dict.get("load_in_4bit") or as_dict.get("load_in_8bit"):
        return "bitsandbytes"
    method = as_dict.get("quant_method", getattr(settings, "quant_method", None))
    return str(getattr(method, "value", method))


def _check_method(method: str) -> None:
    package = method.replace("-", "_")
    if method in (*HELD, "compressed-tensors") and find_spec(package) is None:
        raise MissingExtraError(
            f"a base model quantized with {method} needs {package}, which the base install leaves out. Install the "
            f"extra: {install_command('torchao' if method == 'torchao' else 'quantized')}."
        )
    if method == "hqq":
        raise BaseModelError(
            "transformers can't load a base model quantized with 'hqq'. Quantize the loaded model with hqq's own "
            "AutoHQQHFModel.quantize_model, and give that to MultiLoraModel."
        )
    if method not in (*HELD, *DEQUANTIZED, *PACKED):
        raise BaseModelError(f"base models quantized with {quoted(method)} are not supported. {_ADVICE}")


def _check_loaded(method: str, base: nn.Module) -> None:
    if method in HELD:
        return

    if method in PACKED:
        raise BaseModelError(
            f"the base model's weights are held as {method} has them, which is not tried here. Load it with "
            "MultiLoraModel.from_pretrained, which dequantizes them."
        )
    if method not in DEQUANTIZED:
        raise BaseModelError(f"base models quantized with {quoted(method)} are not supported. {_ADVICE}")
    if method != "gguf" or any(is_class(module, "transformers", "GgufLinear") for module in base.modules()):
        raise BaseModelError(
            f"the base model's weights are held as {method} has them, which is not tried here. Load it with "
            f"quantization_config={DEQUANTIZED[method]}(dequantize=True), or with MultiLoraModel.from_pretrained."
        )
