"""API keys at rest: a file with salted hashes, never the keys themselves."""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from loraplex.errors import ConfigError
from loraplex.json_files import open_regular

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
    max_training_runs: Limit | None = None  # at work at once
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


_PREFIX = "lpx"
TINKER_PREFIX = "tml-"  # that the Tinker SDK asks of a key; with and without it, a key is the same
_SCRYPT = {"n": 2**10, "r": 8, "p": 1}  # a key's secret is 256 random bits, which no hash has to slow down guessing of
_RELOAD_S = 1.0  # how soon a changed file is seen
_LOCK_TIMEOUT_S = 10.0
_LARGEST_FILE = 2**22  # bytes: some 8,000 keys

_Records = dict[str, KeyRecord]
_Version = tuple[int, int, int]  # time of the last change, size and inode of a file


class KeyFile:
    """The keys of a file. Changes of the file are seen within a second; a file in doubt opens nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._looked = -_RELOAD_S
        self._version: _Version | None = None
        self._fault: ConfigError | None = None
        # Replaced together: the records, and those of keys that were checked against them, by a hash of the whole key
        # that only this process can compute.
        self._known: tuple[_Records, dict[bytes, KeyRecord]] = ({}, {})
        self._pepper = secrets.token_bytes(32)

    # Asking

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key, or None. Raises ConfigError for a file that is in doubt."""
        return self.known(key) or self.check(key)

    def known(self, key: str) -> KeyRecord | None:
        """The record of a key that was found before, in microseconds; reads the file again if it has changed."""
        self._reload()
        return self._known[1].get(self._digest(key))

    def check(self, key: str) -> KeyRecord | None:
        """The record of any key, in milliseconds; as slow for an unknown id as for a wrong secret. From any thread."""
        records, seen = self._known
        whole, key = key, key.removeprefix(TINKER_PREFIX)
        _, _, rest = key.partition(f"{_PREFIX}_")
        key_id, _, secret = rest.partition("_")
        record = records.get(key_id)
        salt, expected = (record.salt, record.hash) if record is not None else ("00" * 16, "00" * 32)
        matches = hmac.compare_digest(_hashed(secret, salt), expected)
        if record is None or not matches or not key.startswith(f"{_PREFIX}_"):
            return None
        seen[self._digest(whole)] = record
        return record

    def records(self) -> list[KeyRecord]:
        """All keys, oldest first. Raises ConfigError for a file that can't be read."""
        self._looked, self._version = -_RELOAD_S, None
        self._reload()
        return list(self._known[0].values())

    # Changing

    def create(self, **permissions: Any) -> tuple[str, KeyRecord]:
        """Make a key; returns it, which is written nowhere, and its record. Raises ConfigError."""
        key_id, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
        created = int(time.time())
        record = make_record(id=key_id, salt=salt, hash=_hashed(secret, salt), created=created, **permissions)
        if record.load and not record.roots and not record.manage:
            raise ConfigError("a key with load patterns needs roots, the folders that it may load from. Give --root.")
        with self._locked():
            kept = {known.id: known for known in self.records()} if self.path.exists() else {}
            self._write({**kept, key_id: record})
        return f"{_PREFIX}_{key_id}_{secret}", record

    def revoke(self, key_id: str) -> KeyRecord:
        """Forget a key. Raises ConfigError for an unknown id."""
        with self._locked():
            kept = {known.id: known for known in self.records()}
            if key_id not in kept:
                raise ConfigError(f"{self.path} has no key {key_id!r}. It has {sorted(kept)}.")
            record = kept.pop(key_id)
            self._write(kept)
        return record

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Reading, changing and writing is one step: nobody's change is lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            with FileLock(lock, timeout=_LOCK_TIMEOUT_S, mode=0o600):
                yield
        except Timeout:
            raise ConfigError(
                f"{str(self.path)!r} is being changed by someone else, who holds {str(lock)!r} for more than "
                f"{_LOCK_TIMEOUT_S:g} seconds. Try again."
            ) from None

    def _write(self, records: _Records) -> None:
        """Replace the file at once, and for good; nobody but its owner may read it."""
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(write_keys(records))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._looked, self._version = -_RELOAD_S, None

    # Reading

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked >= _RELOAD_S:
            self._looked = now
            try:
                self._read()
                self._fault = None
            except ConfigError as error:
                self._known, self._version, self._fault = ({}, {}), None, error
        if self._fault is not None:
            raise self._fault

    def _read(self) -> None:
        """Take the file's records if it has changed. Raises ConfigError."""
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                version = (status.st_mtime_ns, status.st_size, status.st_ino)
                if version == self._version:
                    return
                if status.st_size > _LARGEST_FILE:
                    raise ValueError(f"it has more than the {_LARGEST_FILE} bytes that a file of keys may have")
                text = file.read(_LARGEST_FILE).decode()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the keys in {str(self.path)!r} can't be read: {error}.") from error
        self._known, self._version = (parse_keys(text, str(self.path)), {}), version

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode(), "sha256")


def _hashed(secret: str, salt: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(salt), dklen=32, **_SCRYPT).hex()
