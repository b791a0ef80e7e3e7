"""Settings of many jobs from a YAML file: the tables and settings of the TOML file, with errors that name the line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loraplex.cli.job_options import LISTS, READERS, Settings, kind_of, make_job
from loraplex.errors import ConfigError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_text
from loraplex.validation import quoted

_MANY = 10_000  # jobs
_NULL = "tag:yaml.org,2002:null"


def read_yaml_jobs(path: Path) -> dict[str, Settings]:
    """By job, the settings of `defaults:`, then those of the job under `jobs:`. Raises ConfigError with file and line.

    A value is read as the option of its name would be, so that 1e-3 is a number here too.
    """
    root = _parse(path)
    tables = _mapping(path, root, "the file")
    unknown = [key for key in tables if key not in ("defaults", "jobs")]
    if unknown:
        line = _line(tables[unknown[0]][0])
        raise ConfigError(f"{path}:{line}: {quoted(unknown[0])} is unknown; a file of jobs has defaults and jobs.")
    if "jobs" not in tables:
        raise ConfigError(f"{path} has no jobs; write jobs: and below it the name of each, with its settings.")
    defaults = _settings(path, tables["defaults"][1], "defaults") if "defaults" in tables else {}
    jobs = _mapping(path, tables["jobs"][1], "jobs")
    if len(jobs) > _MANY:
        raise ConfigError(f"{path} has {len(jobs)} jobs; at most {_MANY} are possible.")
    made = {}
    for name, (_, node) in jobs.items():
        lines = defaults | _settings(path, node, f"job {name!r}")
        made[name] = {setting: value for setting, (value, _) in lines.items()}
        _check_job(path, name, made[name], {setting: line for setting, (_, line) in lines.items()})
    return made


def _parse(path: Path) -> yaml.Node:
    try:
        node = yaml.compose(read_text(path, MAX_SETTINGS_BYTES), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ConfigError(f"{path}{line}: the file of jobs can't be read as YAML: {error.problem}.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"the file of jobs {str(path)!r} can't be read as YAML: {error}.") from error
    if node is None:
        raise ConfigError(f"the file of jobs {str(path)!r} is empty; write jobs: and below it the name of each.")
    return node


def _mapping(path: Path, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """By key, the nodes of key and value."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{_line(node)}: {what} must be a mapping, a line `name: value` for each entry.")
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{_line(key)}: {what} has a key that is no text.")
        if key.value in entries:
            raise ConfigError(f"{path}:{_line(key)}: {what} has {quoted(key.value)} twice. Remove one.")
        entries[key.value] = (key, value)
    return entries


def _settings(path: Path, node: yaml.Node, what: str) -> dict[str, tuple[Any, int]]:
    """By setting, its value and line."""
    found = {}
    for setting, (key, value) in _mapping(path, node, what).items():
        where = f"{path}:{_line(key)}"
        if setting not in READERS:
            raise ConfigError(
                f"{where}: {what} has the unknown setting {quoted(setting)}; possible: {sorted(READERS)}."
            )
        found[setting] = (_value(where, setting, value), _line(key))
    return found


def _value(where: str, setting: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode) and setting in LISTS:
        return [_item(where, setting, item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: {setting} must be {kind_of(setting)}.")
    text = "none" if node.tag == _NULL else node.value
    try:
        return READERS[setting](text)
    except ValueError:
        raise ConfigError(f"{where}: {setting} is {quoted(text)}; it must be {kind_of(setting)}.") from None


def _item(where: str, setting: str, node: yaml.Node, *, is_pair: bool = False) -> Any:
    """A number or a text, or a folder with its weight: no deeper, since a few aliases can stand for any number."""
    if isinstance(node, yaml.ScalarNode):
        return yaml.SafeLoader("").construct_object(node)
    if is_pair or setting != "after" or not isinstance(node, yaml.SequenceNode) or len(node.value) != 2:
        raise ConfigError(f"{where}: {setting} has an entry that is neither a number nor a text.")
    return tuple(_item(where, setting, part, is_pair=True) for part in node.value)


def _check_job(path: Path, name: str, settings: Settings, lines: Mapping[str, int]) -> None:
    """Raise ConfigError with the line of the one setting without which the job could be made.

    What has no such setting (data that an option gives, for example) is for the command to tell.
    """
    error = _error_of(name, settings)
    if error is None:
        return
    for setting, line in lines.items():
        rest = {key: value for key, value in settings.items() if key != setting}
        if _error_of(name, rest) is None:
            raise ConfigError(f"{path}:{line}: {setting}: {error}") from error


def _error_of(name: str, settings: Settings) -> ConfigError | None:
    try:
        make_job(name, {"data": "data"} | settings, "")
    except ConfigError as error:
        return error
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
