"""What a run needs to go on after its process was killed: a snapshot, and the requests that came since.

A folder holds `run.json` (the settings), `state.safetensors` (the snapshot, replaced as a whole) and `requests.log`,
to which every request is appended before its client is told that it was taken. A request whose record is cut short was
never answered, and its client sends it again.
"""

import errno
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.errors import CheckpointError
from loraplex.json_files import parse_json, read_object
from loraplex.output_files import unwritable, whole_file, writing
from loraplex.training.service.settings import RunSettings

_SETTINGS, _STATE, _REQUESTS = "run.json", "state.safetensors", "requests.log"
_KEY = "loraplex_run"
_HEADER = struct.Struct("<IIQ16s")  # bytes of the body, checksum of what follows it, sequence number, kind
_RESULT = "result."  # of a request's result, among a snapshot's tensors


class JournalRecord(NamedTuple):
    """A request as it was sent."""

    seq: int
    kind: str  # at most 16 letters
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at one moment."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # none where only the rest was asked for
    last_seq: int  # of the requests that it holds the effects of
    num_steps: int
    results: Mapping[int, bytes] = field(default_factory=dict)  # by sequence number, as clients get them


class Journal:
    """One run's folder. `append` may be called while another thread writes a snapshot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes = 0  # of the requests since the last snapshot
        self._log = folder / _REQUESTS

    @classmethod
    def create(cls, folder: Path, settings: RunSettings) -> "Journal":
        """Begin a run's folder. Raises OutputError."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / _SETTINGS, lambda path: True, token="tmp") as temporary:
            temporary.write_text(json.dumps(settings.as_json(), indent=2) + "\n", encoding="utf-8")
        return cls(folder)

    @classmethod
    def exists(cls, folder: Path) -> bool:
        return (folder / _SETTINGS).is_file()

    def settings(self) -> RunSettings:
        """Raises CheckpointError."""
        content = read_object(self.folder / _SETTINGS, CheckpointError)
        try:
            return RunSettings.from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.folder / _SETTINGS, error) from error

    def last_changed(self) -> float:
        """When the last request came, in seconds since 1970."""
        return max(file.stat().st_mtime for file in (self._log, self.folder / _SETTINGS) if file.is_file())

    # Requests

    def append(self, record: JournalRecord) -> None:
        """Write down a request before it is answered. Raises OutputError."""
        content = _as_bytes(record)
        with writing(self._log), self._log.open("ab", buffering=0) as file:
            first = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(first)  # a part of a record would hide those behind it
                raise
        self.num_bytes += len(content)

    def records(self) -> list[JournalRecord]:
        """The requests since the last snapshot; one that is cut short is taken out, so that others can follow.

        Raises CheckpointError.
        """
        if not self._log.is_file():
            return []
        try:
            content = self._log.read_bytes()
            records, num_whole = _read_records(memoryview(content))
            if num_whole < len(content):
                os.truncate(self._log, num_whole)
        except OSError as error:
            raise _damaged(self._log, error) from error
        return records

    def keep_records(self, records: Sequence[JournalRecord]) -> None:
        """Replace the log by the requests that a snapshot doesn't have. Raises OutputError."""
        content = b"".join(map(_as_bytes, records))
        with whole_file(self._log, lambda path: True, token="tmp") as temporary:
            temporary.write_bytes(content)
        self.num_bytes = len(content)

    # Snapshots

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Replace the snapshot; the log still has what it holds, until `keep_records`. Raises OutputError."""
        results = {f"{_RESULT}{seq}": _as_tensor(content) for seq, content in snapshot.results.items()}
        told = {"last_seq": snapshot.last_seq, "num_steps": snapshot.num_steps}
        with whole_file(self.folder / _STATE, lambda path: True, token="tmp") as temporary:
            try:
                save_file({**snapshot.tensors, **results}, temporary, metadata={_KEY: json.dumps(told)})
            except SafetensorError as error:  # what it makes of an OSError
                raise unwritable(self.folder / _STATE, error) from error

    def snapshot(self, *, with_tensors: bool = True) -> Snapshot | None:
        """The last one, or None before the first; the weights only if they are wanted. Raises CheckpointError."""
        path = self.folder / _STATE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told: Mapping[str, Any] = parse_json(file.metadata()[_KEY])
                names = [name for name in file.keys() if with_tensors or name.startswith(_RESULT)]  # noqa: SIM118
                tensors = {name: file.get_tensor(name) for name in names}
            results = {
                int(name.removeprefix(_RESULT)): bytes(tensors.pop(name).numpy().tobytes())
                for name in [name for name in tensors if name.startswith(_RESULT)]
            }
            return Snapshot(
                tensors=tensors, last_seq=int(told["last_seq"]), num_steps=int(told["num_steps"]), results=results
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error


def _read_records(content: memoryview) -> tuple[list[JournalRecord], int]:
    """The whole records, and the bytes that they take."""
    records, first = [], 0
    while first + _HEADER.size <= len(content):
        size, checksum, seq, kind = _HEADER.unpack_from(content, first)
        stop = first + _HEADER.size + size
        body = bytes(content[first + _HEADER.size : stop])
        if len(body) < size or zlib.crc32(body, seq & 0xFFFFFFFF) != checksum:
            break
        records.append(JournalRecord(seq, kind.rstrip(b"\0").decode("ascii", "replace"), body))
        first = stop
    return records, first


def _as_bytes(record: JournalRecord) -> bytes:
    checksum = zlib.crc32(record.body, record.seq & 0xFFFFFFFF)
    return _HEADER.pack(len(record.body), checksum, record.seq, record.kind.encode()) + record.body


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} can't be read: {type(error).__name__}: {error}. The run can't go on from it; begin a new one "
        "from a checkpoint."
    )


def folder_bytes(folder: Path) -> int:
    """What a folder's files take."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
