"""A PEFT model of `create_arrow_model` as its `save_pretrained` leaves it: experts, and the settings in arrow_router/.

Each adapter has a folder of its own, "task_0", "task_1", ..; the router is an adapter whose factors do nothing, with
`arrow_config` in its adapter_config.json. PEFT 0.21 itself can't load such a router again: it loses the experts' names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.weight_files import ARROW_ROUTER
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import read_object
from loraplex.routers.config import ArrowConfig
from loraplex.validation import listed, quoted

_KNOWN = {"top_k", "router_temperature", "use_gks", "task_adapter_names", "gks_adapter_names", "rng_seed"}
_GENERAL = re.compile(r"gks_\d+")


def is_peft_arrow_folder(folder: Path) -> bool:
    """Whether a folder holds the adapters of PEFT's Arrow, and its router among them."""
    return (folder / ARROW_ROUTER / CONFIG_FILE).is_file()


def read_peft_arrow(folder: Path) -> tuple[ArrowConfig, dict[str, Path], str | None]:
    """The settings, the experts' folders by name in the router's order, and the base model's name; no tensors.

    Raises AdapterFormatError, and UnsupportedAdapterError where the files don't tell what PEFT's model computed.
    """
    file = folder / ARROW_ROUTER / CONFIG_FILE
    content = read_object(file, AdapterFormatError)
    settings = content.get("arrow_config")
    if not isinstance(settings, Mapping):
        raise AdapterFormatError(f"{file}: arrow_config is {quoted(settings)}; it must be an object with settings.")
    unknown = sorted(settings.keys() - _KNOWN)
    if unknown:
        raise UnsupportedAdapterError(
            f"{file}: arrow_config has {quoted(unknown)}, which can't be honoured. Known: {', '.join(sorted(_KNOWN))}."
        )
    names = settings.get("task_adapter_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise AdapterFormatError(f"{file}: task_adapter_names is {quoted(names)}; it must list the experts' names.")
    _check_general(settings, file)
    _check_others(folder, names)
    name = content.get("base_model_name_or_path")
    return _config(settings, file), {n: folder / n for n in names}, name if isinstance(name, str) else None


def _config(settings: Mapping[str, Any], file: Path) -> ArrowConfig:
    seed = settings.get("rng_seed")
    try:
        return ArrowConfig(
            top_k=settings.get("top_k", 3),
            temperature=settings.get("router_temperature", 1.0),
            rng_seed=0 if seed is None else seed,  # None: PEFT starts its power method anywhere
        )
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _check_general(settings: Mapping[str, Any], file: Path) -> None:
    """Raise UnsupportedAdapterError where general experts are subtracted: before the first call, or already."""
    if settings.get("use_gks"):
        raise UnsupportedAdapterError(
            f"{file}: use_gks is true, and PEFT subtracts the general experts from the saved ones at the model's first "
            "call: the files don't tell whether that was before they were saved. Load the experts with load_adapter "
            "and make the mixture with create_mixture and ArrowConfig: with general_experts where the model hadn't "
            "been called, without where it had."
        )


def _check_others(folder: Path, names: list[str]) -> None:
    """Raise UnsupportedAdapterError for adapters that PEFT would route to as well: those added to the model later."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    others = [name for name in found if name not in (*names, ARROW_ROUTER) and not _GENERAL.fullmatch(name)]
    if others:
        raise UnsupportedAdapterError(
            f"{str(folder)!r} holds {listed(others)}, which arrow_config doesn't name: PEFT's Arrow also routes to "
            "adapters that were added later. Move them away if they are no experts, else load all experts with "
            "load_adapter and use create_mixture with ArrowConfig."
        )
