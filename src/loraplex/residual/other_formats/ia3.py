"""(IA)^3 as PEFT saves it: adapter_config.json with peft_type IA3, and a vector "MODULE.ia3_l" for each module."""

import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.finite import require_finite
from loraplex.adapters.patterns import find_matches
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.known_settings import HARMLESS, METADATA
from loraplex.adapters.peft.weight_files import WEIGHTS_FILE
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.adapters.weights import ModuleShape
from loraplex.errors import AdapterFormatError, ConfigError, LoraplexError, UnsupportedAdapterError
from loraplex.json_files import damaged_as, read_object
from loraplex.residual.gates import GateResidual
from loraplex.validation import listed, quoted

_PREFIX, _SUFFIX = "base_model.model.", ".ia3_l"
_KNOWN = {
    *("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "modules_to_save"),
    *("init_ia3_weights", "task_type", "base_model_name_or_path"),
    *HARMLESS,
    *METADATA,
}


def is_ia3_folder(folder: str | Path) -> bool:
    """Whether a folder holds PEFT's IA3."""
    file = Path(folder) / CONFIG_FILE
    if not os.path.isfile(file):  # False for a name that is too long, too
        return False
    try:
        return read_object(file, AdapterFormatError).get("peft_type") == "IA3"
    except LoraplexError:
        return False  # whoever reads it says what is wrong


def read_ia3(folder: str | Path) -> GateResidual:
    """The gates in a folder. Raises AdapterFormatError and UnsupportedAdapterError."""
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        settings = read_object(folder / CONFIG_FILE, AdapterFormatError)
        _check_settings(folder / CONFIG_FILE, settings)
        gates = _read_gates(folder / WEIGHTS_FILE)
    try:
        _check_targets(folder / CONFIG_FILE, settings, gates)
        inputs = _feedforward(settings.get("feedforward_modules"), gates)
    except (ConfigError, TypeError) as error:
        raise AdapterFormatError(f"{folder / CONFIG_FILE}: {error}") from error
    wrong = [path for path, gate in gates.items() if gate.ndim != 2 or gate.shape[0 if path in inputs else 1] != 1]
    if wrong:
        raise AdapterFormatError(
            f"{folder / WEIGHTS_FILE}: {listed(wrong)} have other shapes than [out, 1], or [1, in] of "
            "feedforward_modules."
        )
    return GateResidual(
        outputs={path: gate.flatten() for path, gate in gates.items() if path not in inputs},
        inputs={path: gate.flatten() for path, gate in gates.items() if path in inputs},
    )


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "IA3":
        raise UnsupportedAdapterError(f"{file}: peft_type is {quoted(settings.get('peft_type'))}, not 'IA3'.")
    unknown = sorted(settings.keys() - _KNOWN)
    if unknown:
        raise UnsupportedAdapterError(
            f"{file} has the unknown settings {listed(unknown)}, which may change what the adapter computes. Take them "
            "out where you know that they don't."
        )
    if settings.get("modules_to_save"):
        raise UnsupportedAdapterError(
            f"{file}: modules_to_save is {quoted(settings['modules_to_save'])}; gates alone are loaded. Train it "
            "without."
        )


def _read_gates(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise AdapterFormatError(f"{str(file.parent)!r} has no {file.name}. Save it with safetensors: save_pretrained.")
    with open_tensor_file(file) as opened:
        foreign = [n for n in opened.entries if not (n.startswith(_PREFIX) and n.endswith(_SUFFIX))]
        if foreign or not opened.entries:
            raise AdapterFormatError(
                f"{file} holds {listed(foreign) or 'nothing'}; IA3 has {_PREFIX}MODULE{_SUFFIX} alone."
            )
        gates = {name[len(_PREFIX) : -len(_SUFFIX)]: opened.read(name) for name in opened.entries}
    for path, gate in gates.items():
        require_finite(gate, f"{file}: {path!r}")
    return gates


def _check_targets(file: Path, settings: Mapping[str, Any], gates: Mapping[str, Tensor]) -> None:
    """Raise unless all gates are of targeted modules: PEFT leaves out others."""
    targets, excluded = (_names(settings.get(name)) for name in ("target_modules", "exclude_modules"))
    if targets is None:
        return  # PEFT writes what it chose; an older file's gates tell
    shapes = {path: ModuleShape(kind="linear", in_features=1, out_features=1) for path in gates}
    config = LoraConfig(target_modules=targets, exclude_modules=excluded)
    others = gates.keys() - set(expected_targets(config, shapes))
    if others:
        raise AdapterFormatError(f"{file} doesn't target {listed(others)}, for which there are gates.")


def _names(value: object) -> tuple[str, ...] | str | None:
    return tuple(value) if isinstance(value, list) else value  # type: ignore[return-value]


def _feedforward(names: object, gates: Mapping[str, Tensor]) -> set[str]:
    """The modules whose inputs are gated (PEFT's `IA3Model._check_target_module_feedforward`); by shape, where null."""
    if names is None:
        return {path for path, gate in gates.items() if gate.ndim == 2 and gate.shape[0] == 1}
    if isinstance(names, str):
        return set(find_matches("feedforward_modules", names, tuple(gates)))
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"feedforward_modules is {quoted(names)}; it is a pattern, or a list of names.")
    return {path for path in gates if any(path.endswith(name) for name in names)}
