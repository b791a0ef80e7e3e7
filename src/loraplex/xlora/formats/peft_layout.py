"""PEFT's layout of a mixture: adapter_config.json, adapter_model.safetensors with the head, experts in "0", "1", ..."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.weight_files import WEIGHTS_FILE
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import read_object
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.head_file import HeadCheck, read_head, require_head_file
from loraplex.xlora.formats.mixture_folder import MixtureFolder
from loraplex.xlora.formats.peft_experts import NAMES_FILE, count_experts, expert_folders, expert_names, names_json
from loraplex.xlora.formats.settings import (
    PEFT_SETTINGS,
    base_name_from,
    config_from,
    hidden_size_from,
    refuse_unknown,
)

HEAD_PREFIX = "base_model.internal_xlora_classifier."
PEFT_TYPE = "XLORA"

# Settings without influence on what a trained mixture computes.
_HARMLESS = ("auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config", "task_type")
_KNOWN = frozenset({*_HARMLESS, *PEFT_SETTINGS, "adapters", "base_model_name_or_path", "hidden_size"})


def read_peft_layout(folder: Path, *, find_experts: bool, check: HeadCheck | None = None) -> MixtureFolder:
    """Read a mixture that PEFT, or `write_mixture_folder(layout="peft")`, saved."""
    file = folder / CONFIG_FILE
    settings = read_object(file, AdapterFormatError)
    if settings.get("peft_type") != PEFT_TYPE:
        raise UnsupportedAdapterError(
            f"{file}: peft_type is {settings.get('peft_type')!r}, so this is no mixture. Supported: {PEFT_TYPE!r}; "
            "load a plain LoRA adapter with load_adapter."
        )
    refuse_unknown(settings, _KNOWN, file)
    config = config_from(settings, PEFT_SETTINGS, file)
    num_experts = count_experts(settings, file)
    try:
        config.check_num_experts(num_experts)
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}") from error
    hidden_size = hidden_size_from(settings, file)
    names = expert_names(folder, num_experts)
    require_head_file(folder / WEIGHTS_FILE, ("adapter_model.bin",))
    head, num_layers = read_head(
        folder / WEIGHTS_FILE,
        config,
        check=check,
        hidden_size=hidden_size,
        num_experts=num_experts,
        file_name=lambda name: HEAD_PREFIX + name,
        why_missing=lambda missing: _why_missing(missing, num_experts),
    )
    return MixtureFolder(
        layout="peft",
        config=config,
        hidden_size=hidden_size,
        head=head,
        expert_names=tuple(names),
        experts=expert_folders(folder, settings, names) if find_experts else {},
        base_model_name=base_name_from(settings, "base_model_name_or_path", file),
        num_layers=num_layers,
    )


def write_peft_layout(temporary: Path, folder: Path, mixture: MixtureFolder, *, task_type: str | None) -> None:
    """Write all but the experts into `temporary`, which will become `folder`."""
    # In numerical order: PEFT goes by the order in the file, and its own, sorted file swaps experts from "10" on.
    adapters = {str(number): str(folder / str(number)) for number in range(mixture.num_experts)}
    settings: dict[str, Any] = {
        "peft_type": PEFT_TYPE,
        "task_type": task_type,
        "base_model_name_or_path": mixture.base_model_name,
        "inference_mode": True,
        "hidden_size": mixture.hidden_size,
        "adapters": adapters,
    }
    settings |= {name: getattr(mixture.config, name) for name in PEFT_SETTINGS}
    settings["scaling_pass_value"] = mixture.config.pass_value(mixture.num_experts)  # PEFT's file has no None
    text = json.dumps(settings, indent=2, allow_nan=False)
    (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    (temporary / NAMES_FILE).write_text(names_json(list(mixture.expert_names)), encoding="utf-8")
    tensors = {HEAD_PREFIX + name: tensor for name, tensor in mixture.head.items()}
    save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


def check_peft_can_hold(config: XLoraConfig) -> None:
    """Raise UnsupportedAdapterError if PEFT has no head like this."""
    if not config.use_bias:
        raise UnsupportedAdapterError(
            "use_bias is False, but PEFT's heads always have biases. Write layout='xlora', or train with use_bias=True."
        )
    if not config.enable_relu_and_dropout and config.xlora_depth > 1:
        raise UnsupportedAdapterError(
            f"enable_relu_and_dropout is False at xlora_depth={config.xlora_depth}, but PEFT's hidden layers always "
            "have a ReLU. Write layout='xlora', or train with enable_relu_and_dropout=True."
        )


def _why_missing(missing: list[str], num_experts: int) -> str:
    indices = {int(name.split(".")[1]) for name in missing}
    if any(index >= num_experts for index in indices):
        return "Save the mixture again."
    return (
        "PEFT (0.21) loses them when it saves: it leaves out every layer of the head whose number is also an expert's "
        f"name, here '0' to '{num_experts - 1}', and when it loads the folder, these layers are random. They can't be "
        "recovered from this folder. Where the trained model is still in memory, write them yourself: "
        "safetensors.torch.save_file({name: tensor for name, tensor in model.state_dict().items() if "
        f"'internal_xlora_classifier' in name}}, {WEIGHTS_FILE!r}); otherwise train the head again."
    )
