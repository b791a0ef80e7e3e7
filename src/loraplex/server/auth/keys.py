"""API keys at rest: a file with salted hashes, never the keys themselves."""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loraplex.errors import ConfigError
from loraplex.json_files import open_regular
from loraplex.server.auth.key_records import KeyRecord, make_record, parse_keys, write_keys

_PREFIX = "lpx"
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
        _, _, rest = key.partition(f"{_PREFIX}_")
        key_id, _, secret = rest.partition("_")
        record = records.get(key_id)
        salt, expected = (record.salt, record.hash) if record is not None else ("00" * 16, "00" * 32)
        matches = hmac.compare_digest(_hashed(secret, salt), expected)
        if record is None or not matches or not key.startswith(f"{_PREFIX}_"):
            return None
        seen[self._digest(key)] = record
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
