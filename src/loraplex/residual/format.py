"""Residual adapters as folders: residual_config.json and residual_model.safetensors (docs/linked-adapters.md)."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.adapters.finite import require_finite
from loraplex.adapters.peft.record import RECORD_FILE, read_record, write_record
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import MAX_SETTINGS_BYTES, damaged_as, read_json
from loraplex.output_files import resolved
from loraplex.residual.modules import (
    BaseFingerprint,
    FunctionResidual,
    LinkedLayer,
    LinkedResidual,
    Residual,
    ResidualConfig,
    SteeringVector,
)
from loraplex.validation import is_whole, listed, quoted

CONFIG_FILE = "residual_config.json"
WEIGHTS_FILE = "residual_model.safetensors"
FORMAT = "loraplex-residual"
VERSION = 1

Kind = Literal["linked", "vector"]

_COMMON = {"format", "format_version", "kind", "layers", "base"}
_OF_KIND: Mapping[Kind, set[str]] = {"linked": {"r", "alpha"}, "vector": set()}
_BASE = {"architecture": str, "hidden_size": int, "vocab_size": int, "num_heads": list}
_REPLACEABLE = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, "README.md"}


class ResidualSettings(NamedTuple):
    """The content of a residual_config.json."""

    kind: Kind
    layers: tuple[int, ...]
    base: BaseFingerprint
    config: ResidualConfig | None  # of kind "linked"


def is_residual_folder(folder: str | Path) -> bool:
    """Whether a folder holds a residual adapter rather than a LoRA."""
    return (Path(folder) / CONFIG_FILE).is_file()


def read_residual(
    folder: str | Path, *, check: Callable[[ResidualSettings], None] | None = None
) -> LinkedResidual | SteeringVector:
    """Read a residual adapter, everything checked: settings, names, shapes and numbers.

    `check` sees the settings before a tensor is read, and may raise: a few bytes can ask for more memory than there is.
    Raises AdapterFormatError (files missing, damaged or not matching each other) and UnsupportedAdapterError (another
    version of the format).
    """
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        return _read(folder, check)


def _read(folder: Path, check: Callable[[ResidualSettings], None] | None) -> LinkedResidual | SteeringVector:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            found = listed(path.name for path in folder.iterdir()) if folder.is_dir() else "nothing"
            raise AdapterFormatError(
                f"{str(folder)!r} has no {name}; it holds {found}. A residual adapter is a folder with {CONFIG_FILE} "
                f"and {WEIGHTS_FILE}."
            )
    settings = read_settings(folder)
    if check is not None:
        check(settings)
    with open_tensor_file(folder / WEIGHTS_FILE) as file:
        shapes = _expected_shapes(settings)
        _check_entries(file, shapes)
        tensors = {name: file.read(name) for name in shapes}
    for name, tensor in tensors.items():
        require_finite(tensor, f"{folder / WEIGHTS_FILE}: {name!r}")
    if settings.config is None:
        vectors = {layer: tensors[f"layers.{layer}.vector"] for layer in settings.layers}
        return SteeringVector(vectors=vectors, base=settings.base)
    layers = {
        layer: LinkedLayer(
            a=tensors[f"layers.{layer}.a"],
            b=tensors[f"layers.{layer}.b"],
            head_logits=tensors[f"layers.{layer}.head_logits"],
        )
        for layer in settings.layers
    }
    return LinkedResidual(config=settings.config, layers=layers, base=settings.base, end_tokens=read_record(folder))


def write_residual(residual: Residual, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a residual adapter, all or nothing. A function can't be written: register it where it is used.

    Raises AdapterExistsError (the folder exists and `overwrite` is False, or holds more than a residual adapter),
    AdapterFormatError (weights that `read_residual` would refuse) and UnsupportedAdapterError.
    """
    folder = resolved(folder)
    settings, tensors = _content(residual)
    expected = _expected_shapes(settings)
    for name, tensor in tensors.items():
        require_finite(tensor, repr(name))
        if tuple(tensor.shape) != expected[name]:
            raise AdapterFormatError(f"{name!r} has shape {list(tensor.shape)}; expected {list(expected[name])}.")
    check = partial(check_destination, folder, "a residual adapter", _REPLACEABLE, overwrite=overwrite)
    with atomic_folder(folder, check) as temporary:
        (temporary / CONFIG_FILE).write_text(settings_as_json(settings), encoding="utf-8")
        write_record(temporary, residual.end_tokens if isinstance(residual, LinkedResidual) else ())
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)  # safetensors' own is for the owner only


def _content(residual: Residual) -> tuple[ResidualSettings, dict[str, Tensor]]:
    if isinstance(residual, FunctionResidual):
        raise UnsupportedAdapterError(
            "a function residual is Python code, which is not written to a folder. Register it under its name in the "
            "program that uses it."
        )
    if isinstance(residual, SteeringVector):
        tensors = {f"layers.{layer}.vector": _copy(vector) for layer, vector in residual.vectors.items()}
        return ResidualSettings("vector", tuple(residual.vectors), residual.base, None), tensors
    tensors = {}
    for layer, weights in residual.layers.items():
        tensors[f"layers.{layer}.a"] = _copy(weights.a)
        tensors[f"layers.{layer}.b"] = _copy(weights.b)
        tensors[f"layers.{layer}.head_logits"] = _copy(weights.head_logits)
    layers = tuple(residual.layers)
    config = ResidualConfig(r=residual.config.r, alpha=residual.config.alpha, layers=layers)
    return ResidualSettings("linked", layers, residual.base, config), tensors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _expected_shapes(settings: ResidualSettings) -> dict[str, tuple[int, ...]]:
    base: BaseFingerprint = settings.base
    if settings.config is None:
        return {f"layers.{layer}.vector": (base.hidden_size,) for layer in settings.layers}
    rank = settings.config.r
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in settings.layers:
        if layer >= len(base.num_heads):
            raise AdapterFormatError(
                f"the settings name layer {layer} of a base model with {len(base.num_heads)} attention layers."
            )
        shapes[f"layers.{layer}.a"] = shapes[f"layers.{layer}.b"] = (rank, base.hidden_size)
        shapes[f"layers.{layer}.head_logits"] = (rank, base.num_heads[layer])
    return shapes


def _check_entries(file: TensorFile, shapes: dict[str, tuple[int, ...]]) -> None:
    missing, extra = shapes.keys() - file.entries.keys(), file.entries.keys() - shapes.keys()
    if missing or extra:
        raise AdapterFormatError(
            f"{file.path} doesn't hold what its settings say: missing {listed(missing) or 'none'}, extra "
            f"{listed(extra) or 'none'}."
        )
    wrong = {name: file.entries[name].shape for name, shape in shapes.items() if file.entries[name].shape != shape}
    if wrong:
        name = min(wrong)
        raise AdapterFormatError(
            f"{file.path}: {name!r} has shape {list(wrong[name])}; expected {list(shapes[name])} ({len(wrong)} tensors "
            "have wrong shapes)."
        )


# The settings


def settings_as_json(settings: ResidualSettings) -> str:
    """The file's content."""
    content: dict[str, Any] = {"format": FORMAT, "format_version": VERSION, "kind": settings.kind}
    if settings.config is not None:
        content |= {"r": settings.config.r, "alpha": settings.config.alpha}
    content |= {"layers": list(settings.layers), "base": settings.base.as_json()}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_settings(folder: Path) -> ResidualSettings:
    """Read and check `folder`/residual_config.json. Raises AdapterFormatError or UnsupportedAdapterError."""
    file = folder / CONFIG_FILE
    try:
        content = read_json(file, max_bytes=MAX_SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{file} can't be read as JSON: {error}. Restore or write it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise AdapterFormatError(f"{file} has the format {quoted(found)}; expected {FORMAT!r}.")
    if content.get("format_version") != VERSION:
        raise UnsupportedAdapterError(
            f"{file} has format_version {quoted(content.get('format_version'))}; this loraplex reads version "
            f"{VERSION}. Use the loraplex that wrote it, or a newer one."
        )
    kind = _kind(file, content.get("kind"))
    _check_keys(file, content, _COMMON | _OF_KIND[kind])
    try:
        layers = _layers(content["layers"])
        config = ResidualConfig(r=content["r"], alpha=content["alpha"], layers=layers) if kind == "linked" else None
        return ResidualSettings(kind, layers, _base(content["base"]), config)
    except (ConfigError, TypeError, ValueError) as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _kind(file: Path, kind: object) -> Kind:
    if kind == "linked" or kind == "vector":
        return kind
    raise UnsupportedAdapterError(f"{file} has the kind {quoted(kind)}; known: {sorted(_OF_KIND)}.")


def _check_keys(file: Path, content: Mapping[str, Any], expected: set[str]) -> None:
    missing, unknown = sorted(expected - content.keys()), sorted(content.keys() - expected)
    if missing or unknown:
        raise AdapterFormatError(f"{file} lacks {missing} and has the unknown {unknown}; expected {sorted(expected)}.")


def _layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, list):
        raise TypeError(f"layers is {quoted(layers)}; it must be a list of layer numbers.")
    return ResidualConfig(layers=tuple(layers)).layers or ()


def _base(base: object) -> BaseFingerprint:
    if not isinstance(base, dict) or not base.keys() >= _BASE.keys() or base.keys() - _BASE.keys() - {"name"}:
        raise ValueError(f"base is {quoted(base)}; it must be an object with {sorted(_BASE)} and, if known, name.")
    for key, kind in _BASE.items():
        if type(base[key]) is not kind:
            raise TypeError(f"base.{key} is {quoted(base[key])}; it must be a JSON {kind.__name__}.")
    num_heads = tuple(base["num_heads"])
    sizes = (base["hidden_size"], base["vocab_size"], *num_heads)
    if not num_heads or not all(is_whole(size) and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"base is {quoted(base)}; its sizes must be whole numbers.")
    if base.get("name") is not None and not isinstance(base["name"], str):
        raise ValueError(f"base.name is {quoted(base['name'])}; it must be a text or null.")
    return BaseFingerprint(
        architecture=base["architecture"],
        hidden_size=base["hidden_size"],
        vocab_size=base["vocab_size"],
        num_heads=num_heads,
        name=base.get("name"),
    )
