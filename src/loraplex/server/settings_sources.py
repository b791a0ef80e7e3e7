"""Settings from defaults, a file, the environment and flags: each goes before those named earlier."""

import dataclasses
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from loraplex.environment import OFF, ON
from loraplex.errors import ConfigError
from loraplex.json_files import MAX_SETTINGS_BYTES, damaged_as, parse_json, read_text
from loraplex.server.settings import ServeConfig
from loraplex.server.settings_help import HELP

PREFIX = "LORAPLEX_SERVE_"
_EXACT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One setting: the section that it belongs to, its name, its type and its default."""

    section: str
    name: str
    type: Any
    default: Any
    help: str

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def is_optional(self) -> bool:
        return types.NoneType in typing.get_args(self.type)

    @property
    def kind(self) -> Any:
        """str, int, float, bool, tuple or Mapping."""
        kinds = [kind for kind in typing.get_args(self.type) if kind is not types.NoneType]
        plain = kinds[0] if self.is_optional else self.type
        return typing.get_origin(plain) or plain


def options() -> Iterator[Option]:
    """Every setting of every section; names are unique."""
    for section, instance in _sections(ServeConfig()):
        hints = typing.get_type_hints(type(instance))
        for field in dataclasses.fields(instance):
            yield Option(
                section=section,
                name=field.name,
                type=hints[field.name],
                default=getattr(instance, field.name),
                help=field.metadata.get("help", HELP.get(field.name, f"{section.capitalize()}: docs/engine.md.")),
            )


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> ServeConfig:
    """Raises ConfigError, which names the option, where its value came from, and what it may be."""
    known = {option.name: option for option in options()}
    values = {option.name: option.default for option in known.values()}
    if file is not None:
        values |= _from_file(file, known)
    values |= _from_environment(os.environ if environment is None else environment, known)
    for name, value in (flags or {}).items():
        values[name] = _checked(known[name], value, f"--{name.replace('_', '-')}")
    sections = {}
    for section, instance in _sections(ServeConfig()):
        names = [field.name for field in dataclasses.fields(instance)]
        with damaged_as(ConfigError, f"the section [{section}] of the settings"):  # a path that is too long
            sections[section] = type(instance)(**{name: values[name] for name in names})
    return ServeConfig(**sections)


def as_toml(config: ServeConfig) -> str:
    """The settings as a file that gives them again."""
    lines = []
    for section, instance in _sections(config):
        lines.append(f"[{section}]")
        for field in dataclasses.fields(instance):
            value = getattr(instance, field.name)
            lines.append(f"# {field.name}: none" if value is None else f"{field.name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def _sections(config: ServeConfig) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        yield field.name, getattr(config, field.name)


def _from_file(file: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    try:
        text = read_text(file, MAX_SETTINGS_BYTES)
        tables = parse_json(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the settings in {str(file)!r} can't be read: {error}.") from error
    if not isinstance(tables, dict):
        raise ConfigError(f"the settings in {str(file)!r} are a JSON {type(tables).__name__}; they must be an object.")
    values: dict[str, Any] = {}
    names = sorted({option.section for option in known.values()})
    for section, table in tables.items():
        if section not in names or not isinstance(table, dict):
            raise ConfigError(f"{file}: {section!r} is no section. Sections: {names}.")
        for name, value in table.items():
            if name not in known or known[name].section != section:
                own = sorted(option.name for option in known.values() if option.section == section)
                raise ConfigError(f"{file}: [{section}] has no option {name!r}. It has {own}.")
            values[name] = _checked(known[name], value, f"{file}: [{section}] {name}")
    return values


def _from_environment(environment: Mapping[str, str], known: Mapping[str, Option]) -> dict[str, Any]:
    by_variable = {option.variable: option for option in known.values()}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        if variable not in by_variable:
            raise ConfigError(f"the environment variable {variable} is no option. Options: {sorted(by_variable)}.")
        if not text.strip():  # the same as not set: it must not undo what a file says
            continue
        option = by_variable[variable]
        values[option.name] = _checked(option, _from_text(option, text, variable), variable)
    return values


def _from_text(option: Option, text: str, source: str) -> Any:
    """Lists are separated by commas, mappings are NAME=VALUE separated by commas; "none" where that is possible."""
    if option.is_optional and text.lower() == "none":
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if option.kind is tuple:
        return parts
    if option.kind is Mapping:
        if not all("=" in part for part in parts):
            raise ConfigError(f"{source} is {text!r}; it must be NAME=VALUE,NAME=VALUE.")
        return dict(part.split("=", 1) for part in parts)
    if option.kind is bool:
        if text.lower() not in (*ON, *OFF):
            raise ConfigError(f"{source} is {text!r}; it must be one of {[*ON, *OFF]}.")
        return text.lower() in ON
    try:
        return option.kind(text)
    except ValueError:
        raise ConfigError(f"{source} is {text!r}; it must be {_name(option)}.") from None


def _checked(option: Option, value: Any, source: str) -> Any:
    """The value, if it has the option's type."""
    try:
        return TypeAdapter(option.type, config=_EXACT).validate_python(
            tuple(value) if isinstance(value, list) else value
        )
    except ValidationError:
        raise ConfigError(f"{source} is {value!r}; it must be {_name(option)}.") from None


def _name(option: Option) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of texts"}
    return str(kinds.get(option.kind, "a table of texts"))


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {json.dumps(text)}" for key, text in value.items()) + "}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
