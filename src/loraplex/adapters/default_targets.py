"""What PEFT adapts in a base model where an adapter's target_modules is null.

The table is TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING of PEFT 0.21 (peft/utils/constants.py, Apache-2.0).
"""

from collections.abc import Mapping
from dataclasses import replace

from loraplex.adapters.config import LoraConfig
from loraplex.errors import UnsupportedAdapterError
from loraplex.validation import quoted

_Q_V: tuple[str, ...] = ("q_proj", "v_proj")

# By the model_type of a base model's config: names, or a regular expression.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "t5": ("q", "v"),
    "mt5": ("q", "v"),
    "bart": _Q_V,
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "opt": _Q_V,
    "gptj": _Q_V,
    "gpt_neox": ("query_key_value",),
    "gpt_neo": _Q_V,
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "layoutlm": ("query", "value"),
    "llama": _Q_V,
    "llama4": _Q_V,
    "chatglm": ("query_key_value",),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "RefinedWebModel": ("query_key_value",),
    "RefinedWeb": ("query_key_value",),
    "falcon": ("query_key_value",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "mistral": _Q_V,
    "mixtral": _Q_V,
    "stablelm": _Q_V,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma": _Q_V,
    "gemma2": _Q_V,
    "gemma3_text": _Q_V,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": _Q_V,
    "qwen3": _Q_V,
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}


def with_default_targets(config: LoraConfig, model_type: str | None) -> LoraConfig:
    """`config` with PEFT's targets for a base model of this type, where it has none.

    Raises UnsupportedAdapterError for a type that PEFT knows no targets for.
    """
    if config.target_modules is not None or config.target_parameters:
        return config
    targets = DEFAULT_TARGETS.get(model_type or "")
    if targets is None:
        raise UnsupportedAdapterError(
            f"target_modules is null, and PEFT knows no targets for a base model of type {quoted(model_type)}. Write "
            "the names of the adapted modules into adapter_config.json."
        )
    return replace(config, target_modules=targets)
