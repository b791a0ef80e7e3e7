"""What a key may do: the schema of the file of keys, in which nothing is guessed."""

import json
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loraplex.errors import ConfigError

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
Limit = Annotated[int, Field(ge=1, le=2**53)]
_MAX_FAULTS = 5
_FIX = "Make one with `loraplex key create`."


class _Strict(BaseModel):
    """Unknown fields are errors, and so are values of another type, such as a text in the place of a list."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class KeyRecord(_Strict):
    """What a key may do, and the hash by which it is known."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    note: Annotated[str, Field(max_length=1000)] = ""
    use: tuple[Pattern, ...] = ("*",)  # patterns of the names that requests may use; experts of a mixture count
    load: tuple[Pattern, ...] = ()  # of those that it may load, replace, pin and unload
    roots: tuple[PathText, ...] = ()  # folders below which it may load, in those of the server
    manage: bool = False  # everything: all names, all adapters, all folders of the server
    base: bool = True  # the base model itself
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None  # prompt and answers
    max_concurrent: Limit | None = None  # requests at once
    max_new_tokens: Limit | None = None  # of an answer
    max_priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    shared_prefixes: bool = False  # share the prefix cache with other keys that do
    created: Annotated[int, Field(ge=0)] = 0  # seconds since 1970

    @field_validator("roots")
    @classmethod
    def _check_roots(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        for root in roots:
            if "\0" in root or ".." in PurePath(root).parts:
                raise ValueError(f"the root {root!r} has a zero byte, or leads up with '..'")
        return roots


class _Keys(_Strict):
    keys: tuple[KeyRecord, ...]


def make_record(**values: Any) -> KeyRecord:
    """Raises ConfigError that names what is wrong."""
    try:
        return KeyRecord(**values)
    except ValidationError as error:
        raise ConfigError(f"no key can be made of this: {_told(error)}.") from None


def parse_keys(text: str, source: str) -> dict[str, KeyRecord]:
    """The records of a file by their ids. Raises ConfigError for whatever is in doubt."""
    try:
        json.loads(text, object_pairs_hook=_once)
        records = _Keys.model_validate_json(text).keys
    except ValidationError as error:
        raise ConfigError(
            f"{source} is no file of keys: {_told(error)}. Make one with `loraplex key create`."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is no file of keys: {error}. Make one with `loraplex key create`.") from None
    by_id = {record.id: record for record in records}
    if len(by_id) < len(records):
        raise ConfigError(f"{source} has several keys of one id. Ids are {sorted(record.id for record in records)}.")
    return by_id


def write_keys(records: dict[str, KeyRecord]) -> str:
    """What `parse_keys` reads."""
    return _Keys(keys=tuple(records.values())).model_dump_json(indent=2) + "\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields: with two of one name, readers differ in which they take."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"an object has a field twice: {sorted(name for name, _ in pairs)}")
    return fields


def _told(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    told = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:_MAX_FAULTS]]
    return "; ".join(told)
