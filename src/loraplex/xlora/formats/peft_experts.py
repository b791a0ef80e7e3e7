"""Where the experts of a mixture in PEFT's layout are."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.adapters.peft.weight_files import check_files, weight_files
from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.errors import AdapterFormatError, AdapterNotFoundError
from loraplex.json_files import read_object
from loraplex.xlora.formats.settings import check_expert_names

NAMES_FILE = "loraplex.json"  # ours; PEFT ignores it

_REMNANTS = ("base_model.lora_model.", "base_model.internal_xlora_classifier.")


def count_experts(settings: Mapping[str, Any], file: Path) -> int:
    """The number of experts; raises AdapterFormatError unless they are named "0", "1", ..."""
    adapters = settings.get("adapters")
    if not isinstance(adapters, dict) or not adapters:
        raise AdapterFormatError(f"{file}: adapters is {adapters!r}; it must map the experts '0', '1', ... to folders.")
    if set(adapters) != {str(number) for number in range(len(adapters))}:
        raise AdapterFormatError(
            f"{file}: the experts are named {list(adapters)}. PEFT runs a mixture only if they are '0', '1', ..., and "
            "its file sorts names, so these don't tell which output of the head is whose. Name them by number, in the "
            "head's order."
        )
    return len(adapters)


def expert_names(folder: Path, num_experts: int) -> list[str]:
    """The experts' names in the head's order: those in NAMES_FILE, or else "0", "1", ..."""
    numbers = [str(number) for number in range(num_experts)]
    file = folder / NAMES_FILE
    if not file.is_file():
        return numbers
    names = read_object(file, AdapterFormatError).get("expert_names")
    if not isinstance(names, list) or len(names) != len(numbers):
        raise AdapterFormatError(
            f"{file}: expert_names is {names!r}; it must list {len(numbers)} names. Without the file the experts are "
            f"called {numbers}."
        )
    return check_expert_names(names, file)


def expert_folders(folder: Path, settings: Mapping[str, Any], names: list[str]) -> dict[str, Path | str]:
    """By name in the head's order, where the experts are: "0", "1", ... in `folder`, else what `adapters` gives.

    What PEFT's own save writes into "0", "1", ... is no adapter: blocks whose number is another expert's are
    missing, the base model is there. PEFT itself loads experts from the folders in `adapters`, so frozen
    experts are taken from there. Raises AdapterFormatError and AdapterNotFoundError.
    """
    numbers = [str(number) for number in range(len(names))]
    if not any((folder / number).is_dir() for number in numbers):
        return {name: _given(folder, settings, number) for name, number in zip(names, numbers, strict=True)}
    experts: dict[str, Path | str] = {}
    for name, number in zip(names, numbers, strict=True):
        check_files(folder / number)
        experts[name] = folder / number
        if _is_remnant(folder / number):
            _refuse_lost_training(folder / number, settings)
            experts[name] = _given(folder, settings, number)
    return experts


def names_json(names: list[str]) -> str:
    """The content of NAMES_FILE."""
    return json.dumps({"expert_names": names}, indent=2) + "\n"


def _given(folder: Path, settings: Mapping[str, Any], number: str) -> Path | str:
    """What `adapters` gives for one expert: an existing folder, or else a hub id."""
    given = settings["adapters"][number]
    if isinstance(given, str) and given:
        path = Path(os.path.expanduser(given))
        if os.path.exists(path):
            check_files(path)
            return path
        if given.count("/") == 1 and not given.startswith((".", "/", "~")):
            return given
    raise AdapterNotFoundError(
        f"expert {number!r} of the mixture in {str(folder)!r} is missing: its adapter_config.json gives {given!r}, "
        f"which is neither a folder nor a hub id. Put the expert into {str(folder / number)!r}."
    )


def _is_remnant(folder: Path) -> bool:
    """Whether PEFT's save of a whole mixture wrote this expert's folder."""
    for path in weight_files(folder):  # under the names that are in the files
        if path.suffix == ".safetensors":
            with open_tensor_file(path) as file:
                if any(name.startswith(_REMNANTS) for name in file.entries):
                    return True
    return False


def _refuse_lost_training(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("use_trainable_adapters"):
        raise AdapterFormatError(
            f"{str(folder)!r} is no whole adapter: PEFT's save of a mixture leaves out every block whose number is "
            "another expert's and adds the base model, so experts that were trained with the head "
            "(use_trainable_adapters) are lost. Save each expert from the model in memory, and put them into "
            "these folders."
        )
