"""What settings of the original package mean where a file doesn't have them: it depends on the file's age.

The package (github.com/EricLBuehler/xlora) has no version in its files. Before 2024-01-27 there was no use_bias, before
2024-02-09 no scaling_pass_value (1 / experts was used), before 2024-02-23 no list of experts, which then was an object
until 2024-03-09, when base_model_id came and, five days earlier, stop_token_id went. enable_relu_and_dropout was off by
default before 2024-04-11.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.errors import UnsupportedAdapterError
from loraplex.validation import is_whole, listed


def defaults_of_era(settings: Mapping[str, Any], head_file: Path, file: Path) -> dict[str, Any]:
    """The values of settings that `file` doesn't have, as far as they aren't XLoraConfig's own.

    Raises UnsupportedAdapterError where neither the other settings nor the head's tensors tell.
    """
    defaults: dict[str, Any] = {"scaling_pass_value": None}
    if {"use_bias", "enable_relu_and_dropout"} <= settings.keys():
        return defaults
    with open_tensor_file(head_file) as tensors:
        names = tuple(tensors.entries)
    if "use_bias" not in settings:
        defaults["use_bias"] = _has_biases(names, head_file)
    if "enable_relu_and_dropout" not in settings:
        defaults["enable_relu_and_dropout"] = _has_relu(settings, names, file)
    return defaults


def _has_biases(names: Collection[str], head_file: Path) -> bool:
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    with_bias = {layer for layer in layers if f"{layer}.bias" in names}
    if with_bias and with_bias != layers:
        raise UnsupportedAdapterError(
            f"{head_file} has no biases in {listed(layers - with_bias)}, but in its other layers: only versions of the "
            "package of one day, 2024-01-26, made such a head. Train the head with a later version."
        )
    return bool(with_bias)


def _has_relu(settings: Mapping[str, Any], names: Collection[str], file: Path) -> bool:
    """Whether ReLU and dropout stand between the hidden layers, which are numbered inner.0, inner.3, ... then."""
    depth = settings.get("xlora_depth", 1)
    if not is_whole(depth) or depth == 1:
        return True  # nothing between
    if depth > 2:
        return "inner.1.weight" not in names
    if _is_before_april_2024(settings):
        return False
    raise UnsupportedAdapterError(
        f"{file} has no enable_relu_and_dropout: the package took that for false before 2024-04-11 and for true from "
        'then on, and a head of depth 2 has the same tensors in both cases. Add "enable_relu_and_dropout": true or '
        "false to the file."
    )


def _is_before_april_2024(settings: Mapping[str, Any]) -> bool:
    has_list = isinstance(settings.get("adapters"), list)
    return not has_list or "base_model_id" not in settings or "stop_token_id" in settings
