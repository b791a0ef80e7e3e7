"""API keys at rest: a file with salted hashes, never the keys themselves."""

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loraplex.errors import ConfigError
from loraplex.json_files import read_json

_PREFIX = "lpx"
_SCRYPT = {"n": 2**10, "r": 8, "p": 1}  # a key's secret is 256 random bits, which no hash has to slow down guessing of
_RELOAD_S = 1.0  # how soon a changed file is seen


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """What a key may do, and the hash by which it is known."""

    id: str
    salt: str
    hash: str
    note: str = ""
    use: tuple[str, ...] = ("*",)  # patterns of the names that requests may use; experts of a mixture count
    load: tuple[str, ...] = ()  # of those that it may load, replace, pin and unload
    manage: bool = False  # everything: all names, all adapters
    base: bool = True  # the base model itself
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and answers
    max_concurrent: int | None = None  # requests at once
    max_new_tokens: int | None = None  # of an answer
    max_priority: int = 0
    shared_prefixes: bool = False  # share the prefix cache with other keys that do
    created: int = 0  # seconds since 1970

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"key {self.id!r}: {name} is {value!r}; it must be a whole number of at least 1.")


class KeyFile:
    """The keys of a file. Changes of the file are seen within a second."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, KeyRecord] = {}
        self._changed = -1
        self._looked = -_RELOAD_S
        self._seen: dict[bytes, KeyRecord] = {}  # by a hash of the whole key, which only this process can compute
        self._pepper = secrets.token_bytes(32)

    # Asking

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key, or None; as slow for an unknown id as for a wrong secret."""
        self._reload()
        digest = hmac.digest(self._pepper, key.encode(), "sha256")
        known = self._seen.get(digest)
        if known is not None:
            return known
        _, _, rest = key.partition(f"{_PREFIX}_")
        key_id, _, secret = rest.partition("_")
        record = self._records.get(key_id)
        salt, expected = (record.salt, record.hash) if record is not None else ("00" * 16, "00" * 32)
        matches = hmac.compare_digest(_hashed(secret, salt), expected)
        if record is None or not matches:
            return None
        self._seen[digest] = record
        return record

    def records(self) -> list[KeyRecord]:
        """All keys, oldest first. Raises ConfigError for a file that can't be read."""
        self._looked = -_RELOAD_S
        self._changed = -1
        self._reload()
        return list(self._records.values())

    # Changing

    def create(self, **permissions: Any) -> tuple[str, KeyRecord]:
        """Make a key; returns it, which is written nowhere, and its record."""
        if self.path.exists():
            self.records()
        key_id, secret, salt = secrets.token_hex(4), secrets.token_urlsafe(32), secrets.token_hex(16)
        record = KeyRecord(id=key_id, salt=salt, hash=_hashed(secret, salt), created=int(time.time()), **permissions)
        self._write({**self._records, key_id: record})
        return f"{_PREFIX}_{key_id}_{secret}", record

    def revoke(self, key_id: str) -> KeyRecord:
        """Forget a key. Raises ConfigError for an unknown id."""
        self.records()
        if key_id not in self._records:
            raise ConfigError(f"{self.path} has no key {key_id!r}. It has {sorted(self._records)}.")
        record = self._records[key_id]
        self._write({name: kept for name, kept in self._records.items() if name != key_id})
        return record

    def _write(self, records: Mapping[str, KeyRecord]) -> None:
        """Replace the file at once; nobody but its owner may read it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"keys": [asdict(record) for record in records.values()]}, indent=2) + "\n"
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, self.path)
        self._records = dict(records)

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._looked < _RELOAD_S:
            return
        self._looked = now
        try:
            changed = self.path.stat().st_mtime_ns
            if changed != self._changed:
                self._records = _read(self.path)
                self._seen.clear()
                self._changed = changed
        except OSError as error:
            self._records, self._changed = {}, -1  # a file that is gone or can't be read opens nothing
            self._seen.clear()
            raise ConfigError(f"the keys in {str(self.path)!r} can't be read: {error}.") from error
        except ConfigError:
            self._records, self._changed = {}, -1
            self._seen.clear()
            raise


def _read(path: Path) -> dict[str, KeyRecord]:
    known = {field.name for field in fields(KeyRecord)}
    try:
        entries = read_json(path)["keys"]
        records = {}
        for entry in entries:
            unknown = set(entry) - known
            if unknown:
                raise ConfigError(f"{path}: a key has the unknown settings {sorted(unknown)}; known: {sorted(known)}.")
            record = KeyRecord(**entry)
            records[record.id] = replace(record, use=tuple(record.use), load=tuple(record.load))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of keys: {error!r}. Make one with `loraplex key create`.") from error
    return records


def _hashed(secret: str, salt: str) -> str:
    return hashlib.scrypt(secret.encode(), salt=bytes.fromhex(salt), dklen=32, **_SCRYPT).hex()
