"""A mixture's settings in a JSON file, checked by name."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loraplex.adapters.names import check_name
from loraplex.errors import AdapterFormatError, ConfigError, NameFormatError, UnsupportedAdapterError
from loraplex.validation import quoted
from loraplex.xlora.config import XLoraConfig

ORIGINAL_ONLY = ("use_bias", "enable_relu_and_dropout")  # settings that PEFT doesn't have
ALL_SETTINGS = tuple(field.name for field in fields(XLoraConfig))
PEFT_SETTINGS = tuple(name for name in ALL_SETTINGS if name not in ORIGINAL_ONLY)


def config_from(settings: Mapping[str, Any], names: tuple[str, ...], file: Path, **defaults: Any) -> XLoraConfig:
    """The XLoraConfig of those of `settings` that are in `names`; `defaults` stand in for absent ones."""
    known = defaults | {name: settings[name] for name in names if name in settings}
    try:
        return XLoraConfig(**known)
    except ConfigError as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def refuse_unknown(settings: Mapping[str, Any], known: frozenset[str], file: Path) -> None:
    """Raise UnsupportedAdapterError if a setting outside of `known` has a value."""
    unknown = {name: value for name, value in settings.items() if name not in known and value}
    if unknown:
        raise UnsupportedAdapterError(
            f"{file}: unknown settings {quoted(unknown)}. They may change what the mixture computes, so they are not "
            f"ignored; remove them if they don't. Known: {sorted(known)}."
        )


def base_name_from(settings: Mapping[str, Any], key: str, file: Path) -> str | None:
    """The base model's name, if the file gives one; raises AdapterFormatError for what is no text."""
    value = settings.get(key)
    if value is not None and not isinstance(value, str):
        raise AdapterFormatError(f"{file}: {key} is {quoted(value)}; it must be a text or null.")
    return value


def hidden_size_from(settings: Mapping[str, Any], file: Path) -> int:
    """The base model's hidden size; raises AdapterFormatError if the file doesn't give it."""
    value = settings.get("hidden_size")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterFormatError(
            f"{file}: hidden_size is {value!r}; it must be the base model's hidden size, a whole number."
        )
    return value


def check_expert_names(names: list[Any], file: Path) -> list[str]:
    """Return `names` if they can name a mixture's experts, each once."""
    for name in names:
        try:
            check_name(name)
        except NameFormatError as error:
            raise AdapterFormatError(f"{file}: {error}") from error
    if not names or len(set(names)) < len(names):
        raise AdapterFormatError(
            f"{file}: the experts are {quoted(names)}; a mixture has at least one, each named once."
        )
    return names
