"""residual_config.json: what it may hold, and how it is checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_json
from loraplex.residual.config import BaseFingerprint, ResidualConfig
from loraplex.validation import is_whole, quoted

CONFIG_FILE = "residual_config.json"
WEIGHTS_FILE = "residual_model.safetensors"
FORMAT = "loraplex-residual"
VERSION = 1

Kind = Literal["linked", "vector"]

_COMMON = {"format", "format_version", "kind", "layers", "base"}
_OF_KIND: Mapping[Kind, set[str]] = {"linked": {"r", "alpha"}, "vector": set()}
_BASE = {"architecture": str, "hidden_size": int, "vocab_size": int, "num_heads": list}


class ResidualSettings(NamedTuple):
    """The content of a residual_config.json."""

    kind: Kind
    layers: tuple[int, ...]
    base: BaseFingerprint
    config: ResidualConfig | None  # of kind "linked"


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
