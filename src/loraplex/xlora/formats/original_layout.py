"""The original package's layout: xlora_config.json, xlora_classifier.safetensors, experts in folders by name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from loraplex.adapters.peft.weight_files import check_files
from loraplex.errors import AdapterFormatError, AdapterNotFoundError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import read_object
from loraplex.validation import listed
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.eras import defaults_of_era
from loraplex.xlora.formats.head_file import HeadCheck, read_head, require_head_file
from loraplex.xlora.formats.mixture_folder import MixtureFolder
from loraplex.xlora.formats.ordering import Ordering, read_ordering
from loraplex.xlora.formats.settings import (
    ALL_SETTINGS,
    base_name_from,
    check_expert_names,
    config_from,
    hidden_size_from,
    refuse_unknown,
)
from loraplex.xlora.head import linear_indices

SETTINGS_FILE = "xlora_config.json"
HEAD_FILE = "xlora_classifier.safetensors"
PICKLE_FILE = "xlora_classifier.pt"

_KNOWN = frozenset({*ALL_SETTINGS, "adapters", "base_model_id", "device", "hidden_size", "stop_token_id"})
# The package's own order of its settings.
_ORDER = (
    *("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "xlora_depth", "xlora_size"),
    *("enable_relu_and_dropout", "use_bias", "xlora_dropout_p", "use_trainable_adapters", "softmax_temperature"),
    *("top_k_lora", "scaling_pass_value", "global_scaling_weight"),
)


def read_original_layout(
    folder: Path, *, find_experts: bool, check: HeadCheck | None = None, order: Sequence[str] | None = None
) -> MixtureFolder:
    """Read a mixture that the original package, or `write_mixture_folder(layout="xlora")`, saved.

    `order` names the experts in the head's order, for folders that don't say it.
    """
    file = folder / SETTINGS_FILE
    settings = read_object(file, AdapterFormatError)
    if "use_mean_pool" in settings:
        raise UnsupportedAdapterError(
            f"{file}: use_mean_pool is {settings['use_mean_pool']!r}: until January 2024 the package had one scaling "
            "for a whole sequence, which can't be honoured. Train the head with a later version."
        )
    refuse_unknown(settings, _KNOWN, file)
    require_head_file(folder / HEAD_FILE, (PICKLE_FILE,))
    config = config_from(settings, ALL_SETTINGS, file, **defaults_of_era(settings, folder / HEAD_FILE, file))
    ordering = _ordering(settings, folder, order)
    names = check_expert_names(list(ordering.experts), file)
    try:
        config.check_num_experts(len(names))
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}") from error
    hidden_size = hidden_size_from(settings, file)
    head, num_layers = read_head(
        folder / HEAD_FILE,
        config,
        check=check,
        hidden_size=hidden_size,
        num_experts=len(names),
        file_name=head_names(config).__getitem__,
        why_missing=lambda missing: "Copy or download the file again.",
    )
    return MixtureFolder(
        layout="xlora",
        config=config,
        hidden_size=hidden_size,
        head=head,
        expert_names=tuple(names),
        experts={name: _expert_folder(folder, name) for name in names} if find_experts else {},
        base_model_name=base_name_from(settings, "base_model_id", file),
        num_layers=num_layers,
        layers=ordering.layers,
    )


def write_original_layout(folder: Path, mixture: MixtureFolder) -> None:
    """Write all but the experts into `folder`; exactly the settings that the package's config takes."""
    settings: dict[str, Any] = {
        "hidden_size": mixture.hidden_size,
        "base_model_id": mixture.base_model_name,
        "adapters": list(mixture.expert_names),
    }
    settings |= {name: getattr(mixture.config, name) for name in _ORDER}
    settings["scaling_pass_value"] = mixture.config.pass_value(mixture.num_experts)  # the package's has no None
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, allow_nan=False), encoding="utf-8")
    to_file = head_names(mixture.config)
    tensors = {to_file[name]: tensor for name, tensor in mixture.head.items()}
    save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})


def head_names(config: XLoraConfig) -> dict[str, str]:
    """By ScalingHead's name of a tensor, the package's: `inner.{i}` for hidden layers, `last`.

    The package counts ReLU and dropout as one layer each, even where the dropout is 0; PEFT leaves that out.
    """
    stride = 3 if config.enable_relu_and_dropout else 1
    *hidden, last = linear_indices(config)
    modules = {index: f"inner.{stride * layer}" for layer, index in enumerate(hidden)} | {last: "last"}
    parts = ("weight", "bias") if config.use_bias else ("weight",)
    return {f"layers.{index}.{part}": f"{module}.{part}" for index, module in modules.items() for part in parts}


def _ordering(settings: Mapping[str, Any], folder: Path, order: Sequence[str] | None) -> Ordering:
    """The experts in the head's order: from the settings, else the caller, else mistral.rs's ordering file."""
    adapters = settings.get("adapters")
    if isinstance(adapters, dict | list) and adapters:
        return Ordering(experts=tuple(adapters))
    if adapters is not None:
        raise AdapterFormatError(
            f"{folder / SETTINGS_FILE}: adapters is {adapters!r}; it must list the experts' names."
        )
    found = read_ordering(folder)
    if order is not None:
        return Ordering(experts=tuple(order), layers=None if found is None else found.layers)
    if found is not None:
        return found
    there = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    raise AdapterFormatError(
        f"{folder / SETTINGS_FILE}: adapters is None (versions of the package before 2024-02-23 didn't save it), and "
        "the experts' order, in which the head was trained, is needed. The folder's adapters are "
        f"{listed(there) or 'elsewhere'}: name them in the head's order, load_mixture(name, folder, experts=[...]), or "
        "put mistral.rs's ordering file into the folder."
    )


def _expert_folder(folder: Path, name: str) -> Path:
    """Where the package saved an expert; earlier versions had them in "adapters", and PEFT puts "default" on top."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise AdapterFormatError(f"{str(folder)!r} names an expert {name!r}, which would lie outside of it. Rename it.")
    places = [folder / name, folder / "adapters" / name, *([folder] if name == "default" else [])]
    for place in places:
        if (place / "adapter_config.json").is_file():
            check_files(place)
            return place
    raise AdapterNotFoundError(
        f"expert {name!r} of the mixture in {str(folder)!r} is missing: there is no adapter in {str(places[0])!r}. "
        "Copy it there."
    )
